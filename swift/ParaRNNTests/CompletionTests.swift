import Foundation
import Testing

@testable import ParaRNN

@Suite struct ByteVocabularyTests {
  static func vocabulary() throws -> ByteVocabulary {
    try #require(ByteVocabulary(try GuidedCases.tokenizer(), count: 901))
  }

  @Test func tokensThatGoOnFromAText() throws {
    let vocabulary = try Self.vocabulary()
    for text in ["t", "th", " th", "\n", "é", "xq", "SOFTWARE", "Ω~"] {
      let bytes = Array(text.utf8)
      let begin = vocabulary.bytes.indices.filter { vocabulary.bytes[$0].starts(with: bytes) }
      #expect(vocabulary.beginning(with: bytes).sorted() == begin)
      let inside = vocabulary.bytes.indices.filter {
        let name = vocabulary.bytes[$0]
        return !name.isEmpty && name.count < bytes.count && bytes.starts(with: name)
      }
      #expect(vocabulary.within(bytes).sorted() == inside)
    }
  }

  @Test func tokensOfATextAreTheTokenizers() throws {
    let (vocabulary, tokenizer) = (try Self.vocabulary(), try GuidedCases.tokenizer())
    let text = "def f(x):\n    return the SOFTWARE, it's 12é 👍  \n"
    let (tokens, words) = try #require(vocabulary.encode(Array(text.utf8)[...]))
    #expect(tokens == tokenizer.encode(text, addingSpecialTokens: false))
    for (word, next) in zip(words, words.dropFirst()) {
      let bytes = tokens[word.token..<next.token].flatMap { vocabulary.bytes[$0] }
      #expect(bytes == Array(Array(text.utf8)[word.byte..<next.byte]))
    }
    #expect(words.count > 12)
    // What names an added token is text.
    #expect(vocabulary.encode(Array("<|x|>".utf8)[...])?.tokens.contains(900) == false)
  }

  @Test func tokenizersThatDoNotTell() throws {
    struct Other: ParaRNNTokenizer {
      func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] { [] }
      func decode(_ tokens: [Int]) -> String { "" }
    }
    #expect(ByteVocabulary(Other(), count: 5) == nil)
    let data = try Data(contentsOf: TestData.url("tokenizers.json"))
    let all = try #require(JSONSerialization.jsonObject(with: data) as? JSON)
    var file = try #require(all.object("tokenizer"))
    file["pre_tokenizer"] = ["type": "ByteLevel", "add_prefix_space": true, "use_regex": true]
    let spaced = try BPETokenizer(json: JSONSerialization.data(withJSONObject: file))
    #expect(ByteVocabulary(spaced, count: 900) == nil)
  }
}

