/// What a JSON text may be, byte by byte: the grammar that holds a model's calls to their schema.
///
/// No spaces between the parts; an object's members stand in the order of its schema.
indirect enum JSONGrammar: Sendable {
  case bytes(ByteSet)
  case sequence([JSONGrammar])
  case choice([JSONGrammar])
  /// So many times, without an upper bound if `most` is nil.
  case repeated(JSONGrammar, least: Int, most: Int?)
  /// The members of an object from one on, and its closing brace.
  case members([Member], from: Int, isFirst: Bool)
  /// Any JSON value.
  case anyValue

  struct Member: Sendable {
    let name: String
    let value: JSONGrammar
    let isRequired: Bool
  }

  static func text(_ text: String) -> JSONGrammar {
    .sequence(text.utf8.map { .bytes(ByteSet([$0])) })
  }

  static func object(_ members: [Member]) -> JSONGrammar {
    .sequence([.text("{"), .members(members, from: 0, isFirst: true)])
  }

  static func array(_ item: JSONGrammar, least: Int, most: Int?) -> JSONGrammar {
    let more = JSONGrammar.repeated(
      .sequence([.text(","), item]), least: max(least - 1, 0), most: most.map { max($0 - 1, 0) })
    let filled = JSONGrammar.sequence([item, more])
    let inside: JSONGrammar =
      most == 0 ? .text("") : least > 0 ? filled : .choice([.text(""), filled])
    return .sequence([.text("["), inside, .text("]")])
  }

  static func string(least: Int, most: Int?) -> JSONGrammar {
    .sequence([.text("\""), .repeated(character, least: least, most: most), .text("\"")])
  }

  static let integer = JSONGrammar.sequence([optional(.text("-")), wholeNumber])

  static let number = JSONGrammar.sequence([
    integer,
    optional(.sequence([.text("."), digits])),
    optional(.sequence([.bytes(ByteSet("eE".utf8)), optional(.bytes(ByteSet("+-".utf8))), digits])),
  ])

  static let anyObject = JSONGrammar.sequence([
    .text("{"),
    .choice([
      .text(""), .sequence([anyMember, .repeated(.sequence([.text(","), anyMember]), least: 0, most: nil)]),
    ]),
    .text("}"),
  ])

  // MARK: - Parts

  private static let anyMember = JSONGrammar.sequence([string(least: 0, most: nil), .text(":"), .anyValue])

  fileprivate static let anyValueChoices = JSONGrammar.choice([
    anyObject, array(.anyValue, least: 0, most: nil), string(least: 0, most: nil), number, .text("true"),
    .text("false"), .text("null"),
  ])

  private static let digit = JSONGrammar.bytes(ByteSet("0123456789".utf8))
  private static let digits = JSONGrammar.repeated(digit, least: 1, most: nil)
  private static let wholeNumber = JSONGrammar.choice([
    .text("0"), .sequence([.bytes(ByteSet("123456789".utf8)), .repeated(digit, least: 0, most: nil)]),
  ])

  private static func optional(_ grammar: JSONGrammar) -> JSONGrammar { .choice([.text(""), grammar]) }

  /// A character of a string: UTF-8, or an escape; those by number for what cannot be written otherwise.
  private static let character: JSONGrammar = {
    func range(_ range: ClosedRange<UInt8>) -> JSONGrammar { .bytes(ByteSet(range)) }
    let tail = range(0x80...0xBF)
    let hexadecimal = JSONGrammar.bytes(ByteSet("0123456789abcdefABCDEF".utf8))
    let control = JSONGrammar.choice([
      .sequence([.bytes(ByteSet("01".utf8)), hexadecimal]),
      .sequence([.text("7"), .bytes(ByteSet("fF".utf8))]),
    ])
    return .choice([
      .bytes(ByteSet((0x20...0x7E).filter { $0 != UInt8(ascii: "\"") && $0 != UInt8(ascii: "\\") })),
      .sequence([range(0xC2...0xDF), tail]),
      .sequence([range(0xE0...0xE0), range(0xA0...0xBF), tail]),
      .sequence([range(0xE1...0xEC), tail, tail]),
      .sequence([range(0xED...0xED), range(0x80...0x9F), tail]),
      .sequence([range(0xEE...0xEF), tail, tail]),
      .sequence([range(0xF0...0xF0), range(0x90...0xBF), tail, tail]),
      .sequence([range(0xF1...0xF3), tail, tail, tail]),
      .sequence([range(0xF4...0xF4), range(0x80...0x8F), tail, tail]),
      .sequence([.text("\\"), .bytes(ByteSet("\"\\bfnrt".utf8))]),
      .sequence([.text("\\u00"), control]),
    ])
  }()
}

