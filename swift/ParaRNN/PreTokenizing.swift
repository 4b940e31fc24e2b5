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

/// What is done to a text before it is cut.
enum Normalizer: Sendable {
  case form(Form)
  case prepend(String)
  case replace(String, with: String)

  /// One of Unicode's normalization forms.
  enum Form: String {
    case nfc = "NFC"
    case nfd = "NFD"
    case nfkc = "NFKC"
    case nfkd = "NFKD"
  }

  static func read(_ json: JSON?) throws -> [Normalizer] {
    guard let json else { return [] }
    let kind = json["type"] as? String ?? "unknown"
    if kind == "Sequence" { return try (json["normalizers"] as? [JSON] ?? []).flatMap(read) }
    if let form = Form(rawValue: kind) { return [.form(form)] }
    if kind == "Prepend", let text = json["prepend"] as? String { return [.prepend(text)] }
    if kind == "Replace", let pattern = json.object("pattern")?["String"] as? String, !pattern.isEmpty,
      let content = json["content"] as? String
    {
      return [.replace(pattern, with: content)]
    }
    throw BPETokenizer.Refused("its normalizer is \(kind), which is not supported")
  }

  func apply(_ text: String) -> String {
    switch self {
    case .form(.nfc): text.precomposedStringWithCanonicalMapping
    case .form(.nfd): text.decomposedStringWithCanonicalMapping
    // In two steps: Foundation on Linux leaves some Hangul decomposed in one.
    case .form(.nfkc): text.decomposedStringWithCompatibilityMapping.precomposedStringWithCanonicalMapping
    case .form(.nfkd): text.decomposedStringWithCompatibilityMapping
    case .prepend(let before): text.isEmpty ? text : before + text
    case .replace(let pattern, let content):
      text.replacingOccurrences(of: pattern, with: content, options: .literal)
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
  /// Each match ends a piece.
  case endings(Pattern)
  case metaspace(Metaspace)

  /// GPT-2's, which the ByteLevel pre-tokenizer applies by itself.
  static let gpt2 = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

  /// The names of all that `json` is made of.
  static func kinds(_ json: JSON?) -> [String] {
    guard let json else { return [] }
    return [json["type"] as? String ?? ""] + (json["pretokenizers"] as? [JSON] ?? []).flatMap(kinds)
  }

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
      case (let regex?, "MergedWithPrevious", false): return [.endings(try Pattern(regex))]
      case (let regex?, "Removed", true): return [.pattern(try Pattern(regex), keepsRest: false)]
      default: throw BPETokenizer.Refused("it splits texts in a way that is not supported")
      }
    case "Metaspace":
      guard let metaspace = Metaspace(json) else {
        throw BPETokenizer.Refused("its pre-tokenizer is damaged")
      }
      return [.metaspace(metaspace)]
    case let kind:
      throw BPETokenizer.Refused("its pre-tokenizer is \(kind ?? "unknown"), which is not supported")
    }
  }

  /// - Parameter isFirst: whether the whole text begins with the first of `pieces`.
  func apply(_ pieces: [String], isFirst: Bool) -> [String] {
    switch self {
    case .pattern(let pattern, let keepsRest): pieces.flatMap { pattern.split($0, keepsRest: keepsRest) }
    case .digits(let single): pieces.flatMap { Self.splitDigits($0, single: single) }
    case .prefixSpace: pieces.map { $0.unicodeScalars.first == " " ? $0 : " " + $0 }
    case .endings(let pattern): pieces.flatMap(pattern.splitAfterMatches)
    case .metaspace(let metaspace):
      pieces.enumerated().flatMap { metaspace.apply($1, isFirst: isFirst && $0 == 0) }
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
    parts(text).compactMap { keepsRest || $0.isMatch ? $0.text : nil }
  }

  /// Each match goes with what stands before it; of several in a row the first alone.
  func splitAfterMatches(_ text: String) -> [String] {
    var pieces: [String] = []
    var wasMatch = false
    for part in parts(text) {
      if part.isMatch && !wasMatch && !pieces.isEmpty {
        pieces[pieces.count - 1] += part.text
      } else {
        pieces.append(part.text)
      }
      wasMatch = part.isMatch
    }
    return pieces
  }

  /// The matches and what lies between them.
  private func parts(_ text: String) -> [(text: String, isMatch: Bool)] {
    let units = text as NSString
    var parts: [(text: String, isMatch: Bool)] = []
    var end = 0
    func add(_ range: NSRange, _ isMatch: Bool) {
      if range.length > 0 { parts.append((units.substring(with: range), isMatch)) }
    }
    for match in expression.matches(in: text, range: NSRange(location: 0, length: units.length)) {
      add(NSRange(location: end, length: match.range.location - end), false)
      add(match.range, true)
      end = match.range.location + match.range.length
    }
    add(NSRange(location: end, length: units.length - end), false)
    return parts
  }
}
