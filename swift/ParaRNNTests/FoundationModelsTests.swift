#if canImport(CoreML) && os(Linux)
  import CoreML
  import Foundation
  import FoundationModels
  import ParaRNNFoundationModels
  import Testing

  @testable import ParaRNN

  @Suite struct FoundationModelsTests {
    typealias Entry = Transcript.Entry

    func prompt(_ text: String) -> Entry { .prompt(.init(segments: [.text(.init(content: text))])) }
    func response(_ text: String) -> Entry { .response(.init(segments: [.text(.init(content: text))])) }

    func answer(_ executor: ParaRNNExecutor, _ model: ParaRNNLanguageModel, _ entries: [Entry]) async throws
      -> String
    {
      let channel = LanguageModelExecutorGenerationChannel()
      let request = LanguageModelExecutorGenerationRequest(
        transcript: .init(entries: entries),
        generationOptions: .init(samplingMode: .greedy, maximumResponseTokens: 5))
      try await executor.respond(to: request, model: model, streamingInto: channel)
      channel.finish()
      var (text, count) = ("", 0)
      for await case .response(.appendText(let piece, let tokens)) in channel.events {
        text += piece
        count += tokens
      }
      #expect(count == 5)
      return text
    }

    /// Each transcript is answered as if all of it were read, and only what is new in it is.
    @Test(arguments: [true, false]) func aTranscriptIsNotReadAgain(inGraph: Bool) async throws {
      let fake = ascii(HashModel(inGraph: inGraph, chunk: nil))
      try await fake.loadASCII { (loaded) async throws in
        let model = ParaRNNLanguageModel(loaded)
        let executor = try ParaRNNExecutor(configuration: model.executorConfiguration)
        #expect(model.executorConfiguration == ParaRNNLanguageModel(loaded).executorConfiguration)
        let system = Entry.instructions(.init(segments: [.text(.init(content: "Be brief."))]))
        var entries = [system]
        var all = "Be brief.\n"
        func ask(_ question: String, reads: Int? = nil) async throws {
          entries += [prompt(question)]
          all += question
          let before = fake.calls.all.count
          let text = try await answer(executor, model, entries)
          #expect(text.utf8.map(Int.init) == fake.continuation(of: all.utf8.map(Int.init), count: 5))
          // The last token of an answer is read with the next question.
          if let reads { #expect(fake.calls.all.count - before == reads + 4) }
          entries += [.reasoning(.init()), response(text)]
          all += text
        }
        try await ask("one", reads: all.utf8.count + 3)
        let (early, said) = (entries, all)
        try await ask("two", reads: 1 + 3)
        try await ask("three", reads: 1 + 5)
        // The second question edited: the conversation is taken back to the first answer.
        (entries, all) = (early, said)
        try await ask("other", reads: 1 + 5)
        try await ask("more", reads: 1 + 4)
        // A conversation that nobody has read.
        (entries, all) = ([prompt("x"), response("y")], "xy")
        try await ask("z", reads: 3)
      }
    }

    /// Instructions are passed over by a model that uses tools, whose answers go on from its state as well; so is a
    /// conversation read that it does not know.
    @Test func aModelWithTools() async throws {
      let tools = try Records.tools()
      var script: [Int] = []
      for (question, answer) in [("ab", "ok"), ("c", "yes")] {
        script += tools.render(message: question)
        script.append(tools[.answer])
        script += tools.render(result: answer)
      }
      let fake = HashModel(vocabulary: 278, ends: [tools[.end]], script: script)
      let folder = try FakeFolder(
        tokenizer: String(contentsOf: Records.url("tokenizer.json"), encoding: .utf8))
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        let loaded = try await ParaRNNModel(contentsOf: folder.package, cache: folder.cache)
        await loaded.prefillLoaded()
        let model = ParaRNNLanguageModel(loaded)
        let instructions = Entry.instructions(.init(segments: [.text(.init(content: "Be brief."))]))
        func said(_ executor: ParaRNNExecutor, _ entries: [Entry]) async throws -> String {
          let channel = LanguageModelExecutorGenerationChannel()
          let request = LanguageModelExecutorGenerationRequest(
            transcript: .init(entries: entries), generationOptions: .init(samplingMode: .greedy))
          try await executor.respond(to: request, model: model, streamingInto: channel)
          channel.finish()
          var text = ""
          for await case .response(.appendText(let piece, _)) in channel.events { text += piece }
          return text
        }
        let whole = [instructions, prompt("ab"), response("ok"), prompt("c")]
        let known = try ParaRNNExecutor(configuration: model.executorConfiguration)
        #expect(try await said(known, [instructions, prompt("ab")]) == "ok")
        let before = fake.calls.all.reduce(0, +)
        #expect(try await said(known, whole) == "yes")
        let unknown = try ParaRNNExecutor(configuration: model.executorConfiguration)
        let between = fake.calls.all.reduce(0, +)
        #expect(try await said(unknown, whole) == "yes")
        // The one that knew the conversation has not read it again.
        let questionAndAnswer = tools.render(message: "ab").count + tools.render(result: "ok").count
        #expect(fake.calls.all.reduce(0, +) - between == between - before + questionAndAnswer)
      }
    }

    @Test func transcriptsThatEndWithAnAnswer() async throws {
      try await HashModel().loadASCII { (loaded) async throws in
        let model = ParaRNNLanguageModel(loaded)
        let executor = try ParaRNNExecutor(configuration: model.executorConfiguration)
        for entries in [[], [prompt("a"), response("b")]] {
          guard case .wrongMessages = await failure({ _ = try await answer(executor, model, entries) }) else {
            Issue.record("it was answered")
            continue
          }
        }
      }
    }
  }
#endif
