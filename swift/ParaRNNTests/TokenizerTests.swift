import Foundation
import Testing

@testable import ParaRNN

@Suite struct TokenizerTests {
  /// What swift/make_vectors.py had Hugging Face's tokenizers compute.
  struct Vectors: @unchecked Sendable {
    let base: JSON
    let texts: [String]
    let variants: [JSON]
    let decoding: [JSON]

    init() throws {
      let data = try Data(contentsOf: TestData.url("tokenizers.json"))
      let all = try #require(JSONSerialization.jsonObject(with: data) as? JSON)
      base = try #require(all.object("tokenizer"))
      texts = try #require(all["texts"] as? [String])
      variants = try #require(all["variants"] as? [JSON])
      decoding = try #require(all["decoding"] as? [JSON])
    }

    /// The vocabulary with other parts around it.
    func tokenizer(changing parts: JSON = [:], model: JSON = [:]) throws -> BPETokenizer {
      var file = base.merging(parts) { $1 }
      file["model"] = (file.object("model") ?? [:]).merging(model) { $1 }
      return try BPETokenizer(json: JSONSerialization.data(withJSONObject: file))
    }
  }

  static func fingerprint(_ tokens: [Int]) -> String {
    var value: UInt32 = 0x811C_9DC5
    for token in tokens {
      for shift in [0, 8, 16, 24] { value = (value ^ UInt32(token >> shift & 0xFF)) &* 0x0100_0193 }
    }
    let digits = String(value, radix: 16)
    return String(repeating: "0", count: 8 - digits.count) + digits
  }

