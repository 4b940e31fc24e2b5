import Foundation

/// BPE as Hugging Face's `tokenizers` writes it to tokenizer.json: byte-level (GPT-2, Llama 3, Qwen, ...), or of
/// characters with SentencePiece's vocabularies (Llama 2, Mistral, Gemma, ...).
///
/// The same ids as theirs, with the rules of the Unicode version that this system's Foundation knows. Kinds of
/// normalizers, pre-tokenizers, post-processors and decoders that these do not use are refused.
public struct BPETokenizer: ParaRNNTokenizer {
  private struct Merge {
    let rank: Int
    let token: Int
  }
  private struct Added {
    let id: Int
    let name: String
    /// What is looked for in a text.
    let bytes: [UInt8]
    let stripsLeft: Bool
    let stripsRight: Bool
    let normalized: Bool
  }

  /// BPE of characters.
  private struct Characters {
    let unknown: Int?
    let fusesUnknown: Bool
    let decoder: TokenDecoder
  }

  public let vocabularySize: Int?
  private let bytesOfToken: [Int: [UInt8]]
  private let tokenOfBytes: [[UInt8]: Int]
  /// For byte-level BPE, the tokens from which merging begins; else those of bytes for which there is no character.
  private let tokenOfByte: [Int?]
  /// nil for byte-level BPE.
  private let characters: Characters?
  private let merges: [UInt64: Merge]
  private let takesWholePieces: Bool
  private let added: [Added]
  private let idsOfAdded: Set<Int>
  private let normalizers: [Normalizer]
  private let splitters: [Splitter]
  private let before: [Int]
  private let after: [Int]

  /// Read a tokenizer.json.
  ///
  /// - Throws: ``ParaRNNError/unreadableTokenizer(_:reason:)``
  public init(contentsOf url: URL) throws {
    let data: Data
    do {
      data = try Data(contentsOf: url)
    } catch {
      throw ParaRNNError.unreadableTokenizer(url.path, reason: "it cannot be read")
    }
    do {
      try self.init(json: data)
    } catch let refused as Refused {
      throw ParaRNNError.unreadableTokenizer(url.path, reason: refused.reason)
    }
  }

  /// Why a tokenizer.json is not taken.
  struct Refused: Error {
    let reason: String
    init(_ reason: String) { self.reason = reason }
  }

