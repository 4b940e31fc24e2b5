/// The bytes of every token of a vocabulary, one after another.
struct VocabularyBytes: Sendable {
  fileprivate let bytes: [UInt8]
  /// Where each token's bytes begin, and where the last one's end.
  fileprivate let starts: [Int]

  /// nil if the tokenizer does not tell.
  init?(_ tokenizer: any ParaRNNTokenizer, count: Int) {
    var bytes: [UInt8] = []
    var starts = [0]
    for token in 0..<count {
      bytes += tokenizer.bytes(of: token) ?? []
      starts.append(bytes.count)
    }
    if bytes.isEmpty { return nil }
    self.bytes = bytes
    self.starts = starts
  }

  var count: Int { starts.count - 1 }
}

/// Which tokens may come next in a text that a grammar holds.
///
/// The grammar becomes an automaton over bytes as far as it is needed: each of its states is found once, and which
/// tokens it allows is looked up once.
struct GuidedTokens: Sendable {
  private let vocabulary: VocabularyBytes
  private var states: [GrammarMatcher]
  private var places: [GrammarMatcher.Key: Int] = [:]
  /// By state and byte: the state after it, ``none`` or ``unknown``.
  private var next: [Int]
  private var masks: [Int: [Bool]] = [:]
  private var state = 0
  private static let none = -1
  private static let unknown = -2

  init(_ grammar: JSONGrammar, _ vocabulary: VocabularyBytes) {
    self.vocabulary = vocabulary
    states = [GrammarMatcher(grammar)]
    next = [Int](repeating: Self.unknown, count: 256)
  }

  var stateCount: Int { states.count }
  /// True if the text so far is whole; more may be allowed nevertheless.
  var isComplete: Bool { states[state].isComplete }
  /// True if nothing can follow.
  var isStopped: Bool { states[state].isStopped }

  /// For each token whether it may come next.
  mutating func allowed() -> [Bool] {
    if let mask = masks[state] { return mask }
    var mask = [Bool](repeating: false, count: vocabulary.count)
    for token in 0..<vocabulary.count { mask[token] = after(token) != Self.none }
    masks[state] = mask
    return mask
  }

  /// Take a token, an allowed one.
  mutating func take(_ token: Int) { state = after(token) }

  /// The state after a token; none for one without bytes.
  private mutating func after(_ token: Int) -> Int {
    var at = vocabulary.starts[token]
    let end = vocabulary.starts[token + 1]
    if at == end { return Self.none }
    var place = state
    while at < end {
      let byte = vocabulary.bytes[at]
      var following = next[place << 8 + Int(byte)]
      if following == Self.unknown { following = find(place, byte) }
      if following == Self.none { return Self.none }
      place = following
      at += 1
    }
    return place
  }

  private mutating func find(_ place: Int, _ byte: UInt8) -> Int {
    var matcher = states[place]
    var found = Self.none
    if matcher.allowed.contains(byte) {
      matcher.take(byte)
      found = places[matcher.key] ?? states.count
      if found == states.count {
        places[matcher.key] = found
        states.append(matcher)
        next += [Int](repeating: Self.unknown, count: 256)
      }
    }
    next[place << 8 + Int(byte)] = found
    return found
  }
}
