import Foundation
import Testing

@testable import ParaRNN

@Suite struct ToolFunctionTests {
  static let none = "{}"

  @Test func namesAndSchemas() async throws {
    var functions = ToolFunctions(seconds: 600)
    try functions.add("one_1", "") { 1 }
    for name in ["", "1a", "a b", "é", "a.b", String(repeating: "a", count: 65), "one_1"] {
      guard case .invalidFunction(name, _) = await failure({ try functions.add(name, "") { 1 } }) else {
        Issue.record("\(name)")
        continue
      }
    }
    struct Anything: Decodable {}
    let error = await failure {
      try functions.add("two", "", schema: #"{"type": "string", "format": "date"}"#) { (_: Anything) in 1 }
    }
    #expect(
      error == .invalidFunction(name: "two", reason: "its schema has format, which is not supported"))
    #expect(functions.names == ["one_1"])
  }

  @Test func whatTheModelReads() async throws {
    struct Point: Codable { let y: Int, x: String }
    struct Broken: Error, CustomStringConvertible { let description = "it\n broke" }
    var functions = ToolFunctions(seconds: 600, resultBytes: 8)
    try functions.add("text", "") { "plain" }
    try functions.add("value", "") { Point(y: 1, x: "/") }
    try functions.add("sentence", "") { () -> String in throw ToolError("no") }
    try functions.add("error", "") { () -> String in throw Broken() }
    try functions.add("long", "") { String(repeating: "é", count: 600) + "x" }
    func call(_ name: String, _ arguments: String = Self.none) async -> ToolFunctions.Outcome {
      await functions.call(name, arguments)
    }
    #expect(await call("text") == .init(text: "plain", failed: false))
    #expect(await call("sentence") == .init(text: "no", failed: true))
    #expect(await call("long").text == "éééé [cut: 1,201 bytes in all]")
    #expect(await call("text", "{") == .init(text: "error: the arguments are no JSON", failed: true))
    #expect(await call("text", #"{"a":1}"#).text == "error: a: extra inputs are not permitted")
    #expect(
      await call("no").text
        == "error: there is no function 'no'; there are: text, value, sentence, error, long")
    #expect(
      await ToolFunctions().call("no", "{}").text == "error: there is no function 'no'; there are: none")
    var wide = ToolFunctions(seconds: 600)
    try wide.add("value", "") { Point(y: 1, x: "/") }
    try wide.add("error", "") { () -> String in throw Broken() }
    #expect(await wide.call("value", "{}").text == #"{"x":"/","y":1}"#)
    #expect(await wide.call("error", "{}") == .init(text: "error: Broken: it broke", failed: true))
  }

  /// Every thread of the pool is taken for longer than the call may take.
  @Test func waitingForAThreadIsNoTimeOfACall() async throws {
    var functions = ToolFunctions(seconds: 1)
    try functions.add("waits", "") { "done" }
    let busy = (0..<ProcessInfo.processInfo.activeProcessorCount).map { _ in
      Task { Self.block(seconds: 1.5) }
    }
    #expect(await functions.call("waits", "{}").text == "done")
    for task in busy { await task.value }
  }

  private static func block(seconds: Double) { Thread.sleep(forTimeInterval: seconds) }

  /// One function heeds its task's cancelling, the other blocks its thread.
  @Test(.timeLimit(.minutes(5))) func callsThatTakeTooLong() async throws {
    final class Gate: @unchecked Sendable {
      private let lock = NSLock()
      private var isOpen = false
      func open() { lock.withLock { isOpen = true } }
      func wait() { while !lock.withLock({ isOpen }) { Thread.sleep(forTimeInterval: 0.005) } }
    }
    let gate = Gate()
    var functions = ToolFunctions(seconds: 0.05)
    try functions.add("sleeps", "") {
      try await Task.sleep(for: .seconds(600))
      return "late"
    }
    try functions.add("blocks", "") {
      gate.wait()
      return "done"
    }
    #expect(await functions.call("sleeps", "{}").text == "error: sleeps took longer than 0.05 seconds")
    #expect(await functions.call("blocks", "{}").text == "error: blocks took longer than 0.05 seconds")
    #expect(await functions.call("blocks", "{}").text == "error: blocks is still busy with an earlier call")
    gate.open()
    // On a busy machine a call may be late once more.
    while await functions.call("blocks", "{}").text != "done" { try await Task.sleep(for: .milliseconds(5)) }
  }
}

