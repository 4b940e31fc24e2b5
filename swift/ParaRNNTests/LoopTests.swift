#if canImport(CoreML) && os(Linux)
  import CoreML
  import Foundation
  import Testing

  @testable import ParaRNN

  func tokens(_ stream: TextStream) async throws -> [Int] {
    var text: [Int] = []
    for try await piece in stream { text += piece.unicodeScalars.map { Int($0.value) } }
    return text
  }

  /// Tokens below 128, each a character of its own.
  func ascii(_ model: HashModel = .init()) -> HashModel {
    var model = model
    model.vocabulary = 128
    return model
  }

  struct ASCII: ParaRNNTokenizer {
    func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] { text.utf8.map(Int.init) }
    func decode(_ tokens: [Int]) -> String { String(decoding: tokens.map(UInt8.init), as: UTF8.self) }
  }

  extension HashModel {
    func loadASCII(_ body: @Sendable (ParaRNNModel) async throws -> Void) async throws {
      let fake = try FakeFolder()
      try await MLModel.$behaviour.withValue(ascii(self).behaviour) {
        let model = try await ParaRNNModel(contentsOf: fake.package, tokenizer: ASCII(), cache: fake.cache)
        await model.prefillLoaded()
        withExtendedLifetime(fake) {}
        try await body(model)
      }
    }
  }

  @Suite struct GenerationTests {
    @Test(arguments: [true, false], [4, 1, nil] as [Int?])
    func chunkBoundaries(inGraph: Bool, chunk: Int?) async throws {
      let fake = ascii(HashModel(inGraph: inGraph, chunk: chunk))
      try await fake.loadASCII { (model) async throws in
        for length in 1...13 {
          let prompt = (0..<length).map { 65 + $0 }
          let before = fake.calls.all.count
          let ours = try await tokens(model.generate(tokens: prompt, options: .init(maxTokens: 6)))
          #expect(ours == fake.continuation(of: prompt, count: 6), "\(length) tokens")
          let whole = length / (chunk ?? 1)
          let expected =
            [Int](repeating: chunk ?? 1, count: whole) + [Int](repeating: 1, count: length % (chunk ?? 1) + 5)
          #expect(Array(fake.calls.all[before...]) == expected)
        }
      }
    }

    @Test func aPackageThatGivesTokensOnly() async throws {
      let fake = HashModel(gives: "token")
      try await fake.loadASCII { (model) async throws in
        let ours = try await tokens(
          model.generate(tokens: [65, 66, 67, 68, 69], options: .init(maxTokens: 9)))
        #expect(ours == ascii(fake).continuation(of: [65, 66, 67, 68, 69], count: 9))
        for options: GenerationOptions in [.init(temperature: 1), .init(repetitionPenalty: 2)] {
          let error = await failure { _ = try await tokens(model.generate("ab", options: options)) }
          #expect(error == .samplingNeedsLogits)
        }
      }
    }

    @Test func endsAtTheEndOfTextToken() async throws {
      var fake = HashModel(ends: [10])
      fake.script = [65, 66, 67, 10, 68]  // by position
      try await fake.load { (model) async throws in
        let stream = model.generate("zz", options: .init(maxTokens: 50))
        #expect(try await tokens(stream) == [67])
        let statistics = await stream.statistics
        #expect(statistics?.stopReason == .endOfText)
        #expect(statistics?.generatedTokens == 2)
      }
    }

    @Test func noTokensWanted() async throws {
      try await HashModel().load { (model) async throws in
        let stream = model.generate("abc", options: .init(maxTokens: 0))
        #expect(try await tokens(stream).isEmpty)
        #expect(await stream.statistics?.stopReason == .maxTokens)
        #expect(await stream.statistics?.promptTokens == 3)
      }
    }

    @Test func learnedPositionsEnd() async throws {
      let fake = HashModel(chunk: 3, positions: 8)
      try await fake.loadASCII { (model) async throws in
        let stream = model.generate("abcde", options: .init(maxTokens: 50))
        let ours = try await tokens(stream)
        // Five positions are read and three more, and the last of these says a fourth token.
        #expect(ours == ascii(fake).continuation(of: Array("abcde".utf8.map(Int.init)), count: 4))
        #expect(await stream.statistics?.stopReason == .positions)
        let error = await failure { _ = try await tokens(model.generate("abcdefgh")) }
        #expect(error == .noRoom(taken: 8, positions: 8))
      }
    }

    @Test func textComesInWholeCharacters() async throws {
      let said = "né 日本 👩‍👩‍👧 العربية e\u{301}!"
      let bytes = said.utf8.map(Int.init)
      var fake = HashModel(chunk: 4)
      fake.script = [0] + bytes
      try await fake.load { (model) async throws in
        var pieces: [String] = []
        for try await piece in model.generate("x", options: .init(maxTokens: bytes.count)) {
          pieces.append(piece)
        }
        #expect(Array(pieces.joined().utf8) == Array(said.utf8))
        #expect(pieces == said.unicodeScalars.map { String($0) })
        // Cut off within a character: what is there of it comes at the end.
        var cut = ""
        for try await piece in model.generate("x", options: .init(maxTokens: 2)) { cut += piece }
        #expect(cut == "n\u{FFFD}")
      }
    }

    @Test func textsThatEndAnAnswer() async throws {
      let said = "one, two, three"
      var fake = HashModel(chunk: 4)
      fake.script = [0] + said.utf8.map(Int.init)
      try await fake.load { (model) async throws in
        let cases: [([String], String, GenerationStatistics.StopReason)] = [
          ([", t"], "one", .stopText), (["two", "o,"], "one, ", .stopText), (["three!"], said, .maxTokens),
          (["e"], "on", .stopText), (["ee"], "one, two, thr", .stopText),
          (["one, two, threes"], said, .maxTokens),
        ]
        for (stop, text, reason) in cases {
          var answer = ""
          let options = GenerationOptions(maxTokens: said.utf8.count, stop: stop)
          let stream = model.generate("x", options: options)
          for try await piece in stream { answer += piece }
          #expect(answer == text, "\(stop)")
          #expect(await stream.statistics?.stopReason == reason)
        }
        guard
          case .invalidOption = await failure({
            _ = try await tokens(model.generate("a", options: .init(stop: [""])))
          })
        else {
          Issue.record("an empty text was taken")
          return
        }
      }
    }

    @Test func seededSamplingRepeats() async throws {
      try await HashModel().loadASCII { (model) async throws in
        func sample(_ seed: UInt64?) async throws -> [Int] {
          try await tokens(model.generate("ab", options: .init(maxTokens: 30, temperature: 4, seed: seed)))
        }
        #expect(try await sample(5) == sample(5))
        #expect(try await sample(5) != sample(6))
      }
    }

    @Test func promptsThatCannotBe() async throws {
      try await HashModel(vocabulary: 256).load { (model) async throws in
        #expect(await failure { _ = try await tokens(model.generate("")) } == .emptyPrompt)
        for bad in [-1, 256] {
          let error = await failure { _ = try await tokens(model.generate(tokens: [1, bad])) }
          #expect(error == .unknownToken(bad, vocabularySize: 256))
        }
        let error = await failure { _ = try await tokens(model.generate("a", options: .init(topP: 0))) }
        guard case .invalidOption = error else {
          Issue.record("\(String(describing: error))")
          return
        }
      }
    }

    @Test func aFailedPrediction() async throws {
      try await HashModel(failsAt: 6).loadASCII { (model) async throws in
        var pieces = 0
        let error = await failure {
          for try await _ in model.generate("abcd", options: .init(maxTokens: 9)) { pieces += 1 }
        }
        #expect(error == .predictionFailed(reason: "it failed as asked"))
        #expect(pieces == 3)
      }
    }

    @Test(
      arguments: [(.nan, "logits"), (.infinity, "logits"), (-1, "token"), (128, "token")]
        as [(Double, String)])
    func anAnswerThatIsNone(broken: Double, gives: String) async throws {
      try await HashModel(gives: gives, broken: broken).loadASCII { (model) async throws in
        let error = await failure { _ = try await tokens(model.generate("abcd")) }
        guard case .predictionFailed = error else {
          Issue.record("\(String(describing: error))")
          return
        }
      }
    }

    @Test func leavingTheLoopStopsTheModel() async throws {
      let fake = HashModel(chunk: nil)
      try await fake.loadASCII { (model) async throws in
        let stream = model.generate("ab", options: .init(maxTokens: 1_000_000))
        for try await _ in stream { break }
        try await Task.sleep(for: .milliseconds(50))
        #expect(fake.calls.all.count == 2)  // the prompt, and nothing after the first piece
      }
    }

    @Test func cancellingTheTaskStopsTheModel() async throws {
      let fake = HashModel(chunk: 4)
      try await fake.loadASCII { (model) async throws in
        for prompt in ["ab", String(repeating: "ab", count: 100_000)] {  // while generating, while reading
          let before = fake.calls.all.count
          let task = Task {
            for try await _ in model.generate(prompt, options: .init(maxTokens: .max)) {}
          }
          while fake.calls.all.count < before + 5 { try await Task.sleep(for: .milliseconds(1)) }
          task.cancel()
          await #expect(throws: CancellationError.self) { try await task.value }
          let after = fake.calls.all.count
          try await Task.sleep(for: .milliseconds(20))
          #expect(fake.calls.all.count == after)
          #expect(after - before < 50_000)
        }
      }
    }

    @Test func aStreamIsReadByOneReader() async throws {
      try await HashModel().loadASCII { (model) async throws in
        let stream = model.generate("ab", options: .init(maxTokens: 5))
        #expect(try await tokens(stream).count == 5)
        #expect(try await tokens(stream).isEmpty)
      }
    }

    @Test @MainActor func readByTheMainActor() async throws {
      let fake = ascii()
      let folder = try FakeFolder()
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        let model = try await ParaRNNModel(
          contentsOf: folder.package, tokenizer: ASCII(), cache: folder.cache)
        var text = ""
        for try await piece in model.generate("ab", options: .init(maxTokens: 3)) { text += piece }
        #expect(text.utf8.map(Int.init) == fake.continuation(of: [97, 98], count: 3))
      }
    }
  }

  @Suite struct ChatTests {
    let options = GenerationOptions(maxTokens: 5)

    func said(_ chat: ParaRNNChat, _ text: String, _ count: Int = 5) async throws -> String {
      var answer = ""
      for try await piece in chat.respond(to: text, options: .init(maxTokens: count)) { answer += piece }
      return answer
    }

    func ids(_ text: String) -> [Int] { text.utf8.map(Int.init) }

    @Test(arguments: [true, false]) func everyTurnGoesOnFromTheLast(inGraph: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph))
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(system: "Be brief.", format: .plain)
        var all = ids("Be brief.\n")
        var messages = [ChatMessage(.system, "Be brief.")]
        for text in ["Hello", "a", "How are you?"] {
          let before = fake.calls.all.reduce(0, +)
          let answer = try await said(chat, text)
          all += ids(text)
          #expect(ids(answer) == fake.continuation(of: all, count: 5))
          all += ids(answer)
          messages += [ChatMessage(.user, text), ChatMessage(.assistant, answer)]
          #expect(await chat.messages == messages)
          // Only this turn was read: what was said before it is not read again.
          let read = fake.calls.all.reduce(0, +) - before
          #expect(read <= 10 + text.utf8.count + 5)
        }
      }
    }

    @Test func chatML() async throws {
      let end = 1  // stands for <|im_end|>
      struct Marks: ParaRNNTokenizer {
        func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] {
          text.replacingOccurrences(of: "<|im_end|>", with: "\u{1}")
            .replacingOccurrences(of: "<|im_start|>", with: "\u{2}").utf8.map(Int.init)
        }
        func decode(_ tokens: [Int]) -> String { String(decoding: tokens.map(UInt8.init), as: UTF8.self) }
      }
      // At each position where an answer may begin the model says one word and ends.
      var fake = ascii(HashModel(chunk: 4, ends: [end]))
      let first = "\u{2}system\nS\u{1}\n\u{2}user\nA\u{1}\n\u{2}assistant\n"
      let second = "\n\u{2}user\nB\u{1}\n\u{2}assistant\n"
      var script = [Int](repeating: 63, count: first.utf8.count) + [88, end]
      script += [Int](repeating: 63, count: second.utf8.count) + [89, end]
      fake.script = script
      let folder = try FakeFolder()
      try folder.folder.write("{{ '<|im_start|>' }}", to: "chat_template.jinja")
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        let model = try await ParaRNNModel(
          contentsOf: folder.package, tokenizer: Marks(), cache: folder.cache)
        #expect(model.chatFormat == .chatML)
        let chat = model.chat(system: "S")
        #expect(try await said(chat, "A", 9) == "X")
        // The model's own end of text is not read twice: else the positions would be off by one.
        #expect(try await said(chat, "B", 9) == "Y")
        #expect(fake.calls.all.reduce(0, +) == first.utf8.count + 2 + second.utf8.count + 1)
      }
    }

    @Test func formatsOfFolders() throws {
      let folder = try TemporaryFolder()
      #expect(ChatFormat.found(in: folder.url) == .plain)
      try folder.write(#"{"chat_template": "[INST]"}"#, to: "tokenizer_config.json")
      #expect(ChatFormat.found(in: folder.url) == nil)
      try folder.write(
        #"{"chat_template": [{"name": "default", "template": "<|im_start|>"}]}"#, to: "tokenizer_config.json")
      #expect(ChatFormat.found(in: folder.url) == .chatML)
      try folder.write("nothing known", to: "chat_template.jinja")
      #expect(ChatFormat.found(in: folder.url) == nil)
    }

    @Test func anUnknownChatTemplate() async throws {
      let folder = try FakeFolder()
      try folder.folder.write("[INST]", to: "chat_template.jinja")
      try await MLModel.$behaviour.withValue(HashModel().behaviour) {
        let model = try await ParaRNNModel(
          contentsOf: folder.package, tokenizer: ByteTokenizer(), cache: folder.cache)
        #expect(await failure { _ = try await said(model.chat(), "a") } == .unknownChatTemplate)
        _ = try await said(model.chat(format: .plain), "a")
      }
    }

    @Test(arguments: [true, false]) func twoChatsAtOnce(inGraph: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph))
      try await fake.loadASCII { (model) async throws in
        let conversations = ["first", "the second one", "3", "and a fourth"]
        try await withThrowingTaskGroup(of: Void.self) { group in
          for name in conversations {
            group.addTask {
              let chat = model.chat(format: .plain)
              var all: [Int] = []
              for turn in 0..<8 {
                let text = "\(name) \(turn)"
                let answer = try await said(chat, text)
                all += ids(text)
                #expect(ids(answer) == fake.continuation(of: all, count: 5), "\(text)")
                all += ids(answer)
              }
            }
          }
          try await group.waitForAll()
        }
      }
    }

    @Test func theChatFormatOfThePackage() async throws {
      func model(beforeSystem: String?) -> HashModel {
        var model = ascii()
        model.changes = {
          $0["chat_format"] = [
            "beginning": "^[", "before_system": beforeSystem as Any? ?? NSNull(),
            "after_system": beforeSystem.map { _ in "}[" } as Any? ?? NSNull(), "after_user": "]",
            "before_answer": "", "after_answer": ";[", "trimmed": ["user"],
          ]
        }
        return model
      }
      let fake = model(beforeSystem: "^{")
      try await fake.loadASCII { (model) async throws in
        for (system, start) in [(nil, "^["), ("S", "^{S}[")] as [(String?, String)] {
          let chat = model.chat(system: system)
          let first = try await said(chat, " A\n")
          #expect(ids(first) == fake.continuation(of: ids(start + "A]"), count: 5))
          let second = try await said(chat, "B ")
          #expect(ids(second) == fake.continuation(of: ids(start + "A]" + first + ";[B]"), count: 5))
        }
      }
      try await model(beforeSystem: nil).loadASCII { (model) async throws in
        #expect(try await !said(model.chat(), "A").isEmpty)
        guard case .wrongMessages = await failure({ _ = try await said(model.chat(system: "S"), "A") }) else {
          Issue.record("a system prompt was taken")
          return
        }
      }
    }

    @Test func messagesFromElsewhere() async throws {
      let fake = ascii()
      try await fake.loadASCII { (model) async throws in
        let format = ChatFormat(
          beforeSystem: "<", afterSystem: ">", beforeUser: "[", afterUser: "]", afterAnswer: ";")
        let messages = [ChatMessage(.system, "S"), .init(.user, "A"), .init(.assistant, "B")]
        let chat = try model.chat(messages: messages, format: format)
        #expect(await !chat.isResponding)
        let stream = chat.respond(to: "C", options: .init(maxTokens: 5))
        var answer = ""
        for try await piece in stream {
          answer += piece
          if answer.utf8.count < 5 { #expect(await chat.isResponding) }
        }
        #expect(await !chat.isResponding)
        #expect(ids(answer) == fake.continuation(of: ids("<S>[A]B;[C]"), count: 5))
        #expect(await chat.messages == messages + [.init(.user, "C"), .init(.assistant, answer)])
        #expect(try await chat.undo() == "C")
        #expect(await chat.messages == messages)
        for wrong in [[messages[2]], [messages[1]], [messages[1], messages[1]], messages + messages] {
          guard case .wrongMessages = await failure({ _ = try model.chat(messages: wrong) }) else {
            Issue.record("\(wrong)")
            continue
          }
        }
      }
    }

    @Test(arguments: [true, false]) func saveAndRestore(inGraph: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph))
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        let fresh = try await chat.save()  // before the first word
        let first = try await said(chat, "one")
        let saved = try await chat.save()
        let second = try await said(chat, "two")
        let restored = try await model.chat(restoring: saved)
        #expect(await restored.messages.map(\.text) == ["one", first])
        #expect(try await said(restored, "two") == second)
        #expect(try await restored.save() == chat.save())
        let empty = try await model.chat(restoring: fresh)
        #expect(try await said(empty, "one") == first)
        // The memory of a conversation has one size, however long it is.
        for _ in 0..<20 { _ = try await said(chat, "more") }
        let text = await chat.messages.reduce(0) { $0 + $1.text.utf8.count + 60 }
        #expect(try await chat.save().count < saved.count + text)
        #expect(await restored.undoable == 1)
      }
    }

    @Test func savedTalksThatAreNone() async throws {
      let fake = ascii()
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        _ = try await said(chat, "one")
        let saved = try await chat.save()
        for bad in [
          Data(), Data("hello".utf8), saved.prefix(20), saved.dropLast(), saved + Data([0]),
          saved.dropFirst(),
        ] {
          guard case .notASavedChat = await failure({ _ = try await model.chat(restoring: bad) }) else {
            Issue.record("\(bad.count) bytes")
            continue
          }
        }
        for i in stride(from: 0, to: saved.count, by: 7) {  // damaged ones never crash
          var bad = saved
          bad[bad.startIndex + i] ^= 0x7D
          _ = await failure { _ = try await model.chat(restoring: bad) }
        }
        let state = model.settings.states[0]
        let broken = StateTensor(form: state, bytes: Array(repeating: 0x7E, count: state.byteCount))
        let nan = SavedChat(messages: [], position: 1, pending: nil, tensors: [broken])
          .data(fingerprint: model.fingerprint)
        let far = SavedChat(messages: [], position: .max, pending: nil, tensors: [.init(zeros: state)])
          .data(fingerprint: model.fingerprint)
        // A right sum before a description that is no JSON, such as JSONDecoder on Linux stops at.
        let text = Data("{\"mo\u{0E}del\": 1}".utf8)
        let rest = withUnsafeBytes(of: UInt64(text.count).littleEndian) { Data($0) } + text
        var sum = Fingerprint()
        sum.add(rest)
        let forged = Data("ParaRNN chat 1\n\(sum.hexadecimal)".utf8) + rest
        for bad in [nan, far, forged] {
          guard case .notASavedChat = await failure({ _ = try await model.chat(restoring: bad) }) else {
            Issue.record("\(bad.count) bytes")
            continue
          }
        }
      }
      var other = fake
      other.changes = { $0["parameters"] = 7 }
      let saved = Mutex()
      try await fake.loadASCII { model in
        let chat = model.chat()
        for try await _ in chat.respond(to: "Hi", options: .init(maxTokens: 3)) {}
        saved.data = try await chat.save()
        #expect(try await ParaRNNChat.messages(in: saved.data) == chat.messages)
      }
      // The same weights, exported again by another version: neither changes what the memory means.
      var again = fake
      again.changes = {
        $0["version"] = "9.9"
        $0["iterations"] = 7
        $0["eos_token_id"] = [3]
      }
      try await again.loadASCII { model in
        let restored = try await model.chat(restoring: saved.data)
        #expect(try await ParaRNNChat.messages(in: saved.data) == restored.messages)
      }
      #expect(throws: ParaRNNError.self) { try ParaRNNChat.messages(in: Data("no".utf8)) }
      try await other.loadASCII { (model) async throws in
        #expect(await failure { _ = try await model.chat(restoring: saved.data) } == .savedWithAnotherModel)
        #expect(try ParaRNNChat.messages(in: saved.data).first?.text == "Hi")
      }
    }

    final class Mutex: @unchecked Sendable { var data = Data() }

    @Test(arguments: [true, false]) func undo(inGraph: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph))
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(system: "S", format: .plain)
        #expect(await failure { try await chat.undo() } == .nothingToUndo)
        let first = try await said(chat, "one")
        let second = try await said(chat, "two")
        #expect(await chat.undoable == 2)
        #expect(try await chat.undo() == "two")
        #expect(await chat.messages.map(\.text) == ["S", "one", first])
        #expect(try await said(chat, "two") == second)
        #expect(try await chat.undo() == "two")
        #expect(try await chat.undo() == "one")
        #expect(try await said(chat, "one") == first)
        for i in 0..<ParaRNNChat.undoLimit + 3 { _ = try await said(chat, "\(i)", 1) }
        #expect(await chat.undoable == ParaRNNChat.undoLimit)
      }
    }

    @Test(arguments: [true, false]) func whatWasSaidBeforeAStopIsKept(inGraph: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph))
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        var answer = ""
        for try await piece in chat.respond(to: "one", options: .init(maxTokens: 99)) {
          answer += piece
          if answer.utf8.count == 3 { break }
        }
        #expect(await chat.messages.map(\.text) == ["one", answer])
        let second = try await said(chat, "two")
        #expect(ids(second) == fake.continuation(of: ids("one" + answer + "two"), count: 5))
        // By cancelling, at whichever moment.
        for round in 0..<10 {
          let task = Task { try await said(chat, "go", 1_000_000) }
          let before = fake.calls.all.count
          while fake.calls.all.count < before + 3 * round { try await Task.sleep(for: .milliseconds(1)) }
          task.cancel()
          await #expect(throws: CancellationError.self) { try await task.value }
          _ = try await said(chat, "on")
        }
        let messages = await chat.messages
        let last = try #require(messages.last?.text)
        let all = messages.dropLast().map(\.text).joined()
        #expect(ids(last) == fake.continuation(of: ids(all), count: 5))
      }
    }

    @Test func stoppedWhileTheQuestionIsRead() async throws {
      let fake = ascii()
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        let first = try await said(chat, "one")
        let before = fake.calls.all.count
        let task = Task { try await said(chat, String(repeating: "long", count: 100_000)) }
        while fake.calls.all.count < before + 3 { try await Task.sleep(for: .milliseconds(1)) }
        task.cancel()
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(await chat.messages.map(\.text) == ["one", first])
        let second = try await said(chat, "two")
        #expect(ids(second) == fake.continuation(of: ids("one" + first + "two"), count: 5))
        #expect(await chat.undoable == 2)
      }
    }

    @Test func aFailedPredictionTakesTheTurnBack() async throws {
      let fake = ascii(HashModel(failsAt: 12))
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        let first = try await said(chat, "one")
        let error = await failure { _ = try await said(chat, "three", 50) }
        #expect(error == .predictionFailed(reason: "it failed as asked"))
        #expect(await chat.messages.map(\.text) == ["one", first])
        let second = try await said(chat, "x", 1)
        #expect(ids(second) == fake.continuation(of: ids("one" + first + "x"), count: 1))
      }
    }

    @Test func messagesHoldTheAnswerInTheMaking() async throws {
      // Slow enough that it is asked for the messages in the middle of a prediction.
      var slow = HashModel().behaviour
      let inner = slow.predict
      slow.predict = {
        Thread.sleep(forTimeInterval: 0.005)
        return try inner($0, $1, $2)
      }
      let fake = try FakeFolder()
      try await MLModel.$behaviour.withValue(slow) {
        let model = try await ParaRNNModel(
          contentsOf: fake.package, tokenizer: ByteTokenizer(), cache: fake.cache)
        let chat = model.chat(format: .plain)
        let reader = Task {
          for try await _ in chat.respond(to: "one", options: .init(maxTokens: .max)) {}
        }
        while await chat.messages.isEmpty { try await Task.sleep(for: .milliseconds(1)) }
        for _ in 0..<50 {
          #expect(await chat.messages.count == 2)
          try await Task.sleep(for: .milliseconds(1))
        }
        reader.cancel()
        _ = await reader.result
      }
    }

    /// Whatever is asked, saved and taken back at the same time, what was said and the memory stay one.
    @Test func usedFromManyPlacesAtOnce() async throws {
      let fake = ascii()
      try await fake.loadASCII { (model) async throws in
        @Sendable func check(_ chat: ParaRNNChat) async throws {
          let before = await chat.messages.map(\.text).joined()
          #expect(try await ids(said(chat, "end")) == fake.continuation(of: ids(before + "end"), count: 5))
        }
        let chat = model.chat(format: .plain)
        _ = try await said(chat, "begin")
        try await withThrowingTaskGroup(of: Void.self) { group in
          for place in 0..<4 {
            group.addTask {
              for round in 0..<40 {
                do {
                  switch place {
                  case 0, 1: _ = try await said(chat, "\(place) \(round)")
                  case 2: try await check(model.chat(restoring: chat.save(), format: .plain))
                  default: try await chat.undo()
                  }
                } catch ParaRNNError.busy, ParaRNNError.nothingToUndo {
                } catch is CancellationError {  // another question ended this one
                }
              }
            }
          }
          try await group.waitForAll()
        }
        try await check(chat)
      }
    }

    @Test func aNewQuestionEndsAnAnswerReadElsewhere() async throws {
      let fake = ascii()
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        var old = chat.respond(to: "one", options: .init(maxTokens: 9)).makeAsyncIterator()
        let start = try #require(await old.next())
        let second = try await said(chat, "two")
        #expect(ids(second) == fake.continuation(of: ids("one" + start + "two"), count: 5))
        #expect(try await old.next() == nil)
      }
    }
  }
#endif
