/// What the library needs of a tokenizer. The built-in ones are ``ByteTokenizer`` and ``BPETokenizer``.
public protocol ParaRNNTokenizer: Sendable {
  /// One more than the largest token id; nil if the tokenizer does not tell.
  var vocabularySize: Int? { get }

  /// Token ids of `text`.
  ///
  /// - Parameter addingSpecialTokens: put what the tokenizer puts around every text, a beginning of text mostly.
  func encode(_ text: String, addingSpecialTokens: Bool) -> [Int]

  /// The text of some tokens. Bytes that are not UTF-8, also a character cut off at the end, become U+FFFD.
  func decode(_ tokens: [Int]) -> String

  /// The id of a token as tokenizer.json writes it; nil if there is none, or the tokenizer does not tell. Needed for
  /// models that use tools alone.
  func token(named name: String) -> Int?

  /// The bytes that a token adds to a text; nil for one that is no text, and where the tokenizer does not tell. Needed
  /// for ``GenerationOptions/schema`` alone.
  func bytes(of token: Int) -> [UInt8]?

  /// Token ids of each word of `text`, the pieces that are made into tokens one by one, where nothing in it stands for an
  /// added token; nil where the tokenizer does not tell. Needed for ``Completer`` alone.
  func words(_ text: String) -> [[Int]]?
}

extension ParaRNNTokenizer {
  public var vocabularySize: Int? { nil }
  public func token(named name: String) -> Int? { nil }
  public func bytes(of token: Int) -> [UInt8]? { nil }
  public func words(_ text: String) -> [[Int]]? { nil }
}

/// Tokens are the bytes of UTF-8: for models trained on raw bytes.
public struct ByteTokenizer: ParaRNNTokenizer {
  public init() {}

  public var vocabularySize: Int? { 256 }

  public func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] { text.utf8.map(Int.init) }

  public func bytes(of token: Int) -> [UInt8]? { UInt8(exactly: token).map { [$0] } }

  public func words(_ text: String) -> [[Int]]? { [text.utf8.map(Int.init)] }

  /// Ids from 256 on are no bytes and have no text.
  public func decode(_ tokens: [Int]) -> String {
    String(decoding: tokens.compactMap { UInt8(exactly: $0) }, as: UTF8.self)
  }
}
