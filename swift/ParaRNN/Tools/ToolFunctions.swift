import Foundation

/// A sentence that a function gives the model, and so the user, instead of a result.
public struct ToolError: LocalizedError, Sendable {
  public let sentence: String
  public init(_ sentence: String) { self.sentence = sentence }
  public var errorDescription: String? { sentence }
}

/// The functions that a model may call; nothing else can be called.
///
/// ```swift
/// struct Lamp: Decodable, Sendable { let room: String; let brightness: Int? }
///
/// var functions = ToolFunctions()
/// try functions.add(
///   "set_lamp", "Switch the lamp of a room.",
///   schema: #"""
///     {"type": "object", "required": ["room"],
///      "properties": {"room": {"type": "string"}, "brightness": {"type": "integer", "maximum": 100}}}
///     """#
/// ) { (lamp: Lamp) in "The lamp in the \(lamp.room) is at \(lamp.brightness ?? 100) %." }
/// ```
///
/// Nothing that a function or a model does wrong is thrown: it becomes the text of the result, for the model.
public struct ToolFunctions: Sendable {
  /// What a call came to: the text that the model reads, and whether it is an error.
  struct Outcome: Sendable, Equatable {
    let text: String
    let failed: Bool
  }

  struct Function: Sendable {
    let name: String
    let description: String
    let schema: JSONSchema
    let run: @Sendable (Data, Assistant?) async throws -> String
  }

  /// Given the user's message, a function's name and its arguments, a sentence that is the result in place of the
  /// call, or nil.
  var instead: @Sendable (_ message: String, _ name: String, _ arguments: String) -> String? = { _, _, _ in
    nil
  }
  /// Of what a model has said without a call, and of whether that is all: what is to be said instead, or nil.
  typealias AnswerCheck = @Sendable (_ said: String, _ isAll: Bool) -> String?
  /// Given the message, a check of the answer.
  var checkAnswer: @Sendable (_ message: String) -> AnswerCheck = { _ in { _, _ in nil } }
  private var list: [Function] = []
  private let seconds: Double
  private let resultBytes: Int
  private let late = Late()
  /// What the standard functions remember; each chat has one of its own.
  var assistant: Assistant?
  private static let errorCharacters = 300

  /// - Parameters:
  ///   - seconds: how long a call may take. Then its task is cancelled and the model gets an error; until the function
  ///     returns it is not called again.
  ///   - resultBytes: longer results are cut, and say so.
  public init(seconds: Double = 5, resultBytes: Int = 4096) {
    self.seconds = seconds
    self.resultBytes = resultBytes
  }

  /// The names, in the order in which they were added.
  public var names: [String] { list.map(\.name) }

  /// Allow one more function.
  ///
  /// - Parameters:
  ///   - name: letters, digits and _, as the model has learned it.
  ///   - schema: the JSON schema of the arguments, an object's; members in the order in which the model writes them.
  ///   - body: what it returns is the result: a string as it is, anything else as JSON.
  /// - Throws: ``ParaRNNError/invalidFunction(name:reason:)``
  public mutating func add<Arguments: Decodable & Sendable, Output: Encodable & Sendable>(
    _ name: String, _ description: String, schema: String,
    _ body: @escaping @Sendable (Arguments) async throws -> Output
  ) throws {
    try add(name, description, schema) { data, _ in
      try Self.text(try await body(try JSONDecoder().decode(Arguments.self, from: data)))
    }
  }

  /// Allow a function without arguments.
  public mutating func add<Output: Encodable & Sendable>(
    _ name: String, _ description: String, _ body: @escaping @Sendable () async throws -> Output
  ) throws {
    let none = #"{"type":"object","properties":{},"additionalProperties":false}"#
    try add(name, description, none) { _, _ in try Self.text(try await body()) }
  }

