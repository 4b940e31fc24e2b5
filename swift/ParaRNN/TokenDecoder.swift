import Foundation

/// How the texts of tokens become text where tokens are written as characters (SentencePiece's vocabularies).
struct TokenDecoder: Sendable {
  private enum Step {
    case replace(String, with: String)
    case bytes
    case fuse
    case strip(Unicode.Scalar, start: Int, stop: Int)
    case metaspace(Unicode.Scalar, dropsFirst: Bool)
  }

  private let steps: [Step]

  init(_ json: JSON?) throws { steps = try Self.read(json) }

  private static func read(_ json: JSON?) throws -> [Step] {
    let kind = json?["type"] as? String ?? "unknown"
    switch kind {
    case "Sequence": return try (json?["decoders"] as? [JSON] ?? []).flatMap(read)
    case "Fuse": return [.fuse]
    case "ByteFallback": return [.bytes]
    case "Replace":
      guard let pattern = json?.object("pattern")?["String"] as? String, !pattern.isEmpty,
        let content = json?["content"] as? String
      else { break }
      return [.replace(pattern, with: content)]
    case "Strip":
      guard let content = (json?["content"] as? String)?.unicodeScalars, content.count == 1,
        let start = json?["start"] as? Int, let stop = json?["stop"] as? Int, min(start, stop) >= 0
      else { break }
      return [.strip(content.first!, start: start, stop: stop)]
    case "Metaspace":
      guard let metaspace = Metaspace(json) else { break }
      return [.metaspace(metaspace.replacement, dropsFirst: metaspace.scheme != .never)]
    default: break
    }
    throw BPETokenizer.Refused("its decoder is \(kind), which is not supported")
  }

  func text(_ tokens: [String]) -> String {
    steps.reduce(tokens) { Self.apply($1, to: $0) }.joined()
  }

  /// What a token adds within a text, where nothing is taken off its ends.
  func bytes(_ token: String) -> [UInt8] {
    var text = token
    for step in steps {
      switch step {
      case .bytes: if let byte = Self.byte(text) { return [byte] }
      case .replace: text = Self.apply(step, to: [text])[0]
      case .metaspace(let replacement, _):
        text = Self.apply(.metaspace(replacement, dropsFirst: false), to: [text])[0]
      case .fuse, .strip: break
      }
    }
    return Array(text.utf8)
  }

  private static func apply(_ step: Step, to tokens: [String]) -> [String] {
    switch step {
    case .replace(let pattern, let content):
      tokens.map { $0.replacingOccurrences(of: pattern, with: content, options: .literal) }
    case .bytes: joiningBytes(tokens)
    case .fuse: [tokens.joined()]
    case .strip(let scalar, let start, let stop):
      tokens.map { token in
        var rest = token.unicodeScalars[...]
        rest = rest.dropFirst(rest.prefix(start).prefix { $0 == scalar }.count)
        rest = rest.dropLast(rest.suffix(stop).reversed().prefix { $0 == scalar }.count)
        return String(rest)
      }
    case .metaspace(let replacement, let dropsFirst):
      tokens.enumerated().map { i, token in
        var text = String.UnicodeScalarView()
        for scalar in token.unicodeScalars where scalar != replacement || !(i == 0 && dropsFirst) {
          text.append(scalar == replacement ? " " : scalar)
        }
        return String(text)
      }
    }
  }

  /// Runs of `<0x41>` as the characters that they are; U+FFFD for each byte of a run that is no text.
  private static func joiningBytes(_ tokens: [String]) -> [String] {
    var result: [String] = []
    var run: [UInt8] = []
    func end() {
      if run.isEmpty { return }
      let text = String(decoding: run, as: UTF8.self)
      result += Array(text.utf8) == run ? [text] : run.map { _ in "\u{FFFD}" }
      run = []
    }
    for token in tokens {
      if let byte = byte(token) {
        run.append(byte)
      } else {
        end()
        result.append(token)
      }
    }
    end()
    return result
  }

  /// The token of a byte, as byte fallback writes it.
  static func name(_ byte: UInt8) -> String { String(format: "<0x%02X>", byte) }

  private static func byte(_ token: String) -> UInt8? {
    guard token.utf8.count == 6, token.hasPrefix("<0x"), token.hasSuffix(">") else { return nil }
    return UInt8(token.dropFirst(3).prefix(2), radix: 16)
  }
}

/// SentencePiece's sign for a space, and where one goes before a text.
struct Metaspace: Sendable {
  enum Scheme: String { case always, first, never }
  let replacement: Unicode.Scalar
  let scheme: Scheme
  let splits: Bool

  /// nil if `json` describes none.
  init?(_ json: JSON?) {
    let text = (json?["replacement"] as? String ?? "▁").unicodeScalars
    let old = json?["add_prefix_space"] as? Bool ?? true ? "always" : "never"
    guard text.count == 1, let scheme = Scheme(rawValue: json?["prepend_scheme"] as? String ?? old) else {
      return nil
    }
    replacement = text.first!
    self.scheme = scheme
    splits = json?["split"] as? Bool ?? true
  }

  /// - Parameter isFirst: whether the whole text begins with `text`.
  func apply(_ text: String, isFirst: Bool) -> [String] {
    var scalars = String.UnicodeScalarView()
    scalars.append(contentsOf: text.unicodeScalars.map { $0 == " " ? replacement : $0 })
    let prepends = scheme == .always || (scheme == .first && isFirst)
    if prepends, scalars.first != replacement { scalars.insert(replacement, at: scalars.startIndex) }
    guard splits else { return [String(scalars)] }
    // A piece begins at each sign; of several in a row the last alone goes with what follows.
    var pieces: [String.UnicodeScalarView] = []
    for scalar in scalars {
      if scalar == replacement || pieces.isEmpty { pieces.append(.init()) }
      pieces[pieces.count - 1].append(scalar)
    }
    return pieces.map(String.init)
  }
}
