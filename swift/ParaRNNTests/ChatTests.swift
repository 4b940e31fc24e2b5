#if canImport(CoreML) && os(Linux)
  import CoreML
  import Foundation
  import Testing

  @testable import ParaRNN

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

    @Test func savedConversationsThatAreNone() async throws {
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
    }

    @Test(arguments: [nil, "a"]) func savedForTheSameWeights(digest: String?) async throws {
      func exported(_ changes: @escaping @Sendable (inout JSON) -> Void) -> HashModel {
        var model = ascii()
        model.changes = {
          $0["weights_digest"] = digest
          changes(&$0)
        }
        return model
      }
      let saved = Mutex()
      try await exported { _ in }.loadASCII { model in
        let chat = model.chat()
        for try await _ in chat.respond(to: "Hi", options: .init(maxTokens: 3)) {}
        saved.data = try await chat.save()
        #expect(try await ParaRNNChat.messages(in: saved.data) == chat.messages)
      }
      // The same weights, exported again by another version, which says more: nothing of it changes the memory.
      let again = exported {
        $0["version"] = "9.9"
        $0["iterations"] = 7
        $0["eos_token_id"] = [3]
        $0["norm_eps"] = 1e-6
        $0["said_by_later_exports"] = ["anything"]
      }
      try await again.loadASCII { model in
        let restored = try await model.chat(restoring: saved.data)
        #expect(try await ParaRNNChat.messages(in: saved.data) == restored.messages)
      }
      #expect(throws: ParaRNNError.self) { try ParaRNNChat.messages(in: Data("no".utf8)) }
      let other = exported { $0[digest == nil ? "parameters" : "weights_digest"] = digest == nil ? 7 : "b" }
      try await other.loadASCII { (model) async throws in
        #expect(await failure { _ = try await model.chat(restoring: saved.data) } == .savedWithAnotherModel)
        #expect(try ParaRNNChat.messages(in: saved.data).first?.text == "Hi")
        // There it goes on by reading all of it.
        let chat = try model.chat(messages: try ParaRNNChat.messages(in: saved.data))
        for try await _ in chat.respond(to: "And?", options: .init(maxTokens: 3)) {}
        #expect(await chat.messages.count == 4)
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

    /// The third token of the second answer fails, as when an app loses the GPU in the background.
    @Test(arguments: [true, false], [true, false])
    func aFailedPredictionKeepsTheText(inGraph: Bool, isSaved: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph, failsAt: 15, failsOnce: true))
      try await fake.loadASCII { (model) async throws in
        let format = ChatFormat(
          beforeSystem: "<", afterSystem: ">", beforeUser: "[", afterUser: "]", afterAnswer: ";")
        var chat = model.chat(format: format)
        let first = try await said(chat, "a")
        let error = await failure { _ = try await said(chat, "b", 50) }
        #expect(error == .predictionFailed(reason: "it failed as asked"))
        let partial = try #require(await chat.messages.last?.text)
        let before = ids("[a]" + first + ";[b]")
        #expect(partial.utf8.count == 4 && ids(partial) == fake.continuation(of: before, count: 4))
        if isSaved { chat = try await model.chat(restoring: try await chat.save(), format: format) }
        #expect(await chat.messages.map(\.text) == ["a", first, "b", partial])
        // Question and text are read again, once, from the state before them.
        let third = try await said(chat, "c")
        let all = ids("[a]" + first + ";[b]" + partial + ";[c]")
        #expect(ids(third) == fake.continuation(of: all, count: 5))
        let fourth = try await said(chat, "d")
        #expect(ids(fourth) == fake.continuation(of: all + ids(third + ";[d]"), count: 5))
        #expect(try await chat.undo() == "d")
        #expect(try await chat.undo() == "c")
        #expect(try await said(chat, "c") == third)
        guard !isSaved else { return }
        _ = try await (chat.undo(), chat.undo())
        #expect(await chat.messages.map(\.text) == ["a", first])
        let other = try await said(chat, "e")
        #expect(ids(other) == fake.continuation(of: ids("[a]" + first + ";[e]"), count: 5))
      }
    }

    @Test func aFailureWhileTheQuestionIsReadTakesItBack() async throws {
      let fake = ascii(HashModel(failsAt: 7, failsOnce: true))
      try await fake.loadASCII { (model) async throws in
        let chat = model.chat(format: .plain)
        let first = try await said(chat, "one")
        #expect(await failure { _ = try await said(chat, "three") } != nil)
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
