import Foundation
import Testing

@testable import ParaRNN

enum GuidedCases {
  static let schemas = [
    #"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"},"#
      + #" "tags": {"type": "array", "items": {"enum": ["a", "bé", 3]}, "maxItems": 3}}, "required": ["name"]}"#,
    #"{"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4}"#,
    #"{"anyOf": [{"type": "null"}, {"const": {"k": [1, 2]}}, {"type": "string", "maxLength": 30}]}"#,
  ]

  /// A vocabulary of 900 tokens, most of them several bytes long.
  static func tokenizer() throws -> BPETokenizer {
    let data = try Data(contentsOf: TestData.url("tokenizers.json"))
    let all = try #require(JSONSerialization.jsonObject(with: data) as? JSON)
    var file = try #require(all.object("tokenizer"))
    file["added_tokens"] = [["id": 900, "content": "<|x|>", "special": true]]
    return try BPETokenizer(json: JSONSerialization.data(withJSONObject: file))
  }
}

@Suite struct GuidedTests {
  /// Which tokens are allowed is what going through the grammar byte by byte says, at every place of random values.
  @Test(arguments: GuidedCases.schemas) func allowedTokensAreThoseOfTheGrammar(schema: String) throws {
    let tokenizer = try GuidedCases.tokenizer()
    let vocabulary = try #require(VocabularyBytes(tokenizer, count: 903))
    let grammar = try JSONSchema(schema).grammar
    var random = SplitMix64(seed: 5)
    var places = 0
    for _ in 0..<3 {
      var guided = GuidedTokens(grammar, vocabulary)
      var matcher = GrammarMatcher(grammar)
      while !guided.isStopped {
        let allowed = guided.allowed()
        for token in 0..<903 {
          var trial = matcher
          let bytes = tokenizer.bytes(of: token) ?? []
          let fits =
            !bytes.isEmpty
            && bytes.allSatisfy { byte in
              if !trial.allowed.contains(byte) { return false }
              trial.take(byte)
              return true
            }
          if allowed[token] != fits { Issue.record("token \(token) at place \(places)") }
        }
        let token = try #require(allowed.indices.filter { allowed[$0] }.randomElement(using: &random))
        guided.take(token)
        for byte in tokenizer.bytes(of: token)! { matcher.take(byte) }
        #expect(guided.isComplete == matcher.isComplete && guided.isStopped == matcher.isStopped)
        places += 1
      }
    }
    #expect(places > 20)
  }

  /// In a string of any length the automaton has few states: it does not grow with the text.
  @Test func aLongStringNeedsNoNewStates() throws {
    let vocabulary = try #require(VocabularyBytes(ByteTokenizer(), count: 256))
    var guided = GuidedTokens(try JSONSchema(#"{"type": "string"}"#).grammar, vocabulary)
    guided.take(Int(UInt8(ascii: "\"")))
    var counts: [Int] = []
    for _ in 0..<50 {
      for byte in "aé日\\n".utf8 {
        _ = guided.allowed()
        guided.take(Int(byte))
      }
      counts.append(guided.stateCount)
    }
    #expect(Set(counts).count == 1)
  }
}

#if canImport(CoreML) && os(Linux)
  import CoreML

  @Suite struct GuidedGenerationTests {
    /// Whatever the model says, the value is whole and fits.
    @Test(arguments: GuidedCases.schemas) func answersKeepTheirSchema(schema: String) async throws {
      let tokenizer = try GuidedCases.tokenizer()
      let fake = try FakeFolder()
      try await MLModel.$behaviour.withValue(HashModel(vocabulary: 910, ends: [905]).behaviour) {
        let model = try await ParaRNNModel(contentsOf: fake.package, tokenizer: tokenizer, cache: fake.cache)
        for seed in 0..<8 as Range<UInt64> {
          let options = GenerationOptions(
            maxTokens: 5000, temperature: 50, topP: 0.99, repetitionPenalty: 1.1, seed: seed, schema: schema)
          let stream = model.generate("Give me", options: options)
          var text = ""
          for try await piece in stream { text += piece }
          let value = try JSONText(text)
          #expect(try JSONSchema(schema).problem(value) == nil, "\(text)")
          #expect(await stream.statistics?.stopReason == .endOfText)
        }
      }
    }

    /// It ends at the end of text where the value may be longer, and not before it is whole.
    @Test func theEndOfTextIsAllowedWhereTheValueIsWhole() async throws {
      var fake = HashModel(ends: [10])
      fake.script = [10]
      try await fake.load { (model) async throws in
        var text = ""
        let options = GenerationOptions(maxTokens: 9, schema: #"{"type": "number"}"#)
        for try await piece in model.generate("x", options: options) { text += piece }
        #expect(text == "-0")  // the first that is allowed, since the model wants to end
        // Then a chat goes on.
        let chat = model.chat(format: .plain)
        for try await _ in chat.respond(to: "x", options: options) {}
        for try await _ in chat.respond(to: "y", options: options) {}
        #expect(await chat.messages.map(\.text) == ["x", "-0", "y", "-0"])
      }
    }

    @Test func schemasThatCannotBeKept() async throws {
      @Sendable func refused(_ model: ParaRNNModel, _ schema: String) async -> ParaRNNError? {
        await failure { for try await _ in model.generate("a", options: .init(schema: schema)) {} }
      }
      let string = #"{"type": "string"}"#
      try await HashModel().load { (model) async throws in
        for bad in ["{", #"{"type": "string", "pattern": "a"}"#, "{}"] {
          guard case .invalidOption = await refused(model, bad) else {
            Issue.record("\(bad) was taken")
            continue
          }
        }
      }
      try await HashModel(gives: "token").load { (model) async throws in
        #expect(await refused(model, string) == .samplingNeedsLogits)
      }
      try await HashModel().loadASCII { (model) async throws in
        #expect(await refused(model, string) == .schemaCannotBeKept)  // it does not tell its tokens' bytes
      }
    }
  }
#endif