#if canImport(CoreML) && os(Linux)
  import CoreML

  @Suite struct CompletionTests {
    struct Case: Decodable {
      struct Piece: Decodable {
        let text: String
        let probability: Double
      }
      let prefix: String
      let pieces: [Piece]
    }

    static func model(
      _ hash: HashModel = HashModel(), _ body: @Sendable (ParaRNNModel) async throws -> Void
    ) async throws {
      var hash = hash
      (hash.vocabulary, hash.ends, hash.spreads) = (901, [900], true)
      let fake = try FakeFolder()
      try await MLModel.$behaviour.withValue(hash.behaviour) {
        let model = try await ParaRNNModel(
          contentsOf: fake.package, tokenizer: GuidedCases.tokenizer(), cache: fake.cache)
        await model.prefillLoaded()
        withExtendedLifetime(fake) {}
        try await body(model)
      }
    }

    /// At each keystroke what Python gives, whatever was typed before, and the same anew.
    @Test(arguments: [true, false]) func completionsArePythons(inGraph: Bool) async throws {
      let cases = try TestData.decode([Case].self, "completions.json")
      try await Self.model(HashModel(inGraph: inGraph)) { (model) async throws in
        let completer = try await Completer(model)
        for (number, expected) in cases.enumerated() {
          let fresh = try await Completer(model)
          for one in number.isMultiple(of: 8) ? [completer, fresh] : [completer] {
            let found = try await one.complete(
              expected.prefix, maxTokens: 3, maxLines: 2, minProbability: 0)
            #expect(found.pieces.map(\.text) == expected.pieces.map(\.text), "\(number)")
            for (a, b) in zip(found.pieces, expected.pieces) {
              #expect(abs(a.probability - b.probability) < 1e-6)
            }
          }
          var (kept, probability) = ("", 1.0)
          for piece in expected.pieces {
            probability *= piece.probability
            if probability < 0.05 { break }
            kept += piece.text
          }
          let sure = try await completer.complete(
            expected.prefix, maxTokens: 3, maxLines: 2, minProbability: 0.05)
          #expect(sure.text == kept)
          #expect(sure.read < 4)
        }
      }
    }

    /// Also where as many tokens stand in the place of others.
    @Test func aChangeBeforeTheLastWord() async throws {
      try await Self.model { (model) async throws in
        let completer = try await Completer(model)
        for text in ["the 1, th", "the 2, th", "the 1, th", "the 3, the", "the 1, the"] {
          let expected = try await Completer(model).complete(text, maxTokens: 3, minProbability: 0)
          let found = try await completer.complete(text, maxTokens: 3, minProbability: 0)
          #expect(found.pieces == expected.pieces)
        }
      }
    }

    @Test func whatAKeystrokeReadsIsBounded() async throws {
      let text = String(repeating: "the Software is provided, it's 12 of\n", count: 30)
      try await Self.model { (model) async throws in
        let completer = try await Completer(model)
        #expect(try await completer.complete(text, minProbability: 1).read > 200)
        for end in 1...20 {
          let found = try await completer.complete(text + text.prefix(end), minProbability: 1)
          #expect(found.read <= 1 + Completer.expansions)
        }
        var total = 0
        for end in (0...60).reversed() {
          total += try await completer.complete(text + text.prefix(end), minProbability: 1).read
        }
        #expect(total < 61 * 6)
        // A jump far back reads from a memory that is kept, not from the beginning.
        let back = try await completer.complete(String(text.dropLast(300)), minProbability: 1)
        #expect(back.read < 200)
        let found = try await completer.complete(text, maxTokens: 9, minProbability: 0)
        let accepted = try await completer.complete(text + found.text, minProbability: 1)
        #expect(accepted.read <= Completer.expansions)
      }
    }

    @Test func aLongTextIsReadFromItsLastTokensOn() async throws {
      let text = String(repeating: "the Software is provided, it's 12 of é\n", count: 60)
      try await Self.model { (model) async throws in
        let completer = try await Completer(model, window: 100)
        #expect(try await completer.complete(text, minProbability: 1).read < 120)
        let begin = await completer.begin
        let typed = try await completer.complete(text + "th", maxTokens: 3, minProbability: 0)
        #expect(await completer.begin == begin)
        #expect(typed.read < 30)
        #expect(try await completer.complete(text + text, minProbability: 1).read < 120)
        #expect(try await completer.complete(String(text.prefix(300)), minProbability: 1).read < 120)
      }
    }

    @Test func learnedPositionsNeverRunOut() async throws {
      let text = String(repeating: "the Software is provided, it's 12 of\n", count: 12)
      try await Self.model(HashModel(positions: 128)) { (model) async throws in
        let completer = try await Completer(model)
        for end in 0..<text.count {
          #expect(try await completer.complete(String(text.prefix(end)), minProbability: 0).read < 128)
        }
      }
      try await Self.model(HashModel(positions: 100)) { (model) async throws in
        let error = await failure { _ = try await Completer(model) }
        #expect(error == .cannotComplete(reason: "it has only 100 learned positions"))
      }
    }

    /// Calls wait for each other; one that is cancelled, or in which a prediction fails, leaves nothing wrong.
    @Test func callsAtOnceCancelledAndFailed() async throws {
      let cases = try TestData.decode([Case].self, "completions.json")
      @Sendable func check(_ completer: Completer, _ expected: Case) async throws {
        let found = try await completer.complete(
          expected.prefix, maxTokens: 3, maxLines: 2, minProbability: 0)
        #expect(found.pieces.map(\.text) == expected.pieces.map(\.text))
      }
      try await Self.model { (model) async throws in
        let completer = try await Completer(model)
        try await withThrowingTaskGroup(of: Void.self) { group in
          for expected in cases { group.addTask { try await check(completer, expected) } }
          try await group.waitForAll()
        }
        for expected in cases.suffix(20) {
          let task = Task { try await completer.complete(expected.prefix + " the", minProbability: 0) }
          task.cancel()
          await #expect(throws: CancellationError.self) { try await task.value }
          try await check(completer, expected)
        }
      }
      try await Self.model(HashModel(failsAt: 15, failsOnce: true)) { (model) async throws in
        let completer = try await Completer(model)
        var failures = 0
        for expected in cases {
          do {
            try await check(completer, expected)
          } catch ParaRNNError.predictionFailed {
            failures += 1
            try await check(completer, expected)
          }
        }
        #expect(failures == 1)
      }
    }

    @Test func whatCannotComplete() async throws {
      try await HashModel(gives: "token").load { (model) async throws in
        guard case .cannotComplete = await failure({ _ = try await Completer(model) }) else {
          Issue.record("it was taken")
          return
        }
      }
      try await HashModel().loadASCII { (model) async throws in
        guard case .cannotComplete = await failure({ _ = try await Completer(model) }) else {
          Issue.record("it was taken")
          return
        }
      }
      try await Self.model { (model) async throws in
        guard case .invalidOption = await failure({ _ = try await Completer(model, window: 0) }) else {
          Issue.record("a window of 0 was taken")
          return
        }
        let completer = try await Completer(model)
        let wrong: [@Sendable () async throws -> Completion] = [
          { try await completer.complete("x", maxTokens: 0) },
          { try await completer.complete("x", maxLines: 0) },
          { try await completer.complete("x", minProbability: 1.1) },
          { try await completer.complete("x", minProbability: .nan) },
        ]
        for call in wrong {
          guard case .invalidOption = await failure({ _ = try await call() }) else {
            Issue.record("a number out of range was taken")
            continue
          }
        }
      }
    }

    /// Bytes have nothing to take back.
    @Test func aModelOfBytes() async throws {
      try await HashModel(spreads: true).load { (model) async throws in
        let completer = try await Completer(model)
        let text = String(repeating: "import os\nclass Reader\n", count: 40)
        _ = try await completer.complete(text, minProbability: 1)
        for end in 1...6 {
          #expect(try await completer.complete(text + text.prefix(end), minProbability: 1).read <= 1)
        }
        #expect(try await completer.complete("") == Completion(pieces: [], read: 0))
      }
    }

    @Test func wholeCharacters() {
      func whole(_ bytes: [UInt8]) -> [UInt8]? {
        Completer.wholeCharacters(bytes).map { Array($0.0.utf8) + [0] + $0.1 }
      }
      #expect(whole([0x61, 0xC3, 0xA9]) == [0x61, 0xC3, 0xA9, 0])
      #expect(whole([0x61, 0xF0, 0x9F, 0x91]) == [0x61, 0, 0xF0, 0x9F, 0x91])
      for bad: [UInt8] in [
        [0x80], [0xC0], [0xE0, 0x80], [0xED, 0xA0], [0xF4, 0x90], [0xF5], [0xC3, 0x61],
      ] {
        #expect(whole(bad) == nil)
      }
    }

    @Test func linesEndWhereTheyDo() {
      func kept(_ text: String, _ lines: Int) -> String {
        var lines = lines
        return Completer.inLines(text, &lines)
      }
      #expect(kept("x\ny\nz", 1) == "x")
      #expect(kept("x\r\ny\r\nz", 2) == "x\r\ny")
      #expect(kept("x\ry", 1) == "x")
      #expect(kept("x\ny", 9) == "x\ny")
    }
  }
#endif