  @Test func sameTokensAsHuggingFace() throws {
    let vectors = try Vectors()
    #expect(vectors.texts.count >= 2500 && vectors.variants.count >= 7)
    for variant in vectors.variants {
      let name = try #require(variant["name"] as? String)
      let tokenizer = try vectors.tokenizer(
        changing: try #require(variant.object("parts")),
        model: ["ignore_merges": variant["ignore_merges"] as? Bool ?? false])
      let byHand = try #require(variant["by_hand"] as? [[Int]])
      let decoded = try #require(variant["decoded"] as? [String])
      for ((text, ids), back) in zip(zip(vectors.texts, byHand), decoded) {
        #expect(tokenizer.encode(text, addingSpecialTokens: true) == ids, "\(name): \(text.debugDescription)")
        #expect(Array(tokenizer.decode(ids).unicodeScalars) == Array(back.unicodeScalars), "\(name): \(ids)")
      }
      let fingerprints = Array(try #require(variant["fingerprints"] as? String))
      #expect(fingerprints.count == 8 * vectors.texts.count)
      var wrong: [String] = []
      for (i, text) in vectors.texts.enumerated() {
        let ours = Self.fingerprint(tokenizer.encode(text, addingSpecialTokens: true))
        if ours != String(fingerprints[8 * i..<8 * i + 8]) { wrong.append(text.debugDescription) }
      }
      #expect(wrong.isEmpty, "\(name): \(wrong.count) texts, \(wrong.prefix(5))")
    }
  }

  /// Vocabularies of characters, as SentencePiece's are converted.
  @Test func charactersAsHuggingFaceHasThem() throws {
    let vectors = try Vectors()
    let data = try Data(contentsOf: TestData.url("characters.json"))
    let all = try #require(JSONSerialization.jsonObject(with: data) as? JSON)
    // As text: a dictionary would take canonically equivalent tokens for one.
    let base = try #require(JSONText(String(decoding: data, as: UTF8.self))["tokenizer"])
    let variants = try #require(all["variants"] as? [JSON])
    #expect(variants.count >= 5)
    for variant in variants {
      let name = try #require(variant["name"] as? String)
      var parts = try #require(variant.object("parts"))
      parts["added_tokens"] = all.object("tokenizer")?["added_tokens"]
      let tokenizer = try BPETokenizer(
        json: Self.changed(base, parts, byteFallback: variant["byte_fallback"] as? Bool ?? true))
      for (text, ids) in zip(vectors.texts, try #require(variant["by_hand"] as? [[Int]])) {
        #expect(tokenizer.encode(text, addingSpecialTokens: true) == ids, "\(name): \(text.debugDescription)")
      }
      for item in try #require(variant["decoding"] as? [JSON]) {
        let ids = try #require(item["ids"] as? [Int])
        let text = try #require(item["text"] as? String)
        #expect(Array(tokenizer.decode(ids).unicodeScalars) == Array(text.unicodeScalars), "\(name): \(ids)")
        // Each token's bytes make the same text, but for the first, off which decoders take a space.
        let bytes = ids.dropFirst().map { tokenizer.bytes(of: $0) }
        let rest = String(decoding: bytes.flatMap { $0 ?? [] }, as: UTF8.self).unicodeScalars
        if !bytes.contains(nil), !rest.contains("\u{FFFD}"), !text.unicodeScalars.contains("\u{FFFD}") {
          #expect(text.unicodeScalars.suffix(rest.count).elementsEqual(rest), "\(name): \(ids)")
        }
      }
      let fingerprints = Array(try #require(variant["fingerprints"] as? String))
      var wrong: [String] = []
      for (i, text) in vectors.texts.enumerated() {
        let ours = Self.fingerprint(tokenizer.encode(text, addingSpecialTokens: true))
        if ours != String(fingerprints[8 * i..<8 * i + 8]) { wrong.append(text.debugDescription) }
      }
      #expect(wrong.isEmpty, "\(name): \(wrong.count) texts, \(wrong.prefix(5))")
    }
  }

  /// A tokenizer.json with other parts, its members as they are written.
  static func changed(_ base: JSONText, _ parts: JSON, byteFallback: Bool) throws -> Data {
    guard case .object(let members) = base else { return Data() }
    let changed = try members.map { member -> JSONText.Member in
      if let part = parts[member.name] {
        let data = try JSONSerialization.data(withJSONObject: part, options: .fragmentsAllowed)
        return JSONText.Member(name: member.name, value: try JSONText(String(decoding: data, as: UTF8.self)))
      }
      guard member.name == "model", case .object(let inner) = member.value else { return member }
      let fallback = JSONText.Member(name: "byte_fallback", value: .bool(byteFallback))
      let model = inner.map { $0.name == fallback.name ? fallback : $0 }
      return .init(name: "model", value: .object(model))
    }
    return Data(JSONText.object(changed).text.utf8)
  }

  @Test func sameTextAsHuggingFace() throws {
    let vectors = try Vectors()
    let tokenizer = try vectors.tokenizer()
    for item in vectors.decoding {
      let ids = try #require(item["ids"] as? [Int])
      let text = try #require(item["text"] as? String)
      #expect(Array(tokenizer.decode(ids).unicodeScalars) == Array(text.unicodeScalars), "\(ids)")
    }
  }

  @Test func encodingAndDecodingGiveTheTextBack() throws {
    let vectors = try Vectors()
    let tokenizer = try vectors.tokenizer()
    for text in vectors.texts {
      for one: any ParaRNNTokenizer in [tokenizer, ByteTokenizer()] {
        let back = one.decode(one.encode(text, addingSpecialTokens: false))
        #expect(Array(back.utf8) == Array(text.utf8))
      }
    }
    #expect(tokenizer.vocabularySize == 900)
    #expect(ByteTokenizer().vocabularySize == 256)
  }

  @Test func specialTokensAreAddedOnlyWhenAskedFor() throws {
    let vectors = try Vectors()
    let variant = try #require(vectors.variants.first { $0["name"] as? String == "llama3" })
    let tokenizer = try vectors.tokenizer(changing: try #require(variant.object("parts")))
    let inner = tokenizer.encode("a", addingSpecialTokens: false)
    #expect(tokenizer.encode("a", addingSpecialTokens: true) == [900] + inner + [901])
    #expect(tokenizer.vocabularySize == 902)
  }

  /// The cases of Python's, which says at export what is refused here.
  @Test func refusedAsTheExportSays() throws {
    let data = try Data(contentsOf: Records.url("tokenizer_parts.json"))
    let cases = try #require(JSONSerialization.jsonObject(with: data) as? [JSON])
    #expect(cases.count > 15)
    let plain = try JSONSerialization.jsonObject(with: Data(contentsOf: Records.url("tokenizer.json")))
    for one in cases {
      var file = try #require(plain as? JSON).merging(one.object("parts") ?? [:]) { $1 }
      file["model"] = (file.object("model") ?? [:]).merging(one.object("model") ?? [:]) { $1 }
      var reason: String?
      do {
        _ = try BPETokenizer(json: JSONSerialization.data(withJSONObject: file))
      } catch let refused as BPETokenizer.Refused {
        reason = refused.reason
      }
      #expect(reason == one["reason"] as? String, "\(one)")
    }
  }

  @Test func otherTokenizersAreRefused() throws {
    let vectors = try Vectors()
    let changes: [(parts: JSON, model: JSON)] = [
      ([:], ["vocab": ["a": Int.max], "merges": [String]()]),
      (["added_tokens": [["id": Int.max, "content": "x"]]], [:]),
      ([:], ["merges": ["a b c"]]),
      ([:], ["merges": [["a", "\u{4E00}"]]]),
      (["decoder": ["type": "Metaspace"]], [:]),
      (["decoder": ["type": "Strip", "content": "ab", "start": 1, "stop": 0]], [:]),
      (["pre_tokenizer": ["type": "Metaspace", "prepend_scheme": "often"]], [:]),
      (["pre_tokenizer": ["type": "Split", "pattern": ["Regex": "("], "behavior": "Isolated"]], [:]),
      (["post_processor": ["type": "RobertaProcessing"]], [:]),
      (["added_tokens": [["id": -1, "content": "x"]]], [:]),
    ]
    for (parts, model) in changes {
      #expect(throws: BPETokenizer.Refused.self, "\(parts) \(model)") {
        try vectors.tokenizer(changing: parts, model: model)
      }
    }
  }

  /// With a token for every byte, nothing is unknown.
  @Test func anUnknownTokenThatIsNeverNeeded() throws {
    let vectors = try Vectors()
    let (plain, named) = (try vectors.tokenizer(), try vectors.tokenizer(model: ["unk_token": "<unk>"]))
    for text in vectors.texts.prefix(100) {
      #expect(
        named.encode(text, addingSpecialTokens: false) == plain.encode(text, addingSpecialTokens: false))
    }
  }

