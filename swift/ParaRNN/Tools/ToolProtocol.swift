import Foundation

/// A command by which a model moves or reads a pointer.
public struct PointerCommand: Sendable, Hashable {
  public enum Action: String, Sendable, CaseIterable { case read, right, left, last }
  public let action: Action
  /// 1 to 4
  public let pointer: Int

  /// Its token, as in tokenizer.json.
  public var name: String { "<|\(action.rawValue)\(pointer)|>" }

  static let all = (1...PointerMemory.pointers).flatMap { pointer in
    Action.allCases.map { PointerCommand(action: $0, pointer: pointer) }
  }
}

/// The token ids by which a model uses tools (docs/tools.md): text is UTF-8, a token a byte; all else is a special
/// token.
struct ToolProtocol: Sendable {
  enum Mark: String, CaseIterable, Sendable { case user, end, answer, call, result, edge }

  let byteIDs: [Int]
  let marks: [Mark: Int]
  let commands: [Int: PointerCommand]
  /// What each byte token stands for.
  let bytes: [Int: UInt8]

  /// The protocol by a tokenizer's ids; nil if it lacks one of the protocol's tokens.
  init?(_ tokenizer: any ParaRNNTokenizer) {
    let byteIDs = (UInt8.min...UInt8.max).compactMap { tokenizer.token(named: ByteAlphabet.text($0)) }
    var marks: [Mark: Int] = [:]
    for mark in Mark.allCases { marks[mark] = tokenizer.token(named: "<|\(mark.rawValue)|>") }
    var commands: [Int: PointerCommand] = [:]
    for command in PointerCommand.all {
      if let id = tokenizer.token(named: command.name) { commands[id] = command }
    }
    guard byteIDs.count == 256, marks.count == Mark.allCases.count, commands.count == PointerCommand.all.count
    else { return nil }
    self.byteIDs = byteIDs
    self.marks = marks
    self.commands = commands
    bytes = Dictionary(uniqueKeysWithValues: byteIDs.enumerated().map { ($1, UInt8($0)) })
  }

  subscript(_ mark: Mark) -> Int { marks[mark]! }

  /// The tokens of a text: bytes only, whatever it looks like.
  func encode(_ text: String) -> [Int] { text.utf8.map { byteIDs[Int($0)] } }

  /// The start of a turn, after which the model goes on; also the memory at that time.
  func render(message: String) -> [Int] { [self[.user]] + encode(Self.plain(message)) + [self[.end]] }

  /// A message without the blanks and line breaks around it, which are one space each inside of it.
  static func plain(_ message: String) -> String {
    let plain = Words.inOneLine(message)
    return plain.isEmpty ? message : plain
  }

  /// Turns that were had, questions and their answers, as text alone: how an answer came about is not in it.
  func render(turns: [ChatMessage]) -> [Int] {
    var tokens: [Int] = []
    for turn in turns {
      tokens += turn.role == .user ? render(message: turn.text) : [self[.answer]]
      if turn.role != .user { tokens += render(result: turn.text) }
    }
    return tokens
  }

  /// What is fed after a call.
  func render(result: String) -> [Int] { encode(result) + [self[.end]] }

  /// A token in words, for events and messages.
  func name(_ token: Int) -> String {
    if let byte = bytes[token] { return Self.quoted(byte) }
    if let mark = marks.first(where: { $0.value == token })?.key { return "<|\(mark.rawValue)|>" }
    return commands[token]?.name ?? "token \(token)"
  }

  private static func quoted(_ byte: UInt8) -> String {
    switch byte {
    case UInt8(ascii: "'"): "\"'\""
    case UInt8(ascii: "\\"): #"'\\'"#
    case UInt8(ascii: "\n"): #"'\n'"#
    case UInt8(ascii: "\r"): #"'\r'"#
    case UInt8(ascii: "\t"): #"'\t'"#
    case 0x20...0x7E: "'\(Unicode.Scalar(byte))'"
    default: "'\\x\(byte < 16 ? "0" : "")\(String(byte, radix: 16))'"
    }
  }
}

/// The entries of a turn and the pointers into it, which start at the first entry. They may stand one entry outside,
/// where they read `edge`. The scheme is that of arXiv 2510.14826.
struct PointerMemory: Sendable {
  static let pointers = 4

  private(set) var entries: [Int]
  private let edge: Int
  private var positions = [Int](repeating: 0, count: pointers)

  init(_ entries: [Int], edge: Int) {
    self.entries = entries
    self.edge = edge
  }

  mutating func append(_ token: Int) { entries.append(token) }

  /// The entry under a pointer.
  func read(_ pointer: Int) -> Int {
    let at = positions[pointer - 1]
    return entries.indices.contains(at) ? entries[at] : edge
  }

  /// By one entry: `step` is 1 or -1.
  mutating func move(_ pointer: Int, _ step: Int) {
    positions[pointer - 1] = max(-1, min(entries.count, positions[pointer - 1] + step))
  }

  mutating func jumpToLast(_ pointer: Int) { positions[pointer - 1] = entries.count - 1 }
}

/// Turns bytes into text as they come; each longest beginning of a character that is none becomes one U+FFFD.
struct UTF8Decoder: Sendable {
  private var held: [UInt8] = []

  /// The text that `byte` completes; "" while a character is incomplete.
  mutating func append(_ byte: UInt8) -> String {
    held.append(byte)
    if Self.canGoOn(held) { return "" }
    if held.count > 1, String(decoding: held, as: UTF8.self).unicodeScalars.count > 1 {
      held.removeLast()
      return finish() + append(byte)
    }
    return finish()
  }

  /// What has been held back.
  mutating func finish() -> String {
    defer { held = [] }
    return String(decoding: held, as: UTF8.self)
  }

  /// True if the bytes begin a character and do not complete it.
  private static func canGoOn(_ bytes: [UInt8]) -> Bool {
    let length =
      switch bytes[0] {
      case 0xC2...0xDF: 2
      case 0xE0...0xEF: 3
      case 0xF0...0xF4: 4
      default: 1
      }
    guard bytes.count < length else { return false }
    guard bytes.count > 1 else { return true }
    let second: ClosedRange<UInt8> =
      switch bytes[0] {
      case 0xE0: 0xA0...0xBF
      case 0xF0: 0x90...0xBF
      case 0xF4: 0x80...0x8F
      default: 0x80...0xBF  // half a surrogate pair too, as Python's decoder: its third byte tells
      }
    return second.contains(bytes[1]) && bytes.dropFirst(2).allSatisfy { (0x80...0xBF).contains($0) }
  }
}
