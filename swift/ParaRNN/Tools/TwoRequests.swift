/// Messages that ask for two things at once, of which a model that makes one call would do one, or a mixture of
/// both: the rules of Python's `mlx_pararnn.pocket.two_requests`.
enum TwoRequests {
  private static let sentence = "I do one thing at a time: please ask for one after the other."
  static let longest = 1000  // characters of a message that are looked at

  /// What a message begins with that asks for something, and what a second request begins with.
  private static let first =
    #"^\W*(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so)\W+)*"#
    + "(?:set|start|cancel|stop|show|make|add|put|remove|take|clear|delete|remind|wake|convert|calculate"
    + #"|what|what's|whats|how|when|which|tell|give)\b"#
  private static let next = #"\b(?:and|then)\s+(?:(?:then|also|please)\s+)*"#
  private static let entry =
    #"(?:set|start|cancel|stop|show|make)\b(?:\s+\S+){0,4}?\s+(?:timers?|alarms?|reminders?)\b"#
    + #"|(?:remind|wake)\s+me\b"#
  private static let list = #"(?:put|take|clear|delete|show)\b.*\blists?\b"#
  private static let other =
    #"how\s+(?:many|much|long)\b|(?:convert|calculate|tell me|what|what's|whats|when|which)\b"#
  private static let item = #"(?:add|remove)\s+[^\W\d]"#

  /// What to say instead of calling a standard function for a message; nil to call it. It is a sentence where after
  /// "and" or "then" another request begins.
  @Sendable static func instead(_ message: String, _ function: String) -> String? {
    let text = String(String.UnicodeScalarView(message.unicodeScalars.prefix(longest))).lowercased()
    let second =
      switch function {
      case "set_reminder": "\(next)(?:\(entry))"  // of what people want to be reminded the rest may be
      case "calculate": "\(next)(?:\(entry)|\(list)|\(other))"  // "ten plus five and then add three"
      // "add salt and take out the trash to my list" names one list, which is the first request's
      case "add_to_list", "remove_from_list":
        #"\#(next)(?:\#(entry)|\#(other)|\#(item))|\blists?\b.*\#(next)\#(list)"#
      default: "\(next)(?:\(entry)|\(list)|\(other)|\(item))"
      }
    let asksTwice = !Words.matches(first, in: text).isEmpty && !Words.matches(second, in: text).isEmpty
    return asksTwice ? sentence : nil
  }
}