  mutating func add(
    _ name: String, _ description: String, _ schema: String,
    run: @escaping @Sendable (Data, Assistant?) async throws -> String
  ) throws {
    func refuse(_ reason: String) -> ParaRNNError { .invalidFunction(name: name, reason: reason) }
    let isName =
      (1...64).contains(name.utf8.count) && !("0"..."9").contains(name.first!)
      && name.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "_") }
    guard isName else { throw refuse("a name has letters, digits and _") }
    guard self[name] == nil else { throw refuse("there are two functions of this name") }
    do {
      list.append(Function(name: name, description: description, schema: try JSONSchema(schema), run: run))
    } catch let refused as JSONSchema.Refused {
      throw refuse(refused.reason)
    }
  }

  /// The same functions for one chat, which remembers `kept`, whichever functions it has.
  func forChat(remembering kept: AssistantMemory) -> (functions: ToolFunctions, assistant: Assistant) {
    var own = self
    let assistant = assistant?.another(kept) ?? Assistant(kept: kept) { Moment(Date(), in: .current) }
    own.assistant = assistant
    return (own, assistant)
  }

  subscript(name: String) -> Function? { list.first { $0.name == name } }

  /// Run a function of the list, and nothing else.
  func call(_ name: String, _ arguments: String) async -> Outcome {
    guard let function = self[name] else {
      let names = list.isEmpty ? "none" : names.joined(separator: ", ")
      return Self.error("there is no function '\(name)'; there are: \(names)")
    }
    guard let json = try? JSONText(arguments) else { return Self.error("the arguments are no JSON") }
    if let problem = function.schema.problem(json) {
      return Self.error(String(problem.prefix(Self.errorCharacters)))
    }
    if late.contains(name) { return Self.error("\(name) is still busy with an earlier call") }
    let outcome = await run(function, Data(json.text.utf8))
    return Outcome(text: cut(outcome.text), failed: outcome.failed)
  }

  private func run(_ function: Function, _ arguments: Data) async -> Outcome {
    let (outcomes, found) = AsyncStream.makeStream(of: Outcome.self)
    let call = Late.Call()
    let (late, seconds, assistant) = (late, seconds, assistant)
    let task = Task {
      // The time is that of the function, not of waiting for a thread; and a timer of its own counts it, since a
      // function that blocks its thread would hold up a sleeping task.
      DispatchQueue.global().asyncAfter(deadline: .now() + seconds) {
        late.begin(call, function.name)
        let limit = String(format: "%g", seconds)
        found.yield(Self.error("\(function.name) took longer than \(limit) seconds"))
      }
      let outcome: Outcome
      do {
        outcome = Outcome(text: try await function.run(arguments, assistant), failed: false)
      } catch let error as ToolError {
        outcome = Outcome(text: error.sentence, failed: true)
      } catch {
        outcome = Self.error(Self.inOneLine(error))
      }
      late.end(call, function.name)
      found.yield(outcome)
    }
    for await outcome in outcomes {
      task.cancel()
      return outcome
    }
    task.cancel()
    return Self.error("the turn was stopped")
  }

  private func cut(_ text: String) -> String {
    let bytes = Array(text.utf8)
    guard bytes.count > resultBytes else { return text }
    var end = resultBytes
    while end > 0, bytes[end] & 0xC0 == 0x80 { end -= 1 }
    let beginning = String(decoding: bytes[..<end], as: UTF8.self)
    let count = bytes.count.formatted(.number.locale(Locale(identifier: "en_US")))
    return "\(beginning) [cut: \(count) bytes in all]"
  }

  static func error(_ sentence: String) -> Outcome { Outcome(text: "error: \(sentence)", failed: true) }

  private static func inOneLine(_ error: any Error) -> String {
    let said = (error as? any LocalizedError)?.errorDescription ?? String(describing: error)
    let line = said.split(whereSeparator: \.isWhitespace).joined(separator: " ")
    return String("\(type(of: error)): \(line)".prefix(errorCharacters))
  }

  private static func text(_ output: some Encodable) throws -> String {
    if let text = output as? String { return text }
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return String(decoding: try encoder.encode(output), as: UTF8.self)
  }

  /// The functions that still run after their time.
  private final class Late: @unchecked Sendable {
    final class Call: @unchecked Sendable {
      fileprivate var hasEnded = false
      fileprivate var isLate = false
    }

    private let lock = NSLock()
    private var counts: [String: Int] = [:]

    func contains(_ name: String) -> Bool { lock.withLock { counts[name, default: 0] > 0 } }

    func begin(_ call: Call, _ name: String) {
      lock.withLock {
        call.isLate = !call.hasEnded
        if call.isLate { counts[name, default: 0] += 1 }
      }
    }

    func end(_ call: Call, _ name: String) {
      lock.withLock {
        call.hasEnded = true
        if call.isLate { counts[name, default: 0] -= 1 }
      }
    }
  }
}
