import Foundation

typealias JSON = [String: Any]

extension JSON {
  /// The object under `key`; nil for null and for anything else.
  func object(_ key: String) -> JSON? { self[key] as? JSON }
}

/// The printable character that byte-level BPE (GPT-2) writes for each byte: bytes that Latin-1 prints stand for
/// themselves, the others take the code points from 256 on, in order.
enum ByteAlphabet {
  private static let scalars: [Unicode.Scalar] = {
    var others: UInt32 = 0
    return (UInt32(0)...255).map { byte in
      let prints =
        (0x21...0x7E).contains(byte) || (0xA1...0xAC).contains(byte) || (0xAE...0xFF).contains(byte)
      if !prints { others += 1 }
      return Unicode.Scalar(prints ? byte : 255 + others)!
    }
  }()

  private static let byteOfScalar = Dictionary(
    uniqueKeysWithValues: scalars.enumerated().map { ($1, UInt8($0)) })

  /// The character for a byte.
  static func text(_ byte: UInt8) -> String { String(scalars[Int(byte)]) }

  /// The bytes that `text` is written for; nil if it holds another character.
  static func bytes(_ text: String) -> [UInt8]? {
    var bytes: [UInt8] = []
    for scalar in text.unicodeScalars {
      guard let byte = byteOfScalar[scalar] else { return nil }
      bytes.append(byte)
    }
    return bytes
  }
}

/// Whitespace at the ends of UTF-8 text, in bytes.
enum Whitespace {
  static func leading(_ bytes: ArraySlice<UInt8>) -> Int {
    let scalars = String(decoding: bytes, as: UTF8.self).unicodeScalars
    return scalars.prefix { $0.properties.isWhitespace }.reduce(0) { $0 + UTF8.width($1) }
  }

  static func trailing(_ bytes: ArraySlice<UInt8>) -> Int {
    let scalars = String(decoding: bytes, as: UTF8.self).unicodeScalars
    return scalars.reversed().prefix { $0.properties.isWhitespace }.reduce(0) { $0 + UTF8.width($1) }
  }
}

/// One of Unicode's normalization forms.
enum Normalizer: String {
  case nfc = "NFC"
  case nfd = "NFD"
  case nfkc = "NFKC"
  case nfkd = "NFKD"

  static func read(_ json: JSON?) throws -> [Normalizer] {
    guard let json else { return [] }
    let kind = json["type"] as? String ?? "unknown"
    if kind == "Sequence" { return try (json["normalizers"] as? [JSON] ?? []).flatMap(read) }
    guard let one = Normalizer(rawValue: kind) else {
      throw BPETokenizer.Refused("its normalizer is \(kind), which is not supported")
    }
    return [one]
  }

  func apply(_ text: String) -> String {
    switch self {
    case .nfc: text.precomposedStringWithCanonicalMapping
    case .nfd: text.decomposedStringWithCanonicalMapping
    // In two steps: Foundation on Linux leaves some Hangul decomposed in one.
    case .nfkc: text.decomposedStringWithCompatibilityMapping.precomposedStringWithCanonicalMapping
    case .nfkd: text.decomposedStringWithCompatibilityMapping
    }
  }
}

/// Cuts a text into the pieces within which bytes are merged.
enum Splitter: Sendable {
  /// Matches are pieces; what lies between them too, unless it is left out.
  case pattern(Pattern, keepsRest: Bool)
  /// Each digit, or each run of digits, is a piece.
  case digits(single: Bool)
  /// A space goes before each piece that does not begin with one.
  case prefixSpace

  /// GPT-2's, which the ByteLevel pre-tokenizer applies by itself.
  static let gpt2 = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

  static func read(_ json: JSON?) throws -> [Splitter] {
    guard let json else { return [] }
    switch json["type"] as? String {
    case "Sequence":
      return try (json["pretokenizers"] as? [JSON] ?? []).flatMap(read)
    case "ByteLevel":
      let space: [Splitter] = json["add_prefix_space"] as? Bool ?? true ? [.prefixSpace] : []
      return json["use_regex"] as? Bool ?? true
        ? space + [.pattern(try Pattern(gpt2), keepsRest: true)] : space
    case "Digits":
      return [.digits(single: json["individual_digits"] as? Bool ?? false)]
    case "Split":
      let inverted = json["invert"] as? Bool ?? false
      let pattern = json.object("pattern")
      let regex =
        (pattern?["Regex"] as? String)
        ?? (pattern?["String"] as? String).map(NSRegularExpression.escapedPattern(for:))
      switch (regex, json["behavior"] as? String, inverted) {
      case (let regex?, "Isolated", _): return [.pattern(try Pattern(regex), keepsRest: true)]
      case (let regex?, "Removed", true): return [.pattern(try Pattern(regex), keepsRest: false)]
      default: throw BPETokenizer.Refused("it splits texts in a way that is not supported")
      }
    case let kind:
      throw BPETokenizer.Refused("its pre-tokenizer is \(kind ?? "unknown"), which is not supported")
    }
  }

  func apply(_ pieces: [String]) -> [String] {
    switch self {
    case .pattern(let pattern, let keepsRest): pieces.flatMap { pattern.split($0, keepsRest: keepsRest) }
    case .digits(let single): pieces.flatMap { Self.splitDigits($0, single: single) }
    case .prefixSpace: pieces.map { $0.unicodeScalars.first == " " ? $0 : " " + $0 }
    }
  }

  private static func splitDigits(_ text: String, single: Bool) -> [String] {
    var pieces: [String.UnicodeScalarView] = []
    var wasDigit: Bool?
    for scalar in text.unicodeScalars {
      let isDigit = [.decimalNumber, .letterNumber, .otherNumber].contains(scalar.properties.generalCategory)
      if isDigit != wasDigit || (isDigit && single) { pieces.append(.init()) }
      pieces[pieces.count - 1].append(scalar)
      wasDigit = isDigit
    }
    return pieces.map(String.init)
  }
}

/// A regular expression with Oniguruma's meaning, which is Hugging Face's.
struct Pattern: Sendable {
  private let expression: NSRegularExpression

  init(_ pattern: String) throws {
    do {
      expression = try NSRegularExpression(pattern: Self.translated(pattern))
    } catch {
      throw BPETokenizer.Refused("its pattern \(pattern) cannot be read here")
    }
  }

  /// ICU's \s lacks some of the white space that Oniguruma's has.
  private static func translated(_ pattern: String) -> String {
    var result = ""
    var escaped = false
    for c in pattern.unicodeScalars {
      switch (escaped, c) {
      case (true, "s"): result += #"\p{White_Space}"#
      case (true, "S"): result += #"\P{White_Space}"#
      case (true, _): result += "\\" + String(c)
      case (false, "\\"): break
      case (false, _): result.unicodeScalars.append(c)
      }
      escaped = !escaped && c == "\\"
    }
    return result
  }

  func split(_ text: String, keepsRest: Bool) -> [String] {
    let units = text as NSString
    var pieces: [String] = []
    var end = 0
    func add(_ range: NSRange) {
      if range.length > 0 { pieces.append(units.substring(with: range)) }
    }
    for match in expression.matches(in: text, range: NSRange(location: 0, length: units.length)) {
      if keepsRest { add(NSRange(location: end, length: match.range.location - end)) }
      add(match.range)
      end = match.range.location + match.range.length
    }
    if keepsRest { add(NSRange(location: end, length: units.length - end)) }
    return pieces
  }
}
