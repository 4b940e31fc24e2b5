import Foundation

/// A JSON value that keeps the order of an object's members and the digits of a number.
indirect enum JSONText: Equatable, Sendable {
  case null
  case bool(Bool)
  /// As it is written.
  case number(String)
  case string(String)
  case array([JSONText])
  case object([Member])

  struct Member: Equatable, Sendable {
    let name: String
    let value: JSONText
  }

  /// - Throws: ``Malformed``
  init(_ text: String) throws {
    var reader = Reader(bytes: Array(text.utf8))
    self = try reader.document()
  }

  struct Malformed: Error {}

  /// The member of an object; nil if there is none.
  subscript(name: String) -> JSONText? {
    guard case .object(let members) = self else { return nil }
    return members.last { $0.name == name }?.value
  }

  /// Without spaces, characters beyond ASCII as they are.
  var text: String {
    switch self {
    case .null: "null"
    case .bool(let value): value ? "true" : "false"
    case .number(let digits): digits
    case .string(let string): Self.quoted(string)
    case .array(let items): "[" + items.map(\.text).joined(separator: ",") + "]"
    case .object(let members):
      "{" + members.map { Self.quoted($0.name) + ":" + $0.value.text }.joined(separator: ",") + "}"
    }
  }

  static func quoted(_ string: String) -> String {
    var result = "\""
    for scalar in string.unicodeScalars {
      switch scalar {
      case "\"": result += "\\\""
      case "\\": result += "\\\\"
      case "\n": result += "\\n"
      case "\r": result += "\\r"
      case "\t": result += "\\t"
      case "\u{8}": result += "\\b"
      case "\u{C}": result += "\\f"
      case _ where scalar.value < 0x20:
        let digits = String(scalar.value, radix: 16)
        result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
      default: result.unicodeScalars.append(scalar)
      }
    }
    return result + "\""
  }

  /// RFC 8259, at most 100 values inside each other.
  private struct Reader {
    let bytes: [UInt8]
    var at = 0
    var depth = 0

    var next: UInt8? { at < bytes.count ? bytes[at] : nil }

    mutating func document() throws -> JSONText {
      let value = try value()
      skipSpaces()
      guard at == bytes.count else { throw Malformed() }
      return value
    }

    mutating func value() throws -> JSONText {
      skipSpaces()
      depth += 1
      defer { depth -= 1 }
      guard depth <= 100, let first = next else { throw Malformed() }
      switch first {
      case UInt8(ascii: "{"): return .object(try list("}") { try $0.member() })
      case UInt8(ascii: "["): return .array(try list("]") { try $0.value() })
      case UInt8(ascii: "\""): return .string(try string())
      case UInt8(ascii: "t"): return try word("true", .bool(true))
      case UInt8(ascii: "f"): return try word("false", .bool(false))
      case UInt8(ascii: "n"): return try word("null", .null)
      default: return .number(try number())
      }
    }

    mutating func member() throws -> Member {
      skipSpaces()
      guard next == UInt8(ascii: "\"") else { throw Malformed() }
      let name = try string()
      skipSpaces()
      guard take(":") else { throw Malformed() }
      return Member(name: name, value: try value())
    }

    /// What stands between the bracket here and `end`.
    mutating func list<T>(_ end: Unicode.Scalar, _ item: (inout Reader) throws -> T) throws -> [T] {
      at += 1
      skipSpaces()
      if take(end) { return [] }
      var items: [T] = []
      while true {
        items.append(try item(&self))
        skipSpaces()
        if take(end) { return items }
        guard take(",") else { throw Malformed() }
      }
    }

    mutating func string() throws -> String {
      at += 1
      var text: [UInt8] = []
      while let byte = next {
        at += 1
        switch byte {
        case UInt8(ascii: "\""):
          guard let string = String(validating: text) else { throw Malformed() }
          return string
        case UInt8(ascii: "\\"): text += Array(String(try escape()).utf8)
        case 0..<0x20: throw Malformed()
        default: text.append(byte)
        }
      }
      throw Malformed()
    }

    private mutating func escape() throws -> Unicode.Scalar {
      guard let byte = next else { throw Malformed() }
      at += 1
      let plain: [UInt8: Unicode.Scalar] = [
        UInt8(ascii: "\""): "\"", UInt8(ascii: "\\"): "\\", UInt8(ascii: "/"): "/",
        UInt8(ascii: "b"): "\u{8}",
        UInt8(ascii: "f"): "\u{C}", UInt8(ascii: "n"): "\n", UInt8(ascii: "r"): "\r",
        UInt8(ascii: "t"): "\t",
      ]
      if let scalar = plain[byte] { return scalar }
      guard byte == UInt8(ascii: "u") else { throw Malformed() }
      var code = try hexadecimal()
      if (0xD800..<0xDC00).contains(code) {
        guard take("\\"), take("u") else { throw Malformed() }
        let low = try hexadecimal()
        guard (0xDC00..<0xE000).contains(low) else { throw Malformed() }
        code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
      }
      guard let scalar = Unicode.Scalar(code) else { throw Malformed() }
      return scalar
    }

    private mutating func hexadecimal() throws -> UInt32 {
      guard at + 4 <= bytes.count,
        bytes[at..<at + 4].allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }),
        let code = UInt32(String(decoding: bytes[at..<at + 4], as: UTF8.self), radix: 16)
      else { throw Malformed() }
      at += 4
      return code
    }

    private mutating func number() throws -> String {
      let start = at
      _ = take("-")
      if !take("0") { try digits() }
      if take(".") { try digits() }
      if take("e") || take("E") {
        if !take("+") { _ = take("-") }
        try digits()
      }
      return String(decoding: bytes[start..<at], as: UTF8.self)
    }

    private mutating func digits() throws {
      let start = at
      while let byte = next, (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) { at += 1 }
      if at == start { throw Malformed() }
    }

    private mutating func word(_ word: String, _ value: JSONText) throws -> JSONText {
      guard bytes[at...].starts(with: word.utf8) else { throw Malformed() }
      at += word.utf8.count
      return value
    }

    private mutating func take(_ scalar: Unicode.Scalar) -> Bool {
      guard next == UInt8(ascii: scalar) else { return false }
      at += 1
      return true
    }

    private mutating func skipSpaces() {
      while let byte = next, [0x20, 0x09, 0x0A, 0x0D].contains(byte) { at += 1 }
    }
  }
}

extension String {
  /// The text of bytes; nil if they are no UTF-8.
  fileprivate init?(validating bytes: [UInt8]) {
    self.init(decoding: bytes, as: UTF8.self)
    if !utf8.elementsEqual(bytes) { return nil }
  }
}
