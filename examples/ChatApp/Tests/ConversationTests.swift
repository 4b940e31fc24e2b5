#if canImport(CoreML) && os(Linux)
  import CoreML
  import Foundation
  import Testing

  @testable import ParaRNN

  /// What the window shows, with a stand-in for the model; swift/linux/test.sh runs this among the package's tests.
  @MainActor @Suite struct ConversationTests {
    func open(
      _ fake: HashModel, _ body: @MainActor (Conversation, FakeFolder) async throws -> Void
    ) async throws {
      let folder = try FakeFolder(tokenizer: LoadingTests.byteTokenizer)
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        let conversation = Conversation()
        #expect(!conversation.canAsk)
        #expect(await conversation.load(folder.package))
        #expect(conversation.canAsk)
        try await body(conversation, folder)
      }
    }

    var ab: HashModel {
      var model = HashModel(vocabulary: 3)
      model.script = [0]
      return model
    }

    func ask(_ conversation: Conversation, _ text: String) async {
      conversation.ask(text)
      #expect(conversation.isAnswering && !conversation.canAsk)
      await conversation.answered()
    }

    @Test func branchesAndUndo() async throws {
      try await open(ab) { conversation, _ in
        await ask(conversation, "ab")
        #expect(conversation.messages.map(\.role) == [.user, .assistant])
        #expect(conversation.messages[1].text.count == 256)
        await conversation.branch()
        #expect(conversation.branchCount == 2 && conversation.shown == 1)
        await ask(conversation, "b")
        #expect(conversation.messages.count == 4)
        conversation.show(branch: 0)
        #expect(conversation.messages.count == 2)
        conversation.show(branch: 7)
        #expect(await conversation.undo() == "ab")
        #expect(conversation.messages.isEmpty)
        conversation.show(branch: 1)
        #expect(await conversation.undo() == "b")
        #expect(await conversation.undo() == "ab")
      }
    }

    @Test func leftAndTakenUpAgain() async throws {
      try await open(ab) { conversation, folder in
        conversation.ask("ab")
        let saved = try #require(await conversation.leave())
        #expect(!conversation.isAnswering)
        await ask(conversation, "ab")
        let whole = try #require(await conversation.leave())
        for (data, messages) in [(saved, nil), (whole, conversation.messages), (Data("no".utf8), [])] {
          let other = Conversation()
          #expect(await other.load(folder.package, units: .cpu, saved: data))
          if let messages { #expect(other.messages == messages) }
          #expect(other.status.contains("CPU"))
        }
      }
    }

    /// As when other compute units are chosen, or the app is opened again.
    @Test func allBranchesAreTakenUpAgain() async throws {
      try await open(ab) { conversation, folder in
        await ask(conversation, "ab")
        await conversation.branch()
        await ask(conversation, "b")
        await conversation.branch()
        conversation.show(branch: 1)
        let said = conversation.messages
        let saved = try #require(await conversation.leave())
        for other in [conversation, Conversation()] {
          #expect(await other.load(folder.package, units: .cpu, saved: saved))
          #expect(other.branchCount == 3 && other.shown == 1 && other.messages == said)
          other.show(branch: 0)
          #expect(other.messages == Array(said.prefix(2)))
          await ask(other, "a")
          #expect(other.messages.count == 4)
        }
      }
    }

    /// One that cannot be saved takes none of the others with it, whichever is shown.
    @Test func whatCanBeSavedIsKept() async throws {
      for (broken, shown, expected) in [(0, 1, 0), (1, 1, 0), (2, 1, 1), (1, 2, 1)] {
        try await threeBranches { conversation, folder in
          conversation.show(branch: shown)
          let said = conversation.messages
          let bytes = try #require(await leave(conversation, broken))
          let sentence = "Branch \(broken + 1) could not be kept: \(ParaRNNError.busy.localizedDescription)"
          #expect(conversation.status == sentence)
          let other = Conversation()
          #expect(await other.load(folder.package, units: .cpu, saved: bytes))
          #expect(other.branchCount == 2 && other.shown == expected)
          if broken != shown { #expect(other.messages == said) }
        }
      }
      try await threeBranches { conversation, folder in
        // As when other compute units are chosen: what loading tells does not hide it.
        let none = await conversation.leave { _ in throw ParaRNNError.busy }
        #expect(none == nil)
        #expect(await conversation.load(folder.package, units: .cpu))
        #expect(conversation.status.contains("Branch 3 could not be kept"))
        let whole = await conversation.leave()
        #expect(whole != nil)
      }
    }

    /// One that was kept before stays as it was then.
    @Test func whatWasKeptBeforeIsKept() async throws {
      try await threeBranches { conversation, folder in
        let whole = try #require(await conversation.leave())
        conversation.show(branch: 1)
        let before = conversation.messages
        for loaded in [false, true] {
          if loaded {
            #expect(await conversation.load(folder.package, units: .cpu, saved: whole))
            conversation.show(branch: 1)
          }
          await ask(conversation, "a")
          let bytes = try #require(await leave(conversation, 1))
          #expect(conversation.status.hasPrefix("Branch 2 could not be kept"))
          let other = Conversation()
          #expect(await other.load(folder.package, units: .cpu, saved: bytes))
          #expect(other.branchCount == 3 && other.shown == 1 && other.messages == before)
        }
      }
    }

    private func threeBranches(_ body: (Conversation, FakeFolder) async throws -> Void) async throws {
      try await open(ab) { conversation, folder in
        await ask(conversation, "ab")
        await conversation.branch()
        await ask(conversation, "b")
        await conversation.branch()
        try await body(conversation, folder)
      }
    }

    /// Where the branch at this place cannot be saved.
    private func leave(_ conversation: Conversation, _ broken: Int) async -> Data? {
      var place = -1
      return await conversation.leave { chat in
        place += 1
        if place == broken { throw ParaRNNError.busy }
        return try await chat.save()
      }
    }

    @Test func aHotDevice() async throws {
      try await open(ab) { conversation, _ in
        conversation.take(.hot)
        conversation.ask("ab")
        while conversation.messages[1].text.isEmpty { try await Task.sleep(for: .milliseconds(1)) }
        conversation.take(.tooHot)
        await conversation.answered()
        #expect(!conversation.canAsk && conversation.status.contains("too hot"))
        #expect(conversation.messages[1].text.count < 256)
        conversation.take(.fine)
        #expect(conversation.canAsk)
      }
    }

    @Test func whatCannotBeLoaded() async throws {
      let conversation = Conversation()
      #expect(await !conversation.load(URL(fileURLWithPath: "/nowhere")))
      #expect(conversation.status.contains("/nowhere") && conversation.messages.isEmpty)
      #expect(await conversation.leave() == nil)
    }

    @MainActor final class Bell { var rings = 0 }

    /// A timer of the assistant's rings once, whichever branch is shown.
    @Test(.timeLimit(.minutes(5))) func timersRing() async throws {
      let tools = try Records.tools()
      var script = tools.render(message: "1 second")
      script.append(tools[.call])
      script += tools.encode(#"{"name":"set_timer","arguments":{"duration":"1 second"}}"#)
      script.append(tools[.result])
      script += tools.render(result: "Timer set for 1 second.")
      script.append(tools[.answer])
      script.append(tools[.end])
      let fake = HashModel(vocabulary: 278, ends: [257], script: script)
      let folder = try FakeFolder(
        tokenizer: String(contentsOf: Records.url("tokenizer.json"), encoding: .utf8))
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        let conversation = Conversation()
        #expect(await conversation.load(folder.package))
        await ask(conversation, "1 second")
        #expect(conversation.messages.last?.text == "Timer set for 1 second.")
        #expect(conversation.toolLines[1]?.contains("set_timer") == true)
        let saved = try #require(await conversation.leave())
        let other = Conversation()
        #expect(await other.load(folder.package, saved: saved))
        #expect(other.toolLines == conversation.toolLines)
        await conversation.branch()
        let bell = Bell()
        let watching = Task { await conversation.watch(every: .milliseconds(5)) { bell.rings += 1 } }
        while conversation.due.isEmpty { try await Task.sleep(for: .milliseconds(5)) }
        watching.cancel()
        await watching.value
        #expect(conversation.due == ["The timer is over."] && bell.rings == 1)
        conversation.dismissDue()
        #expect(conversation.due.isEmpty)
      }
    }
  }
#endif
