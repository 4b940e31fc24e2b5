#if canImport(CoreML)
  import CoreML
  import Foundation
  import Testing

  @testable import ParaRNN

  /// The demo model's package: on Linux what it was recorded to answer, on Apple systems the folders `graph` and
  /// `io` in $PARARNN_PACKAGES, each with a transcript.json of its own (tests/support/coreml/record_transcript.py).
  enum DemoPackage {
    static let states = ["graph", "io"]

    #if os(Linux)
      static let isThere = true

      static func load(_ state: String, _ body: @Sendable (ParaRNNModel, Transcript) async throws -> Void)
        async throws
      {
        let url = TestData.url("transcript-\(state).json")
        let json = try JSONSerialization.jsonObject(with: Data(contentsOf: url)) as? JSON ?? [:]
        let fake = try FakeFolder()
        try await MLModel.$behaviour.withValue(Replay(json).behaviour) {
          let model = try await ParaRNNModel(
            contentsOf: fake.package, tokenizer: ByteTokenizer(), cache: fake.cache)
          await model.prefillLoaded()
          withExtendedLifetime(fake) {}
          try await body(model, try Transcript(url))
        }
      }
    #else
      static let folder = ProcessInfo.processInfo.environment["PARARNN_PACKAGES"].map {
        URL(fileURLWithPath: $0)
      }
      static var isThere: Bool { folder != nil }

      static func load(_ state: String, _ body: @Sendable (ParaRNNModel, Transcript) async throws -> Void)
        async throws
      {
        let folder = try #require(folder).appendingPathComponent(state)
        let cache = try TemporaryFolder()
        // A virtual machine has no Neural Engine, and not a real GPU.
        let model = try await ParaRNNModel(
          contentsOf: folder.appendingPathComponent("model.mlpackage"), computeUnits: .cpuOnly,
          cache: cache.url)
        await model.prefillLoaded()
        try await body(model, try Transcript(folder.appendingPathComponent("transcript.json")))
      }
    #endif

    struct Transcript: Decodable {
      let prompt: String
      let prompt_tokens: [Int]
      let tokens: [Int]
      let text: String

      init(_ url: URL) throws { self = try JSONDecoder().decode(Self.self, from: Data(contentsOf: url)) }
    }
  }

  /// On a package that the exporter wrote.
  @Suite(.enabled(if: DemoPackage.isThere), .serialized) struct PackageTests {
    @Test(arguments: DemoPackage.states) func sameTokensAsPython(state: String) async throws {
      try await DemoPackage.load(state) { model, transcript in
        #expect(model.settings.keepsStateInGraph == (state == "graph"))
        #expect(
          model.tokenizer.encode(transcript.prompt, addingSpecialTokens: true) == transcript.prompt_tokens)
        let stream = model.generate(transcript.prompt, options: .init(maxTokens: transcript.tokens.count))
        var text = ""
        for try await piece in stream { text += piece }
        #expect(text == transcript.text)
        #expect(model.tokenizer.encode(text, addingSpecialTokens: false) == transcript.tokens)
        let statistics = try #require(await stream.statistics)
        #expect(statistics.promptTokens == transcript.prompt_tokens.count)
        #expect(statistics.generatedTokens == transcript.tokens.count)
        #expect(statistics.stopReason == .maxTokens)
        #expect(statistics.tokensPerSecond > 0 && statistics.promptTokensPerSecond > 0)
      }
    }

    /// Saved in the middle of an answer, the conversation goes on elsewhere with the same words.
    @Test(arguments: DemoPackage.states) func aSavedTalkGoesOn(state: String) async throws {
      try await DemoPackage.load(state) { model, transcript in
        // The recorded text as a conversation: the answer's first part, then its last token typed in by hand.
        let first = String(transcript.text.prefix(5))
        let chat = model.chat(format: .plain)
        var said = ""
        for try await piece in chat.respond(to: transcript.prompt, options: .init(maxTokens: 5)) {
          said += piece
        }
        #expect(said == first)
        let next = String(transcript.text.dropFirst(5).prefix(1))
        let rest = String(transcript.text.dropFirst(6))
        let saved = try await chat.save()
        for conversation in [try await model.chat(restoring: saved, format: .plain), chat] {
          var more = ""
          for try await piece in conversation.respond(
            to: next, options: .init(maxTokens: transcript.tokens.count - 6))
          {
            more += piece
          }
          #expect(more == rest)
          #expect(await conversation.messages.map(\.text) == [transcript.prompt, first, next, rest])
        }
      }
    }
  }
#endif
