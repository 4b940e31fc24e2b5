/// A byte-level tokenizer's tokens as strings of bytes: a text's, and those that can go on from it.
struct ByteVocabulary: Sendable {
  /// Where a word begins, which is made into tokens by itself: in bytes, and in tokens.
  struct Word: Sendable, Equatable {
    var byte: Int
    var token: Int
  }

  /// Of each token; none of one that is no text.
  let bytes: [[UInt8]]
  private let tokenizer: any ParaRNNTokenizer
  /// Those with bytes, in the order of these.
  private let order: [Int]
  private let areBytes: Bool

  /// nil if the bytes of the tokenizer's tokens are not those of the text, or it does not tell.
  init?(_ tokenizer: any ParaRNNTokenizer, count: Int) {
    self.tokenizer = tokenizer
    let bytes = (0..<count).map { tokenizer.bytes(of: $0) ?? [] }
    self.bytes = bytes
    order = (0..<count).filter { !bytes[$0].isEmpty }.sorted {
      bytes[$0] == bytes[$1] ? $0 < $1 : bytes[$0].lexicographicallyPrecedes(bytes[$1])
    }
    areBytes = bytes.allSatisfy { $0.count <= 1 }
    if encode(Array("x\n é".utf8)[...]) == nil { return nil }
  }

  /// The tokens that the tokenizer puts before every text.
  var beginning: [Int] {
    let plain = tokenizer.encode("x", addingSpecialTokens: false)
    let whole = tokenizer.encode("x", addingSpecialTokens: true)
    return Array(whole.prefix(whole.indices.first { whole[$0...].starts(with: plain) } ?? 0))
  }

  /// The tokens of a text, and where its words begin; nil if their bytes are not the text's.
  func encode(_ text: ArraySlice<UInt8>) -> (tokens: [Int], words: [Word])? {
    guard let made = tokenizer.words(String(decoding: text, as: UTF8.self)) else { return nil }
    let tokens = made.flatMap { $0 }
    var rest = text
    for token in tokens {
      guard bytes.indices.contains(token), rest.starts(with: bytes[token]) else { return nil }
      rest = rest.dropFirst(bytes[token].count)
    }
    if !rest.isEmpty { return nil }
    if areBytes {  // each is a word, but for those of one character
      let begins = text.indices.filter { text[$0] & 0xC0 != 0x80 }.map { $0 - text.startIndex }
      return (tokens, begins.map { Word(byte: $0, token: $0) })
    }
    var words: [Word] = []
    var next = Word(byte: 0, token: 0)
    for word in made where !word.isEmpty {
      words.append(next)
      next = Word(
        byte: next.byte + word.reduce(0) { $0 + bytes[$1].count }, token: next.token + word.count)
    }
    return (tokens, words)
  }

  /// The tokens that begin with `text`, or are it.
  func beginning(with text: [UInt8]) -> ArraySlice<Int> {
    order[
      first {
        !$0.lexicographicallyPrecedes(text)
      }..<first { !$0.starts(with: text) && text.lexicographicallyPrecedes($0) }]
  }

  /// The tokens that `text` begins with, and does not end with.
  func within(_ text: [UInt8]) -> [Int] {
    (1..<max(1, text.count)).compactMap { length in
      let head = Array(text.prefix(length))
      let place = first { !$0.lexicographicallyPrecedes(head) }
      return place < order.count && bytes[order[place]] == head ? order[place] : nil
    }
  }

  /// The first place in the order from which on `holds` is true.
  private func first(_ holds: ([UInt8]) -> Bool) -> Int {
    var (low, high) = (0, order.count)
    while low < high {
      let middle = (low + high) / 2
      if holds(bytes[order[middle]]) { high = middle } else { low = middle + 1 }
    }
    return low
  }
}
