/// Turns tokens into text as they come, whole characters (Unicode scalars) only.
///
/// Tokens are decoded together with those before them, since many tokenizers write a token differently at the
/// beginning of a text; what a next token may still complete is held back.
struct Detokenizer: Sendable {
  private let tokenizer: any ParaRNNTokenizer
  private var window: [Int] = []
  /// How many scalars of the window's text have been given.
  private var given = 0
  private static let replacement: Unicode.Scalar = "\u{FFFD}"
  private static let longest = 32

  init(_ tokenizer: any ParaRNNTokenizer) { self.tokenizer = tokenizer }

  /// The text that `token` adds; "" while a character is incomplete.
  mutating func append(_ token: Int) -> String {
    window.append(token)
    let scalars = Array(tokenizer.decode(window).unicodeScalars)
    // A cut-off character is one U+FFFD or, with some tokenizers, one for each of its up to three bytes.
    let incomplete = scalars.reversed().prefix(3).prefix { $0 == Self.replacement }.count
    let piece = text(scalars, upTo: scalars.count - incomplete)
    if incomplete == 0 {
      startAfter(window.count - 1)
    } else if window.count > Self.longest {
      cutInvalid(scalars)
    }
    return piece
  }

  /// What has been held back, once no more tokens come.
  mutating func finish() -> String {
    let scalars = Array(tokenizer.decode(window).unicodeScalars)
    let piece = text(scalars, upTo: scalars.count)
    window = []
    given = 0
    return piece
  }

  private mutating func text(_ scalars: [Unicode.Scalar], upTo end: Int) -> String {
    guard end > given else { return "" }
    var piece = String.UnicodeScalarView()
    piece.append(contentsOf: scalars[given..<end])
    given = end
    return String(piece)
  }

  /// Keep only the tokens from `first` on, as context for the next ones.
  private mutating func startAfter(_ first: Int) {
    window.removeFirst(first)
    given = tokenizer.decode(window).unicodeScalars.count
  }

  /// A long run of bytes that are no text never ends in a whole character: forget what no longer matters.
  private mutating func cutInvalid(_ scalars: [Unicode.Scalar]) {
    for tail in 4...8 {
      let rest = Array(window.suffix(tail))
      let first = tokenizer.decode(Array(window.dropLast(tail))).unicodeScalars
      let second = tokenizer.decode(rest).unicodeScalars
      if first.count + second.count == scalars.count, first.count <= given,
        Array(first) + Array(second) == scalars
      {
        window = rest
        given -= first.count
        return
      }
    }
  }
}