@Suite struct StandardFunctionTests {
  struct Recorded: Decodable {
    struct Call: Decodable {
      struct Asked: Decodable {
        let name: String
        let arguments: [String: String]
      }
      let name: String
      let arguments: [String: String]
      let text: String
      let failed: Bool
    }
    struct Expression: Decodable {
      let expression: String
      let value: String?
    }
    struct Request: Decodable {
      let message: String
      let function: String
      let arguments: String?
      let instead: String?
    }
    struct Misread: Decodable {
      let message: String
      let said: String?
    }
    struct Answer: Decodable {
      let message: String
      let said: String
      let isAll: Bool
      let instead: String?
    }
    let now: String
    let calls: [Call]
    let cancels: [Request]
    let answers: [Answer]
    let requests: [Request]
    let misread: [Misread]
    let expressions: [Expression]
  }

  @Test func resultsAreThoseOfPython() async throws {
    let recorded = try Records.decode(Recorded.self, "functions.json")
    let zone = try #require(TimeZone(secondsFromGMT: 3600))
    let now = try #require(ISO8601DateFormatter().date(from: recorded.now + "+01:00"))
    let functions = try ToolFunctions.standard(now: { now }, zone: zone, seconds: 600)
    #expect(recorded.calls.count > 100 && functions.names.count == 23)
    for call in recorded.calls {
      let arguments = String(decoding: try JSONEncoder().encode(call.arguments), as: UTF8.self)
      let outcome = await functions.call(call.name, arguments)
      #expect(outcome == .init(text: call.text, failed: call.failed), "\(call.name) \(arguments)")
    }
    let assistant = try #require(functions.assistant)
    for one in recorded.cancels {
      let asked = await assistant.instead(one.message, one.function, one.arguments ?? "{}")
      #expect(asked == one.instead, "\(one.message)")
    }
  }

  @Test func twoRequestsAreToldApartAsInPython() throws {
    let recorded = try Records.decode(Recorded.self, "functions.json")
    let functions = try ToolFunctions.standard()
    #expect(Set(recorded.requests.map { $0.instead == nil }).count == 2)
    for one in recorded.requests {
      let arguments = one.arguments ?? "{}"
      #expect(functions.instead(one.message, one.function, arguments) == one.instead, "\(one.message)")
      #expect(ToolFunctions().instead(one.message, one.function, arguments) == nil)
    }
  }