  @Test func filesThatAreNoTokenizersAreNamed() async throws {
    let folder = try TemporaryFolder()
    for text in ["", "{", "[]", "{}", #"{"model": null}"#] {
      let file = try folder.write(text, to: "tokenizer.json")
      guard
        case .unreadableTokenizer(file.path, _) = await failure({ _ = try BPETokenizer(contentsOf: file) })
      else {
        Issue.record("\(text)")
        continue
      }
    }
    #expect(throws: ParaRNNError.self) {
      try BPETokenizer(contentsOf: folder.url.appendingPathComponent("none"))
    }
  }
}

@Suite struct ChatFormatTests {
  struct Recorded: Decodable {
    struct Conversation: Decodable {
      let messages: [ChatMessage]
      let text: String
    }
    let name: String
    let chat_format: PackageSettings.ChatTexts
    let conversations: [Conversation]
  }

  /// What chat templates of many forms render, without a renderer.
  @Test func textsAreThoseOfTemplates() throws {
    let recorded = try Records.decode([Recorded].self, "chat_formats.json")
    #expect(recorded.count >= 7)
    for one in recorded {
      let format = one.chat_format.format
      for conversation in one.conversations {
        #expect(try format.text(of: conversation.messages) == conversation.text, "\(one.name)")
      }
      if !format.takesSystemPrompt {
        #expect(throws: ParaRNNError.self) { try format.text(of: [.init(.system, "S"), .init(.user, "A")]) }
      }
    }
  }
}

@Suite struct DetokenizerTests {
  static func pieces(_ tokens: [Int], _ tokenizer: any ParaRNNTokenizer) -> [String] {
    var detokenizer = Detokenizer(tokenizer)
    return tokens.map { detokenizer.append($0) } + [detokenizer.finish()]
  }

  @Test func incompleteCharactersAreHeldBack() {
    let tokens = ByteTokenizer().encode("aé€😀!", addingSpecialTokens: false)
    #expect(
      Self.pieces(tokens, ByteTokenizer()) == ["a", "", "é", "", "", "€", "", "", "", "😀", "!", ""])
  }

  @Test func brokenTextComesOutOnce() {
    // A cut-off character at the end, bytes that are no text, and a long run of them.
    #expect(Self.pieces([0x61, 0xC3], ByteTokenizer()) == ["a", "", "\u{FFFD}"])
    #expect(Self.pieces([0xC3, 0x61], ByteTokenizer()).joined() == "\u{FFFD}a")
    for run in [[0xFF], [0xE2, 0x82], [0xF0, 0x9F, 0x98, 0x41]] {
      let tokens = Array((0..<500).map { run[$0 % run.count] }) + [0x62]
      let pieces = Self.pieces(tokens, ByteTokenizer())
      #expect(pieces.joined() == ByteTokenizer().decode(tokens))
      #expect(pieces[..<400].joined().unicodeScalars.count > 100)  // it did come as it went
    }
  }

  @Test func piecesMakeUpTheText() throws {
    let vectors = try TokenizerTests.Vectors()
    let tokenizer = try vectors.tokenizer()
    for text in vectors.texts.prefix(500) {
      let tokens = tokenizer.encode(text, addingSpecialTokens: false)
      #expect(Array(Self.pieces(tokens, tokenizer).joined().utf8) == Array(text.utf8))
    }
    var random = SplitMix64(seed: 1)
    for _ in 0..<200 {
      let tokens = (0..<60).map { _ in Int.random(in: 0..<900, using: &random) }
      #expect(Array(Self.pieces(tokens, tokenizer).joined().utf8) == Array(tokenizer.decode(tokens).utf8))
    }
  }

  /// Decoders of SentencePiece models drop a space at the beginning of a text.
  @Test func tokenizersThatWriteAFirstTokenDifferently() {
    struct Words: ParaRNNTokenizer {
      func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] { [] }
      func decode(_ tokens: [Int]) -> String {
        String(tokens.map { [" one", " two", ",", "é"][$0] }.joined().drop { $0 == " " })
      }
    }
    #expect(Self.pieces([0, 1, 2, 3, 0], Words()) == ["one", " two", ",", "é", " one", ""])
  }
}