  init(json data: Data) throws {
    guard let file = try? JSONSerialization.jsonObject(with: data) as? JSON, let model = file.object("model")
    else { throw Refused("it is not a tokenizer.json") }
    guard model["type"] as? String == "BPE", let vocabulary = model["vocab"] as? [String: Int],
      let mergeList = model["merges"] as? [Any]
    else { throw Refused("its model is not BPE") }
    let prefixed = ["continuing_subword_prefix", "end_of_word_suffix"].contains {
      !(model[$0] as? String ?? "").isEmpty
    }
    if prefixed { throw Refused("its BPE marks the inside or the end of words, which is not supported") }
    let unknown = (model["unk_token"] as? String).flatMap { vocabulary[$0] }
    let hasFallback = model["byte_fallback"] as? Bool ?? false
    let isByteLevel = Self.isByteLevel(decoder: file.object("decoder"))
    if isByteLevel && hasFallback { throw Refused("its BPE is both byte-level and with byte fallback") }
    characters =
      try isByteLevel
      ? nil
      : Characters(
        unknown: unknown, fusesUnknown: model["fuse_unk"] as? Bool ?? false,
        decoder: TokenDecoder(file.object("decoder")))
    func written(_ text: String) -> [UInt8]? { isByteLevel ? ByteAlphabet.bytes(text) : Array(text.utf8) }
    takesWholePieces = model["ignore_merges"] as? Bool ?? false

    var bytesOfToken: [Int: [UInt8]] = [:]
    var tokenOfBytes: [[UInt8]: Int] = [:]
    for (text, id) in isByteLevel ? vocabulary.map({ ($0, $1) }) : Self.entries(vocabulary, data) {
      guard Self.ids.contains(id) else { throw Refused("it has the token id \(id)") }
      let bytes = written(text)
      bytesOfToken[id] = bytes ?? Array(text.utf8)
      if let bytes { tokenOfBytes[bytes] = id }
    }
    merges = try Self.readMerges(mergeList, tokenOfBytes, written)
    tokenOfByte = (UInt8.min...UInt8.max).map { byte in
      if isByteLevel { return tokenOfBytes[[byte]] }
      return hasFallback ? vocabulary[TokenDecoder.name(byte)] : nil
    }
    if isByteLevel, model["unk_token"] is String, tokenOfByte.contains(nil) {
      throw Refused("it has an unknown token for the bytes that its vocabulary lacks, which is not supported")
    }

    normalizers = try Normalizer.read(file.object("normalizer"))
    var added: [Added] = []
    for item in file["added_tokens"] as? [JSON] ?? [] {
      guard let id = item["id"] as? Int, let text = item["content"] as? String, Self.ids.contains(id),
        !text.isEmpty
      else { throw Refused("one of its added tokens is damaged") }
      if item["single_word"] as? Bool == true {
        throw Refused("its added token \(text) is only for single words, which is not supported")
      }
      let normalized = item["normalized"] as? Bool ?? true
      let sought = normalized ? normalizers.reduce(text) { $1.apply($0) } : text
      added.append(
        Added(
          id: vocabulary[text] ?? id, name: text, bytes: Array(sought.utf8),
          stripsLeft: item["lstrip"] as? Bool ?? false, stripsRight: item["rstrip"] as? Bool ?? false,
          normalized: normalized))
      bytesOfToken[vocabulary[text] ?? id] = written(text) ?? Array(text.utf8)
    }
    self.added = added
    idsOfAdded = Set(added.map(\.id))
    self.bytesOfToken = bytesOfToken
    self.tokenOfBytes = tokenOfBytes
    vocabularySize = (bytesOfToken.keys.max() ?? -1) + 1
    let cuts = Splitter.kinds(file.object("pre_tokenizer"))
    if cuts.contains(isByteLevel ? "Metaspace" : "ByteLevel") {
      throw Refused("its decoder does not undo its pre-tokenizer")
    }
    splitters = try Splitter.read(file.object("pre_tokenizer"))
    (before, after) = try Self.readTemplate(file.object("post_processor"))
  }

