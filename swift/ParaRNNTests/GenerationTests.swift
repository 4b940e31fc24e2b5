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

    @Test func tokensWithTheirProbabilities() async throws {
      let said = "é, ok"
      var fake = HashModel(chunk: 4, ends: [10])
      fake.script = [0] + said.utf8.map(Int.init) + [10]
      try await fake.load { (model) async throws in
        let stream = model.generate("x", options: .init(maxTokens: 50))
        var tokens: [GeneratedToken] = []
        for try await token in stream.tokens { tokens.append(token) }
        #expect(tokens.map(\.id) == said.utf8.map(Int.init) + [10])
        #expect(tokens.map(\.text) == ["", "é", ",", " ", "o", "k", ""])
        // The stand-in's logits: 9 for the token, 0 for the others.
        let expected = Float(9 - log(exp(9.0) + 255))
        #expect(tokens.allSatisfy { abs($0.logProbability! - expected) < 1e-5 })
        #expect(await stream.statistics?.generatedTokens == tokens.count)
        // Cut off in a character: the rest of the text goes with the last token.
        var cut: [GeneratedToken] = []
        for try await token in model.generate("x", options: .init(maxTokens: 1)).tokens { cut.append(token) }
        #expect(cut.map(\.text) == ["\u{FFFD}"])
        // Text that may be the beginning of a stop text.
        var texts: [String] = []
        let options = GenerationOptions(maxTokens: 5, stop: [", oh"])
        for try await token in model.generate("x", options: options).tokens { texts.append(token.text) }
        #expect(texts == ["", "é", "", "", ", o"])
      }
      try await HashModel(gives: "token").load { (model) async throws in
        for try await token in model.generate("x", options: .init(maxTokens: 2)).tokens {
          #expect(token.logProbability == nil)
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
#endif
