import Foundation

/// The part of JSON Schema that describes a function's arguments.
///
/// `type`, `properties`, `required`, `items`, `enum`, `const`, `anyOf`, and bounds of numbers, lengths and counts. An
/// object has the members it names and no others, in their order; one that names none may have any.
final class JSONSchema: Sendable {
  /// What the model may write. Bounds of numbers are not in it; ``problem(_:at:)`` sees them.
  let grammar: JSONGrammar
  private let json: JSONText
  private let choices: [JSONSchema]
  private let properties: [(name: String, schema: JSONSchema, isRequired: Bool)]
  private let items: JSONSchema?

  private static let known: Set<String> = [
    "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems",
    // for readers alone
    "title", "description", "default", "examples", "deprecated", "$schema",
  ]

  /// Why a schema is not taken.
  struct Refused: Error {
    let reason: String
    init(_ reason: String) { self.reason = reason }
  }

  /// - Throws: ``Refused``
  convenience init(_ text: String) throws {
    guard let json = try? JSONText(text) else { throw Refused("its schema is no JSON") }
    try self.init(json)
  }

  private init(_ json: JSONText) throws {
    guard case .object(let members) = json else {
      throw Refused("its schema holds \(json.text) for an object")
    }
    if let other = members.first(where: { !Self.known.contains($0.name) }) {
      throw Refused("its schema has \(other.name), which is not supported")
    }
    self.json = json
    let fixed = json["const"].map { [$0] } ?? json["enum"].map(Self.list)
    choices = try Self.list(json["anyOf"]).map(JSONSchema.init)
    let required = Set(Self.list(json["required"]).compactMap(\.string))
    guard case .object(let named) = json["properties"] ?? .object([]) else {
      throw Refused("its schema has properties that are no object")
    }
    let properties = try named.map {
      (name: $0.name, schema: try JSONSchema($0.value), isRequired: required.contains($0.name))
    }
    self.properties = properties
    let items = try json["items"].map(JSONSchema.init)
    self.items = items
    func bound(_ name: String) throws -> Int? {
      guard let value = json[name] else { return nil }
      guard case .number(let digits) = value, let number = Int(digits), number >= 0 else {
        throw Refused("its schema has \(value.text) for \(name)")
      }
      return number
    }
    switch (fixed, json["type"]?.string) {
    case (let values?, _): grammar = .choice(values.map { .text($0.text) })
    case (nil, nil) where !choices.isEmpty: grammar = .choice(choices.map(\.grammar))
    case (nil, "object"):
      let isOpen = json["properties"] == nil && json["additionalProperties"] != .bool(false)
      guard isOpen || [nil, .bool(false)].contains(json["additionalProperties"]) else {
        throw Refused("its schema has properties and others besides, which is not supported")
      }
      guard required.isSubset(of: properties.map(\.name)) else {
        throw Refused("its schema requires a property that it does not describe")
      }
      grammar =
        isOpen
        ? .anyObject
        : .object(
          properties.map { .init(name: $0.name, value: $0.schema.grammar, isRequired: $0.isRequired) })
    case (nil, "array"):
      grammar = .array(
        items?.grammar ?? .anyValue, least: try bound("minItems") ?? 0, most: try bound("maxItems"))
    case (nil, "string"):
      grammar = .string(least: try bound("minLength") ?? 0, most: try bound("maxLength"))
    case (nil, "integer"): grammar = .integer
    case (nil, "number"): grammar = .number
    case (nil, "boolean"): grammar = .choice([.text("true"), .text("false")])
    case (nil, "null"): grammar = .text("null")
    default: throw Refused("its schema has \(json["type"]?.text ?? "no type") where one type must stand")
    }
  }

  /// What is wrong with `value`, and where; nil if it fits.
  func problem(_ value: JSONText, at place: String = "the arguments") -> String? {
    func wrong(_ text: String) -> String { "\(place): \(text)" }
    if let fixed = json["const"].map({ [$0] }) ?? json["enum"].map(Self.list) {
      let names = fixed.map(\.text).joined(separator: " or ")
      return fixed.contains(value) ? nil : wrong("input should be \(names)")
    }
    if !choices.isEmpty {
      let problems = choices.map { $0.problem(value, at: place) }
      return problems.contains(nil) ? nil : problems[0]
    }
    func inside(_ name: String) -> String { place == "the arguments" ? name : "\(place).\(name)" }
    switch (json["type"]?.string, value) {
    case ("object", .object(let members)):
      if json["properties"] == nil && json["additionalProperties"] != .bool(false) { return nil }
      for property in properties {
        guard let member = value[property.name] else {
          if property.isRequired { return "\(inside(property.name)): field required" }
          continue
        }
        if let problem = property.schema.problem(member, at: inside(property.name)) { return problem }
      }
      let other = members.first { member in !properties.contains { $0.name == member.name } }
      return other.map { "\(inside($0.name)): extra inputs are not permitted" }
    case ("array", .array(let values)):
      if let most = limit("maxItems"), Double(values.count) > most {
        return wrong("list should have at most \(Int(most)) items, not \(values.count)")
      }
      if let least = limit("minItems"), Double(values.count) < least {
        return wrong("list should have at least \(Int(least)) items, not \(values.count)")
      }
      for (i, value) in values.enumerated() {
        if let problem = items?.problem(value, at: inside("\(i)")) { return problem }
      }
      return nil
    case ("string", .string(let text)):
      let count = Double(text.unicodeScalars.count)
      if let most = limit("maxLength"), count > most {
        return wrong("string should have at most \(Int(most)) characters")
      }
      if let least = limit("minLength"), count < least {
        return wrong("string should have at least \(Int(least)) characters")
      }
      return nil
    case ("integer", .number(let digits)) where digits.allSatisfy({ $0.isNumber || $0 == "-" }):
      return outOfBounds(digits).map(wrong)
    case ("number", .number(let digits)): return outOfBounds(digits).map(wrong)
    case ("boolean", .bool), ("null", .null): return nil
    default:
      let names = [
        "integer": "integer", "number": "number", "boolean": "boolean", "array": "list",
        "object": "dictionary",
        "null": "null", "string": "string",
      ]
      return wrong("input should be a valid \(names[json["type"]?.string ?? ""] ?? "value")")
    }
  }

  private func outOfBounds(_ digits: String) -> String? {
    guard let number = Double(digits), number.isFinite else { return "input should be a finite number" }
    let bounds: [(String, String, (Double, Double) -> Bool)] = [
      ("minimum", "greater than or equal to", { $0 >= $1 }),
      ("maximum", "less than or equal to", { $0 <= $1 }),
      ("exclusiveMinimum", "greater than", { $0 > $1 }), ("exclusiveMaximum", "less than", { $0 < $1 }),
    ]
    for (name, words, holds) in bounds {
      if let bound = limit(name), !holds(number, bound) {
        return "input should be \(words) \(json[name]?.text ?? "")"
      }
    }
    return nil
  }

  private func limit(_ name: String) -> Double? {
    if case .number(let digits) = json[name] { Double(digits) } else { nil }
  }

  private static func list(_ json: JSONText?) -> [JSONText] {
    if case .array(let items) = json { items } else { [] }
  }
}

extension JSONText {
  fileprivate var string: String? { if case .string(let text) = self { text } else { nil } }
}
