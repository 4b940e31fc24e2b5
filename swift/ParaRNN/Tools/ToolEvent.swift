import Foundation

/// Something that has happened in a turn of a model that uses tools.
public struct ToolEvent: Sendable, Equatable {
  /// Those of the turn so far, the message's included.
  public let tokens: Int
  public let kind: Kind

  public enum Kind: Sendable, Equatable {
    /// Text that the model has written for itself.
    case thought(String)
    /// A pointer was moved or is to be read.
    case command(PointerCommand)
    /// What a read has shown: the token, and its name.
    case observation(token: Int, name: String)
    /// A function is to be called; the arguments are JSON, as the model wrote it.
    case call(name: String, arguments: String)
    /// What the model reads as a call's result, and whether it is an error.
    case result(String, failed: Bool)
    /// A piece of the answer.
    case text(String)
    /// The turn is over; always the last event.
    case finish(Finish)
  }

  public struct Finish: Sendable, Equatable {
    public enum Reason: String, Sendable {
      /// The model has ended its answer.
      case stop
      /// The model has lost its way, and the answer says so.
      case lost
      /// ``ToolLimits/answer``
      case length
      /// ``ToolLimits/steps``, or the model's learned positions
      case steps
      /// ``ToolLimits/seconds``
      case time
    }
    public let reason: Reason
    /// How many of the tokens the model has made; the others were fed to it.
    public let made: Int
    /// How many functions have run.
    public let calls: Int
  }
}

/// Where a turn ends, whatever the model does.
public struct ToolLimits: Sendable, Equatable {
  /// Tokens after the message, made or fed.
  public var steps: Int
  /// Tokens of the answer, one a byte.
  public var answer: Int
  /// Functions that are run; a further call gets an error as its result.
  public var calls: Int
  /// For the whole turn, checked between two tokens.
  public var seconds: Double

  public init(steps: Int = 200_000, answer: Int = 4096, calls: Int = 8, seconds: Double = 120) {
    self.steps = steps
    self.answer = answer
    self.calls = calls
    self.seconds = seconds
  }
}

/// What has happened in a turn, in one line: the calls with their results, and how many steps with pointers.
public struct ToolSummary: Sendable {
  private var calls: [String] = []
  private var commands = 0
  /// Characters of arguments or of a result.
  private static let widest = 60

  public init() {}

  public mutating func add(_ event: ToolEvent) {
    switch event.kind {
    case .command: commands += 1
    case .call(let name, let arguments): calls.append("\(Self.short(name)) \(Self.short(arguments))")
    case .result(let text, _): if let last = calls.popLast() { calls.append("\(last) → \(Self.short(text))") }
    default: break
    }
  }

  /// nil if there is nothing to tell.
  public var line: String? {
    let count = commands.formatted(.number.locale(Locale(identifier: "en_US")))
    let parts = calls + (commands > 0 ? ["\(count) steps"] : [])
    return parts.isEmpty ? nil : parts.joined(separator: " · ")
  }

  /// The beginning of a text, without what would move a terminal's cursor.
  static func short(_ text: String) -> String {
    let line = printable(text)
    return line.count <= widest ? line : "\(line.prefix(widest - 1))…"
  }

  /// Control and format characters, and other spaces than the plain one, as escapes.
  public static func printable(_ text: String) -> String {
    text.unicodeScalars.map { scalar in
      switch scalar.properties.generalCategory {
      case .control, .format, .lineSeparator, .paragraphSeparator, .surrogate, .unassigned, .privateUse:
        return "\\u{\(String(scalar.value, radix: 16))}"
      default: return String(scalar)
      }
    }.joined()
  }
}