  public func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] {
    var tokens: [Int] = addingSpecialTokens ? before : []
    // Added tokens that stand in the text as it is, then, in what lies between, those in the normalized text.
    for (i, part) in split(Array(text.utf8), normalized: false).enumerated() {
      guard case .text(let raw) = part else {
        tokens.append(part.token)
        continue
      }
      let normal =
        normalizers.isEmpty
        ? raw : Array(normalizers.reduce(String(decoding: raw, as: UTF8.self)) { $1.apply($0) }.utf8)
      for (j, part) in split(normal, normalized: true).enumerated() {
        guard case .text(let bytes) = part else {
          tokens.append(part.token)
          continue
        }
        let pieces = splitters.reduce([String(decoding: bytes, as: UTF8.self)]) {
          $1.apply($0, isFirst: i == 0 && j == 0)
        }
        for piece in pieces { appendTokens(of: Array(piece.utf8), to: &tokens) }
      }
    }
    return addingSpecialTokens ? tokens + after : tokens
  }

  public func token(named name: String) -> Int? {
    let bytes = characters == nil ? ByteAlphabet.bytes(name) : Array(name.utf8)
    return added.first { Array($0.name.utf8) == Array(name.utf8) }?.id ?? bytes.flatMap { tokenOfBytes[$0] }
  }

  /// Those of added tokens are nil: a model does not write them as text.
  public func bytes(of token: Int) -> [UInt8]? {
    guard let bytes = bytesOfToken[token], !idsOfAdded.contains(token) else { return nil }
    return characters.map { $0.decoder.bytes(String(decoding: bytes, as: UTF8.self)) } ?? bytes
  }

  /// Those of byte-level BPE, of the text as it is, not normalized.
  public func words(_ text: String) -> [[Int]]? {
    if characters != nil { return nil }
    return splitters.reduce([text]) { $1.apply($0, isFirst: true) }.map { piece in
      var tokens: [Int] = []
      appendTokens(of: Array(piece.utf8), to: &tokens)
      return tokens
    }
  }

  public func decode(_ tokens: [Int]) -> String {
    guard let characters else {
      return String(decoding: tokens.flatMap { bytesOfToken[$0] ?? [] }, as: UTF8.self)
    }
    return characters.decoder.text(
      tokens.compactMap { bytesOfToken[$0] }.map { String(decoding: $0, as: UTF8.self) })
  }

  /// What a token id can be: Core ML takes int32.
  private static let ids = 0..<Int(Int32.max)

  // MARK: - Added tokens

  private enum Part {
    case text([UInt8])
    case added(Int)
    var token: Int { if case .added(let id) = self { id } else { 0 } }
  }

  /// `text` cut at the added tokens: at each place the longest of those that begin first.
  private func split(_ text: [UInt8], normalized: Bool) -> [Part] {
    let candidates = Dictionary(grouping: added.filter { $0.normalized == normalized }) { $0.bytes[0] }
    guard !candidates.isEmpty else { return text.isEmpty ? [] : [.text(text)] }
    var parts: [Part] = []
    var start = 0
    var i = 0
    while i < text.count {
      let here = candidates[text[i]]?.filter { text[i...].starts(with: $0.bytes) }
      guard let token = here?.max(by: { $0.bytes.count < $1.bytes.count }) else {
        i += 1
        continue
      }
      var end = i + token.bytes.count
      var left = i
      if token.stripsLeft { left -= Whitespace.trailing(text[start..<i]) }
      if token.stripsRight { end += Whitespace.leading(text[end...]) }
      if left > start { parts.append(.text(Array(text[start..<left]))) }
      parts.append(.added(token.id))
      start = end
      i = end
    }
    if start < text.count { parts.append(.text(Array(text[start...]))) }
    return parts
  }

  // MARK: - Merging

  /// Merge the pair of lowest rank, the leftmost first, until none is left.
  private func appendTokens(of piece: [UInt8], to tokens: inout [Int]) {
    if takesWholePieces, let token = tokenOfBytes[piece] {
      tokens.append(token)
      return
    }
    var symbols = symbols(of: piece)
    guard symbols.count > 1, !merges.isEmpty else {
      tokens.append(contentsOf: symbols)
      return
    }
    // A doubly linked list through the symbols; a merged one's right half is left out of it.
    var next = Array(1...symbols.count)
    var previous = Array(-1..<symbols.count - 1)
    var alive = [Bool](repeating: true, count: symbols.count)
    var queue = MergeQueue()
    func merge(at i: Int) -> Merge? {
      next[i] < symbols.count ? merges[Self.pair(symbols[i], symbols[next[i]])] : nil
    }
    func offer(_ i: Int) {
      if let merge = merge(at: i) { queue.insert(.init(rank: merge.rank, position: i)) }
    }
    for i in symbols.indices { offer(i) }
    while let first = queue.removeFirst() {
      let i = first.position
      // What lay here when it was queued may have been merged since.
      guard alive[i], let merge = merge(at: i), merge.rank == first.rank else { continue }
      let j = next[i]
      symbols[i] = merge.token
      alive[j] = false
      next[i] = next[j]
      if next[i] < symbols.count { previous[next[i]] = i }
      offer(i)
      if previous[i] >= 0 { offer(previous[i]) }
    }
    for i in symbols.indices where alive[i] { tokens.append(symbols[i]) }
  }

  /// The tokens from which merging begins.
  private func symbols(of piece: [UInt8]) -> [Int] {
    guard let characters else { return piece.compactMap { tokenOfByte[Int($0)] } }
    var symbols: [Int] = []
    var wasUnknown = false
    for scalar in String(decoding: piece, as: UTF8.self).unicodeScalars {
      let bytes = Array(String(scalar).utf8)
      let fallback = bytes.compactMap { tokenOfByte[Int($0)] }
      var isUnknown = false
      if let token = tokenOfBytes[bytes] {
        symbols.append(token)
      } else if fallback.count == bytes.count {
        symbols += fallback
      } else if let unknown = characters.unknown {
        isUnknown = true
        if !wasUnknown || !characters.fusesUnknown { symbols.append(unknown) }
      }
      wasUnknown = isUnknown
    }
    return symbols
  }

  private static func pair(_ left: Int, _ right: Int) -> UInt64 {
    UInt64(UInt32(truncatingIfNeeded: left)) << 32 | UInt64(UInt32(truncatingIfNeeded: right))
  }

  /// Token texts and their ids. A dictionary takes texts that are canonically equivalent for one, and a vocabulary of
  /// characters can have both: where ids are missing, the members of the file are read one by one.
  private static func entries(_ vocabulary: [String: Int], _ file: Data) -> [(String, Int)] {
    let ids = Set(vocabulary.values)
    guard ids.count <= ids.max() ?? 0,
      case .object(let members)? = (try? JSONText(String(decoding: file, as: UTF8.self)))?["model"]?["vocab"]
    else { return vocabulary.map { ($0, $1) } }
    return members.compactMap { member in
      guard case .number(let digits) = member.value, let id = Int(digits) else { return nil }
      return (member.name, id)
    }
  }

  private static func readMerges(
    _ list: [Any], _ tokens: [[UInt8]: Int], _ bytes: (String) -> [UInt8]?
  ) throws -> [UInt64: Merge] {
    var merges: [UInt64: Merge] = [:]
    for (rank, item) in list.enumerated() {
      // "a b", or ["a", "b"] since tokenizers 0.20
      let halves = (item as? [String]) ?? (item as? String)?.split(separator: " ").map(String.init) ?? []
      guard halves.count == 2, let a = bytes(halves[0]), let b = bytes(halves[1]),
        let left = tokens[a], let right = tokens[b], let both = tokens[a + b]
      else { throw Refused("its merge number \(rank) is damaged") }
      merges[pair(left, right)] = Merge(rank: rank, token: both)
    }
    return merges
  }

  // MARK: - The file's other parts

  private static func isByteLevel(decoder: JSON?) -> Bool {
    switch decoder?["type"] as? String {
    case "ByteLevel": true
    case "Sequence": (decoder?["decoders"] as? [JSON])?.map { $0["type"] as? String } == ["ByteLevel"]
    default: false
    }
  }

  /// Ids before and after every text.
  private static func readTemplate(_ processor: JSON?) throws -> ([Int], [Int]) {
    guard let processor else { return ([], []) }
    switch processor["type"] as? String {
    case "ByteLevel":  // changes offsets only
      return ([], [])
    case "Sequence":
      return try (processor["processors"] as? [JSON] ?? []).reduce(([], [])) { around, next in
        let (before, after) = try readTemplate(next)
        return (before + around.0, around.1 + after)
      }
    case "RobertaProcessing":
      guard let first = (processor["cls"] as? [Any])?.last as? Int,
        let last = (processor["sep"] as? [Any])?.last as? Int
      else { throw Refused("its post-processor is damaged") }
      return ([first], [last])
    case "TemplateProcessing":
      var sides: [[Int]] = [[], []]
      var side = 0
      let special = processor.object("special_tokens") ?? [:]
      for item in processor["single"] as? [JSON] ?? [] {
        if item["Sequence"] != nil { side = 1 }
        guard let name = item.object("SpecialToken")?["id"] as? String else { continue }
        guard let ids = special.object(name)?["ids"] as? [Int] else {
          throw Refused("its template names \(name) without ids")
        }
        sides[side] += ids
      }
      return (sides[0], sides[1])
    case let kind:
      throw Refused("its post-processor is \(kind ?? "unknown"), which is not supported")
    }
  }
}

/// Pairs that can be merged, the lowest rank first, then the leftmost: a binary heap.
private struct MergeQueue {
  struct Entry: Comparable {
    let rank: Int
    let position: Int
    static func < (a: Entry, b: Entry) -> Bool { (a.rank, a.position) < (b.rank, b.position) }
  }
  private var heap: [Entry] = []

  mutating func insert(_ entry: Entry) {
    heap.append(entry)
    var i = heap.count - 1
    while i > 0, heap[i] < heap[(i - 1) / 2] {
      heap.swapAt(i, (i - 1) / 2)
      i = (i - 1) / 2
    }
  }

  mutating func removeFirst() -> Entry? {
    guard let first = heap.first else { return nil }
    let last = heap.removeLast()
    if heap.isEmpty { return first }
    heap[0] = last
    var i = 0
    while true {
      var least = i
      for child in [2 * i + 1, 2 * i + 2] where child < heap.count && heap[child] < heap[least] {
        least = child
      }
      if least == i { return first }
      heap.swapAt(i, least)
      i = least
    }
  }
}
