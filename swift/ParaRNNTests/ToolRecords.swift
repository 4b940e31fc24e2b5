import Foundation
import Testing

@testable import ParaRNN

/// What the Python package has recorded for this one (tests/pocket/test_swift_records.py, test_turn_record.py).
enum Records {
  static func url(_ name: String) -> URL {
    URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../tests/data/tools/\(name)").standardizedFileURL
  }

  static func decode<T: Decodable>(_ type: T.Type, _ name: String) throws -> T {
    try JSONDecoder().decode(type, from: Data(contentsOf: url(name)))
  }

  static func tokenizer() throws -> BPETokenizer { try BPETokenizer(contentsOf: url("tokenizer.json")) }

  static func tools() throws -> ToolProtocol { try #require(ToolProtocol(try tokenizer())) }

  static func turns() throws -> Turns { try decode(Turns.self, "turns.json") }

  struct Event: Decodable, Equatable {
    let event: String
    let tokens: Int
    var text: String?
    var name: String?
    var arguments: String?
    var token: Int?
    var failed: Bool?
    var command: String?
    var reason: String?
    var made: Int?
    var calls: Int?

    init(_ event: ToolEvent) {
      tokens = event.tokens
      switch event.kind {
      case .thought(let text): (self.event, self.text) = ("Thought", text)
      case .command(let command): (self.event, self.command) = ("CommandGiven", command.name)
      case .observation(let token, let name):
        (self.event, self.token, self.name) = ("Observation", token, name)
      case .call(let name, let arguments):
        (self.event, self.name, self.arguments) = ("Call", name, arguments)
      case .result(let text, let failed): (self.event, self.text, self.failed) = ("Result", text, failed)
      case .text(let text): (self.event, self.text) = ("Text", text)
      case .finish(let finish):
        (self.event, reason, made, calls) = ("Finish", finish.reason.rawValue, finish.made, finish.calls)
      }
    }
  }

  struct Turns: Decodable {
    let result_bytes: Int
    let turns: [Turn]
  }

  struct Turn: Decodable {
    struct Limits: Decodable {
      var steps: Int?
      var answer: Int?
      var calls: Int?
      var seconds: Double?
    }
    let name: String
    let message: String
    let limits: Limits
    let made: [Int]
    let read: [Int]
    let events: [Event]

    var toolLimits: ToolLimits {
      let usual = ToolLimits()
      return ToolLimits(
        steps: limits.steps ?? usual.steps, answer: limits.answer ?? usual.answer,
        calls: limits.calls ?? usual.calls, seconds: limits.seconds ?? usual.seconds)
    }
  }

  /// The functions of the turns, with the schemas that Python made of theirs.
  static func functions() throws -> ToolFunctions {
    struct Double: Decodable { let number: Int }
    struct Greet: Decodable {
      let name: String
      var polite: Bool?
      var tone: String?
    }
    struct Fail: Decodable { let reason: String }
    struct Repeat: Decodable { let count: Int }

    let json = try JSONText(String(contentsOf: url("turns.json"), encoding: .utf8))
    guard case .array(let list) = json["functions"] else { throw JSONText.Malformed() }
    func schema(_ name: String) -> String {
      list.first { $0["name"] == .string(name) }?["parameters"]?.text ?? ""
    }
    var functions = ToolFunctions(seconds: 600, resultBytes: try turns().result_bytes)
    try functions.add("double", "Twice a number.", schema: schema("double")) { (arguments: Double) in
      2 * arguments.number
    }
    try functions.add("greet", "Greet somebody.", schema: schema("greet")) { (arguments: Greet) in
      "\(arguments.polite == true ? "dear " : "")\(arguments.name), \(arguments.tone ?? "short")"
    }
    try functions.add("fail", "Fail.", schema: schema("fail")) { (arguments: Fail) -> String in
      throw ToolError(arguments.reason)
    }
    try functions.add("repeat", "A long text.", schema: schema("repeat")) { (arguments: Repeat) in
      String(repeating: "é", count: arguments.count)
    }
    return functions
  }
}

/// Makes the tokens of a script, its last one again and again, and records what it reads.
actor Script: TokenSource {
  nonisolated let vocabularySize = 278
  private let tokens: [Int]
  private var made = 0
  private(set) var taken: [Int] = []

  init(_ tokens: [Int]) { self.tokens = tokens }

  func read(_ tokens: [Int]) { taken += tokens }

  func choose(_ allowed: [Bool]) -> Int {
    defer { made += 1 }
    return tokens[min(made, tokens.count - 1)]
  }
}

extension ToolTurn {
  func all() async throws -> [ToolEvent] {
    var events: [ToolEvent] = []
    while let event = try await next() { events.append(event) }
    return events
  }
}
