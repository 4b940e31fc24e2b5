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

/// Ends a text before the first of some texts, and holds back what may be the beginning of one.
struct StopTexts: Sendable {
  private let stops: [[UInt8]]
  private var held: [UInt8] = []
  private(set) var isFound = false

  init(_ stops: [String]) { self.stops = stops.map { Array($0.utf8) } }

  /// What of the text so far can be given.
  mutating func append(_ piece: String) -> String {
    if stops.isEmpty { return piece }
    held += Array(piece.utf8)
    for at in held.indices where stops.contains(where: { held[at...].starts(with: $0) }) {
      isFound = true
      defer { held = [] }
      return String(decoding: held[..<at], as: UTF8.self)
    }
    let first = held.indices.first { at in stops.contains { $0.starts(with: held[at...]) } } ?? held.count
    defer { held.removeFirst(first) }
    return String(decoding: held[..<first], as: UTF8.self)
  }

  /// What has been held back, once no more comes.
  mutating func finish() -> String {
    defer { held = [] }
    return String(decoding: held, as: UTF8.self)
  }
}