  @Test func whatIsMisreadIsToldAsInPython() throws {
    let recorded = try Records.decode(Recorded.self, "functions.json")
    let functions = try ToolFunctions.standard()
    for one in recorded.misread {
      #expect(Misread.insteadOfAnswer(one.message) == one.said, "\(one.message)")
    }
    for one in recorded.answers {
      let (message, said) = (one.message, one.said)
      #expect(functions.checkAnswer(message)(said, one.isAll) == one.instead, "\(message): \(said)")
      #expect(ToolFunctions().checkAnswer(message)(said, one.isAll) == nil)
    }
    #expect(
      functions.instead("set a timer", "set_timer", #"{"duration":"ae}}{"}"#)?.contains("understand") == true)
    #expect(functions.instead("a é", "set_reminder", #"{"text":"\u00e9"}"#) == nil)
    #expect(functions.instead("2^10", "calculate", #"{"expression":"2(10"}"#) == "2^10 is 1024.")
  }

  @Test func calculationsAreThoseOfPython() throws {
    let recorded = try Records.decode(Recorded.self, "functions.json")
    #expect(recorded.expressions.count > 50)
    for one in recorded.expressions {
      #expect((try? Calculator.calculate(one.expression)) == one.value, "\(one.expression)")
    }
    let nested = String(repeating: "(", count: 5000) + "1" + String(repeating: ")", count: 5000)
    for deep in [nested, String(repeating: "-", count: 5000) + "1"] {
      #expect(throws: ToolError.self) { try Calculator.calculate(deep) }
    }
  }

  /// What is remembered is the same text as Python's, and comes due as there.
  @Test func whatIsRememberedIsThatOfPython() async throws {
    struct Record: Decodable {
      struct Moment: Decodable {
        let now: String
        let due: [String]
        let memory: String
      }
      let now: String
      let calls: [Recorded.Call.Asked]
      let memory: String
      let later: [Moment]
    }
    let record = try Records.decode(Record.self, "memory.json")
    let clock = WallClock(try #require(Moment(iso: record.now)))
    let assistant = Assistant { clock.now }
    for call in record.calls { _ = try await assistant.call(call.name) { call.arguments[$0] ?? "" } }
    func check(_ kept: AssistantMemory, _ memory: String) throws {
      let recalled = try AssistantMemory(memory)
      let (ours, theirs) = (try JSONText(recalled.text), try JSONText(memory))
      #expect(recalled == kept && ours == theirs)
    }
    try check(await assistant.kept, record.memory)
    for later in record.later.dropLast() {
      clock.now = try #require(Moment(iso: later.now))
      #expect(await assistant.due() == later.due)
      try check(await assistant.kept, later.memory)
    }
    await assistant.recall(try AssistantMemory(record.memory))
    #expect(await assistant.due() == record.later.last?.due)
    try check(await assistant.kept, record.later.last!.memory)
    let nothing = try AssistantMemory("")
    #expect(nothing == AssistantMemory() && nothing.text == "")
    for bad in [
      "[]", "{", #"{"timers": [["a"]]}"#, #"{"timers": [["a", null]]}"#, #"{"alarms": [["", "soon"]]}"#,
      #"{"reminders": [[1, null]]}"#, #"{"lists": {"a": [1]}}"#, #"{"lists": []}"#, #"{"timers": 1}"#,
      #"{"alarms": [["", "2026-02-30T00:00:00"]]}"#,
      #"{"reminders": [\#(Array(repeating: #"["a", null]"#, count: 101).joined(separator: ","))]}"#,
    ] {
      #expect(throws: AssistantMemory.Malformed.self) { try AssistantMemory(bad) }
    }
  }

  private final class WallClock: @unchecked Sendable {
    private let lock = NSLock()
    private var moment: Moment
    init(_ moment: Moment) { self.moment = moment }
    var now: Moment {
      get { lock.withLock { moment } }
      set { lock.withLock { moment = newValue } }
    }
  }

  @Test func bigIntegers() throws {
    var random = SplitMix64(seed: 7)
    for _ in 0..<300 {
      func number() -> BigInteger {
        let digits = (0..<Int.random(in: 1...90, using: &random)).map { _ in
          String(Int.random(in: 0...9, using: &random))
        }
        let value = BigInteger(digits: digits.joined())!
        return Bool.random(using: &random) ? value : -value
      }
      let (a, b) = (number(), number())
      guard !b.isZero else { continue }
      let (q, r) = a.dividedDown(by: b)
      #expect(q * b + r == a && r.magnitude < b.magnitude && (r.isZero || r.isNegative == b.isNegative))
      #expect((a + b) - b == a && a * b == b * a)
      let root = a.magnitude.squareRoot
      #expect(root * root <= a.magnitude && a.magnitude < (root + .one) * (root + .one))
      #expect(BigInteger(digits: a.magnitude.text) == a.magnitude)
    }
    // The rare steps of the long division.
    let base = BigInteger(2).raised(to: 32)
    let hard = [
      (base.raised(to: 4) - .one, base.raised(to: 2) - .one),
      (base.raised(to: 3) * BigInteger(0x7FFF_FFFF) + .one, base * BigInteger(0x8000_0000) + .one),
      (BigInteger(0x8000_0000) * base.raised(to: 3), BigInteger(0x8000_0000) * base + base - .one),
    ]
    for (a, b) in hard {
      let (q, r) = a.dividedDown(by: b)
      #expect(q * b + r == a && r < b)
    }
  }
}

#if canImport(CoreML) && os(Linux)
  import CoreML

  /// The model is a stand-in that says the recorded tokens: what a real one says is not tested here.
  @Suite struct ToolChatTests {
    func load(
      _ model: HashModel, _ body: @Sendable (ParaRNNModel) async throws -> Void
    ) async throws {
      let fake = try FakeFolder(tokenizer: String(contentsOf: Records.url("tokenizer.json"), encoding: .utf8))
      try await MLModel.$behaviour.withValue(model.behaviour) {
        let model = try await ParaRNNModel(contentsOf: fake.package, cache: fake.cache)
        await model.prefillLoaded()
        withExtendedLifetime(fake) {}
        try await body(model)
      }
    }

    /// A model that says what stands at each position of these turns, one after another.
    func model(_ turns: [Records.Turn], inGraph: Bool = true, chunk: Int? = 4) throws -> HashModel {
      var model = HashModel(inGraph: inGraph, chunk: chunk, vocabulary: 278, ends: [257])
      model.script = turns.flatMap { $0.read + [257] }
      return model
    }

    func turn(_ name: String) throws -> Records.Turn {
      try #require(try Records.turns().turns.first { $0.name == name })
    }

    @Test(arguments: [true, false], [4, nil] as [Int?])
    func aConversation(inGraph: Bool, chunk: Int?) async throws {
      let names = ["two calls", "no call at all", "an error as text", "commands inside a call"]
      let turns = try names.map(turn)
      let fake = try model(turns, inGraph: inGraph, chunk: chunk)
      try await load(fake) { (model) async throws in
        #expect(model.usesTools)
        let chat = model.chat(functions: try Records.functions())
        for turn in turns.dropLast() {
          var events: [Records.Event] = []
          let stream = chat.events(respondingTo: turn.message)
          for try await event in stream { events.append(.init(event)) }
          #expect(events == turn.events)
          #expect(await stream.statistics?.stopReason == .endOfText)
          #expect(await stream.statistics?.generatedTokens == turn.made.count)
        }
        #expect(await chat.messages.last?.text == "no such day")
        // Taken back, and answered again; then a turn as plain text.
        #expect(try await chat.undo() == "x")
        let saved = try await chat.save()
        for chat in [chat, try await model.chat(restoring: saved, functions: try Records.functions())] {
          var text = ""
          for try await piece in chat.respond(to: turns[2].message) { text += piece }
          #expect(text == "no such day")
          text = ""
          for try await piece in chat.respond(to: turns[3].message) { text += piece }
          #expect(text == "4")
        }
        // Every token was read once: whole chunks, then one by one.
        #expect(chunk == nil || fake.calls.all.contains(4))
      }
    }

    @Test func leftInTheMiddle() async throws {
      let first = try turn("two calls")
      var fake = try model([first])
      let second = try turn("no call at all")
      // After the fifth event: what has been read of the turn, its end, and the next turn.
      let read = first.events[4].tokens
      fake.script = Array(first.read.prefix(read)) + [257] + second.read + [257]
      try await load(fake) { (model) async throws in
        let chat = model.chat(functions: try Records.functions())
        var events = 0
        for try await _ in chat.events(respondingTo: first.message) {
          events += 1
          if events == 5 { break }
        }
        var text = ""
        for try await piece in chat.respond(to: second.message) { text += piece }
        #expect(text == "I can do sums.")
        #expect(await chat.messages.map(\.text) == [first.message, "", second.message, "I can do sums."])
      }
    }

    /// The failed turn's question and text are read again, as the protocol writes them, before the next one.
    @Test func aFailedPredictionKeepsTheText() async throws {
      let tools = try Records.tools()
      let said = [ChatMessage(.user, "hé"), ChatMessage(.assistant, "I can")]
      let again = tools.render(turns: said)
      let (answer, end): (Int, Int) = (tools[.answer], tools[.end])
      var expected = tools.render(message: "hé")
      expected.append(answer)
      expected += tools.encode("I can")
      expected.append(end)
      #expect(again == expected)
      var script = Array(again.dropLast())
      script += tools.encode("?")
      script += tools.render(message: "and now?")
      script.append(answer)
      script += tools.encode("ok")
      script.append(end)
      let fake = HashModel(
        chunk: nil, vocabulary: 278, ends: [257], script: script, failsAt: again.count - 1, failsOnce: true)
      try await load(fake) { (model) async throws in
        let chat = model.chat()
        let error = await failure { for try await _ in chat.respond(to: "hé") {} }
        #expect(error == .predictionFailed(reason: "it failed as asked"))
        #expect(await chat.messages == said)
        let before = fake.calls.all.count
        var answer = ""
        for try await piece in chat.respond(to: "and now?") { answer += piece }
        #expect(answer == "ok")
        #expect(fake.calls.all.count - before == fake.script.count - 1)
      }
    }

    final class MovedClock: @unchecked Sendable {
      private let lock = NSLock()
      private var date: Date
      init(_ date: Date) { self.date = date }
      var now: Date { lock.withLock { date } }
      func pass(_ seconds: Double) { lock.withLock { date += seconds } }
    }

    /// Saved, taken back and branched with the conversation.
    @Test func whatFunctionsRemember() async throws {
      let tools = try Records.tools()
      let clock = MovedClock(try #require(ISO8601DateFormatter().date(from: "2026-06-01T12:00:00Z")))
      let functions = try ToolFunctions.standard(
        now: { clock.now }, zone: try #require(TimeZone(secondsFromGMT: 0)), seconds: 600)
      var script: [Int] = []
      func turn(_ message: String, _ name: String, _ arguments: String, _ result: String) {
        script += tools.render(message: message)
        script.append(tools[.call])
        script += tools.encode(#"{"name":"\#(name)","arguments":\#(arguments)}"#)
        script.append(tools[.result])
        script += tools.render(result: result)
        script.append(tools[.answer])
        script.append(tools[.end])
      }
      turn("5 minutes", "set_timer", #"{"duration":"5 minutes"}"#, "Timer set for 5 minutes.")
      turn("milk", "add_to_list", #"{"items":"milk"}"#, "Added milk to your to-do list.")
      turn("s", "show_list", "{}", "To-do list: milk.")
      try await load(HashModel(vocabulary: 278, ends: [257], script: script)) { (model) async throws in
        func say(_ chat: ParaRNNChat, _ message: String) async throws -> String {
          var answer = ""
          for try await piece in chat.respond(to: message) { answer += piece }
          return answer
        }
        let chat = model.chat(functions: functions)
        #expect(try await say(chat, "5 minutes") == "Timer set for 5 minutes.")
        #expect(try await say(chat, "milk") == "Added milk to your to-do list.")
        let saved = try await chat.save()
        let text = #"\"lists\":{\"to-do\":[\"milk\"]}"#
        #expect(String(decoding: saved, as: UTF8.self).contains(text))
        let branch = try await chat.branch()
        let restored = try await model.chat(restoring: saved, functions: functions)
        // With no functions it keeps what it cannot use.
        let idle = try await model.chat(
          restoring: try await model.chat(restoring: saved).save(), functions: functions)
        for other in [chat, branch, restored, idle] {
          #expect(try await say(other, "s") == "To-do list: milk.")
        }
        #expect(try await branch.undo() == "s")
        #expect(try await branch.undo() == "milk")
        #expect(try await !String(decoding: branch.save(), as: UTF8.self).contains("milk"))
        #expect(try await String(decoding: chat.save(), as: UTF8.self).contains("milk"))
        let ringing = try await chat.branch()
        let alarm = Task { await ringing.alarms(every: .milliseconds(2)).first { _ in true } }
        // Another chat with the same functions knows of none of it.
        clock.pass(301)
        #expect(await alarm.value == "The timer is over.")
        #expect(await model.chat(functions: functions).due().isEmpty)
        for other in [chat, branch] {
          #expect(await other.due() == ["The timer is over."])
          #expect(await other.due().isEmpty)
        }
        // Told once, also where a memory is recalled that still has it.
        #expect(try await chat.undo() == "s")
        #expect(try await chat.undo() == "milk")
        #expect(await chat.due().isEmpty)
      }
    }

    @Test func cancelledAtAnyMoment() async throws {
      // The pointer moves to the right for ever.
      let fake = HashModel(chunk: 4, vocabulary: 278, script: [263])
      try await load(fake) { (model) async throws in
        let chat = model.chat()
        for round in 0..<5 {
          let before = fake.calls.all.count
          let task = Task { for try await _ in chat.respond(to: String(repeating: "ab", count: 40)) {} }
          while fake.calls.all.count < before + 10 * round { try await Task.sleep(for: .milliseconds(1)) }
          task.cancel()
          await #expect(throws: CancellationError.self) { try await task.value }
        }
        #expect(try await chat.save().count > 0)
      }
    }

    @Test func learnedPositions() async throws {
      var fake = HashModel(vocabulary: 278, positions: 9)
      fake.script = [97]
      try await load(fake) { (model) async throws in
        let chat = model.chat()
        let stream = chat.events(respondingTo: "abc")
        var last: ToolEvent.Kind?
        for try await event in stream { last = event.kind }
        #expect(last == .finish(.init(reason: .steps, made: 4, calls: 0)))
        #expect(await stream.statistics?.stopReason == .steps)
        let error = await failure { for try await _ in chat.respond(to: "a") {} }
        #expect(error == .noRoom(taken: 13, positions: 9))
      }
    }

    @Test func modelsAndQuestionsThatDoNotFit() async throws {
      try await load(HashModel(vocabulary: 278)) { (model) async throws in
        #expect(await failure { for try await _ in model.chat().respond(to: "") {} } == .emptyPrompt)
        guard
          case .toolsMismatch = await failure({
            for try await _ in model.chat(system: "S").respond(to: "a") {}
          })
        else {
          Issue.record("a system prompt was taken")
          return
        }
      }
      try await load(HashModel(vocabulary: 278, gives: "token")) { (model) async throws in
        #expect(await failure { for try await _ in model.chat().respond(to: "a") {} } == .toolsNeedLogits)
      }
      try await HashModel().load { (model) async throws in
        #expect(!model.usesTools)
        guard
          case .toolsMismatch = await failure({ for try await _ in model.chat().events(respondingTo: "a") {} }
          )
        else {
          Issue.record("a model without tools was taken")
          return
        }
      }
    }
  }
#endif
