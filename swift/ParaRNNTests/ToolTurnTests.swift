import Foundation
import Testing

@testable import ParaRNN

@Suite struct ToolTurnTests {
  @Test func theProtocolOfATokenizer() throws {
    let tools = try Records.tools()
    #expect(tools.byteIDs == Array(0...255) && tools[.user] == 256 && tools[.edge] == 261)
    #expect(tools.commands[262] == .init(action: .read, pointer: 1))
    #expect(tools.commands[277] == .init(action: .last, pointer: 4))
    #expect(ToolProtocol(ByteTokenizer()) == nil)
    #expect(tools.render(message: "<|end|>").count == 9)  // text is bytes, whatever it looks like
    let names = [0: #"'\x00'"#, 39: #""'""#, 92: #"'\\'"#, 10: #"'\n'"#, 200: #"'\xc8'"#, 261: "<|edge|>"]
    for (token, name) in names { #expect(tools.name(token) == name) }
  }

  @Test func turnsAreThoseOfPython() async throws {
    let (turns, tools, functions) = (
      try Records.turns().turns, try Records.tools(), try Records.functions()
    )
    #expect(turns.count > 10)
    for turn in turns {
      let source = Script(turn.made)
      let run = try ToolTurn(
        turn.message, tools: tools, source: source, functions: functions, limits: turn.toolLimits)
      let events = try await run.all().map(Records.Event.init)
      #expect(events == turn.events, "\(turn.name)")
      #expect(await source.taken == turn.read, "\(turn.name)")
      #expect(try await run.next() == nil)
    }
  }

  /// There a call's JSON is written anew, with spaces, since no grammar has held it.
  @Test func theTurnOfTheDocumentation() async throws {
    struct Turn: Decodable {
      let message: String
      let tokens: [Int]
      let made_by_the_model: [Bool]
      let events: [Records.Event]
    }
    let turn = try Records.decode(Turn.self, "turn.json")
    let tools = try Records.tools()
    let source = Script(zip(turn.tokens, turn.made_by_the_model).filter(\.1).map(\.0))
    struct Double: Decodable { let number: Int }
    var functions = ToolFunctions(seconds: 600)
    let schema = #"{"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}"#
    try functions.add("double", "Twice a number.", schema: schema) { (arguments: Double) in
      2 * arguments.number
    }
    let run = try ToolTurn(turn.message, tools: tools, source: source, functions: functions, limits: .init())
    let events = try await run.all().map(Records.Event.init)
    var recorded = turn.events
    for i in recorded.indices {
      recorded[i].arguments = try recorded[i].arguments.map { try JSONText($0).text }
    }
    #expect(events == recorded)
    #expect(await source.taken + [tools[.end]] == turn.tokens)
  }

  @Test func aModelThatGoesOnWithoutAWordHasLostItsWay() async throws {
    let tools = try Records.tools()
    let script = Script([65, tools.commands.first { $0.value == .init(action: .right, pointer: 1) }!.key])
    let run = try ToolTurn("x", tools: tools, source: script, functions: .init(), limits: .init())
    let events = try await run.all()
    #expect(events.count < 200)
    guard case .text("I lost my place in that message and cannot answer it.") = events.dropLast().last?.kind
    else { throw ParaRNNError.predictionFailed(reason: "\(events.count) events") }
  }

  @Test func tokensThatCannotStandThere() async throws {
    let tools = try Records.tools()
    let wrong: [[Int]] = [
      [tools[.end]], [tools[.result]], [tools[.user]], [tools[.answer], tools[.call]], [tools[.call], 65],
      [tools[.edge]], [-1], [300],
    ]
    for script in wrong {
      let run = try ToolTurn("x", tools: tools, source: Script(script), functions: .init(), limits: .init())
      guard case .predictionFailed = await failure({ _ = try await run.all() }) else {
        Issue.record("\(script)")
        continue
      }
    }
  }

  @Test func pointersStayNearTheMemory() {
    var memory = PointerMemory([7, 8], edge: 99)
    memory.move(1, -1)
    memory.move(1, -1)
    #expect(memory.read(1) == 99)
    memory.move(1, 1)
    #expect(memory.read(1) == 7)
    for _ in 0..<5 { memory.move(2, 1) }
    #expect(memory.read(2) == 99)
    memory.append(9)
    #expect(memory.read(2) == 9 && memory.read(4) == 7)
    memory.jumpToLast(4)
    #expect(memory.read(4) == 9)
  }
}

@Suite struct ToolGrammarTests {
  @Test func allowedBytesAreThoseOfPython() throws {
    struct Case: Decodable {
      let schema: String
      let text: String
      let allowed: [String]
    }
    let cases = try Records.decode([Case].self, "calls.json")
    #expect(cases.count > 10)
    for one in cases {
      var matcher = GrammarMatcher(.sequence([try JSONSchema(one.schema).grammar, .text("}")]))
      for (byte, allowed) in zip(one.text.utf8, one.allowed) {
        let ours = matcher.allowed
        #expect(hexadecimal(ours) == allowed, "\(one.schema) \(one.text) before \(Unicode.Scalar(byte))")
        matcher.take(byte)
      }
      #expect(matcher.isStopped && matcher.isComplete)
    }
  }

  private func hexadecimal(_ bytes: ByteSet) -> String {
    let digits = (0..<64).map { digit in
      let bits = (0..<4).reduce(0) { $0 | (bytes.contains(UInt8(4 * digit + $1)) ? 1 << $1 : 0) }
      return String(bits, radix: 16)
    }
    let text = digits.reversed().joined().drop { $0 == "0" }
    return text.isEmpty ? "0" : String(text)
  }

  @Test(
    arguments: [
      (#"{"n": 3}"#, nil), (#"{"n": 3, "s": "ab", "l": [1.5]}"#, nil), (#"{}"#, "n: field required"),
      (#"{"n": 3.5}"#, "n: input should be a valid integer"),
      (#"{"n": "3"}"#, "n: input should be a valid integer"),
      (#"{"n": 11}"#, "n: input should be less than or equal to 10"),
      (#"{"n": -1}"#, "n: input should be greater than or equal to 0"),
      (#"{"n": 1, "s": "abcd"}"#, "s: string should have at most 3 characters"),
      (#"{"n": 1, "l": [1, "x"]}"#, "l.1: input should be a valid number"),
      (#"{"n": 1, "l": [1, 2, 3]}"#, "l: list should have at most 2 items, not 3"),
      (#"{"n": 1, "e": "c"}"#, #"e: input should be "a" or "b""#),
      (#"{"n": 1, "x": 1}"#, "x: extra inputs are not permitted"),
      (#"{"n": 1e999}"#, "n: input should be a valid integer"),
      (#"[]"#, "the arguments: input should be a valid dictionary"),
    ] as [(String, String?)])
  func whatIsWrongWithArguments(arguments: String, problem: String?) throws {
    let schema = try JSONSchema(
      #"""
      {"type": "object", "required": ["n"], "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 10}, "s": {"type": "string", "maxLength": 3},
        "l": {"type": "array", "items": {"type": "number"}, "maxItems": 2}, "e": {"enum": ["a", "b"]}}}
      """#)
    #expect(schema.problem(try JSONText(arguments)) == problem)
  }

  @Test func schemasThatCannotBeKeptTo() throws {
    let wrong = [
      "", "[]", #"{"type": "text"}"#, #"{"type": ["string", "null"]}"#, ##"{"$ref": "#/x"}"##,
      #"{"type": "string", "pattern": "a+"}"#, #"{"type": "string", "maxLength": -1}"#, #"{}"#,
      #"{"type": "object", "properties": {"a": 1}}"#, #"{"type": "object", "required": ["a"]}"#,
      #"{"type": "object", "properties": {}, "additionalProperties": true}"#,
    ]
    for schema in wrong where (try? JSONSchema(schema)) != nil { Issue.record("taken: \(schema)") }
  }

  @Test func jsonKeepsOrderAndDigits() throws {
    let long = String(repeating: "9", count: 400)
    let text = #"{"b":[1.50,-0,\#(long),true,null],"a":"\"\\/\u00e9\ud83d\ude00\n\u0001"}"#
    #expect(
      try JSONText(" " + text + "\n").text
        == #"{"b":[1.50,-0,\#(long),true,null],"a":"\"\\/é😀\n\u0001"}"#)
    for bad in [
      "", "{", "[1,]", "01", "1.", "-", "nul", #""\x""#, #""\ud800""#, "\"\n\"", #"{"a" 1}"#, "1 2",
      #"{1:2}"#,
      "NaN", String(repeating: "[", count: 200),
    ] {
      #expect(throws: JSONText.Malformed.self, "\(bad)") { try JSONText(bad) }
    }
  }
}

@Suite struct ToolSummaryTests {
  @Test func oneLine() throws {
    var summary = ToolSummary()
    #expect(summary.line == nil)
    let long = String(repeating: "9", count: 80)
    let kinds: [ToolEvent.Kind] = [
      .command(.init(action: .read, pointer: 1)), .observation(token: 1, name: "x"), .thought("t"),
      .call(name: "a", arguments: "{\"x\":\"\u{1B}[2J\"}"), .result(long, failed: false),
      .call(name: "b", arguments: "{}"), .result("no", failed: true), .text("answer"),
    ]
    for kind in kinds { summary.add(ToolEvent(tokens: 1, kind: kind)) }
    for _ in 0..<1499 { summary.add(ToolEvent(tokens: 1, kind: kinds[0])) }
    let cut = long.prefix(59) + "…"
    #expect(
      summary.line == "a {\"x\":\"\\u{1b}[2J\"} → \(cut) · b {} → no · 1,500 steps")
  }
}