/// How far a text has got in a grammar: every way in which it can go on.
struct GrammarMatcher: Sendable {
  /// What is still to come, the next part first.
  private final class Rest: Sendable {
    let first: JSONGrammar
    let then: Rest?
    init(_ first: JSONGrammar, _ then: Rest?) {
      self.first = first
      self.then = then
    }
  }

  private var ways: [(next: ByteSet, then: Rest?)] = []
  /// What the ways were found in.
  private var opened: [Rest?] = []
  /// True if the text is complete; more may be allowed nevertheless.
  private(set) var isComplete = false

  init(_ grammar: JSONGrammar) {
    opened = [Rest(grammar, nil)]
    open(opened[0])
  }

  /// Equal for matchers that came of the same one and can go on in the same ways.
  struct Key: Hashable {
    fileprivate let opened: [ObjectIdentifier?]
  }
  var key: Key { Key(opened: opened.map { $0.map(ObjectIdentifier.init) }) }

  /// The bytes that may come next; none after the end.
  var allowed: ByteSet { ways.reduce(into: ByteSet()) { $0.formUnion($1.next) } }

  /// True if nothing can follow.
  var isStopped: Bool { ways.isEmpty }

  /// Take the next byte, one of ``allowed``.
  mutating func take(_ byte: UInt8) {
    let taken = ways.filter { $0.next.contains(byte) }
    ways = []
    opened = []
    isComplete = false
    for way in taken where !opened.contains(where: { $0 === way.then }) {
      opened.append(way.then)
      open(way.then)
    }
  }

  /// Find the bytes with which `rest` can begin.
  private mutating func open(_ rest: Rest?) {
    guard let rest else {
      isComplete = true
      return
    }
    let then = rest.then
    switch rest.first {
    case .bytes(let set): ways.append((set, then))
    case .sequence(let parts): open(parts.reversed().reduce(then) { Rest($1, $0) })
    case .choice(let choices): for choice in choices { open(Rest(choice, then)) }
    case .anyValue: open(Rest(.anyValueChoices, then))
    case .repeated(let part, let least, let most):
      if least == 0 { open(then) }
      if least == 0, most == nil {
        open(Rest(part, rest))
      } else if most != 0 {
        open(Rest(part, Rest(.repeated(part, least: max(least - 1, 0), most: most.map { $0 - 1 }), then)))
      }
    case .members(let members, let from, let isFirst):
      guard from < members.count else {
        open(Rest(.text("}"), then))
        return
      }
      let member = members[from]
      let key = (isFirst ? "" : ",") + JSONText.quoted(member.name) + ":"
      let following = Rest(.members(members, from: from + 1, isFirst: false), then)
      open(Rest(.text(key), Rest(member.value, following)))
      if !member.isRequired {
        open(Rest(.members(members, from: from + 1, isFirst: isFirst), then))
      }
    }
  }
}

/// A set of bytes.
struct ByteSet: Sendable, Equatable {
  private var words: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)

  init() {}

  init(_ bytes: some Sequence<UInt8>) { for byte in bytes { insert(byte) } }

  static let all = ByteSet(0...255)

  mutating func insert(_ byte: UInt8) {
    let bit = UInt64(1) << UInt64(byte & 63)
    switch byte >> 6 {
    case 0: words.0 |= bit
    case 1: words.1 |= bit
    case 2: words.2 |= bit
    default: words.3 |= bit
    }
  }

  mutating func formUnion(_ other: ByteSet) {
    words.0 |= other.words.0
    words.1 |= other.words.1
    words.2 |= other.words.2
    words.3 |= other.words.3
  }

  func contains(_ byte: UInt8) -> Bool {
    let word =
      switch byte >> 6 {
      case 0: words.0
      case 1: words.1
      case 2: words.2
      default: words.3
      }
    return word >> UInt64(byte & 63) & 1 == 1
  }

  static func == (a: ByteSet, b: ByteSet) -> Bool { a.words == b.words }
}
