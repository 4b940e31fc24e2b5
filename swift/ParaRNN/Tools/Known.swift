/// Messages that rules read whole: calculations, comparisons of two numbers, and conversions. The rules of Python's
/// `mlx_pararnn.pocket.known`.
enum Known {
  /// What a message comes to: as a model answers it, and as a function does.
  typealias Answer = (value: String, sentence: String)

  /// Characters of a message: two numbers of as many digits as are read, and what is asked of them.
  static let longest = 2100

  private static let asked =
    #"[\s,:]*(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so|thanks)\b[\s,:]*)*"#
    + "(?:(?:what is|what's|whats|what does|how much is|calculate|compute|work out|solve|evaluate|figure out"
    + #"|tell me)\b[\s:]*)?(.*?)(?: equals?)?(?:[\s,]*\b(?:please|pls|thanks|thx))?[\s?.!=]*"#
  private static let compare = #"compare:? (\S+?)(?:,? (?:and|or|with|to)|,) (\S+)"#
  private static let larger = "bigger|larger|greater|higher|more|max|maximum"
  private static let smaller = "smaller|less|lower|min|minimum"
  private static let either =
    "(?:which )?(?:(?:number|one) )?(?:is )?(?:the )?(?:(\(larger))|\(smaller))"
    + #"(?: of| between|[,:])? (\S+?)(?:,? (?:and|or)|,) (\S+)"#
  private static let whether =
    #"is (\S+?)(?: (?:(\#(larger))|\#(smaller)) than | ?([<>]) ?)(\S+)"#
  private static let conversion = #"(?:convert |turn )?(.+) (?:in|into|to) (\S+(?: \S+)?)"#
  private static let currency = #"[$€£](?= ?\.?\d)"#
  private static let date = #"\d{4}-\d\d?-\d\d?"#
  private static let order = "^(?:add|subtract|take|multiply|divide) "

  /// What a message comes to, if nothing of it is left over.
  static func answer(_ message: String) -> Answer? {
    guard let asked = asked(in: message) else { return nil }
    return (try? comparison(asked) ?? converted(asked) ?? calculation(asked)) ?? nil
  }

  /// The message in lower case, without polite words and "what is"; nil if it is too long.
  static func asked(in message: String) -> String? {
    guard message.unicodeScalars.count <= longest else { return nil }
    return Words.groups(asked, in: Words.inOneLine(message.lowercased()))?[1]
  }

  private static func comparison(_ asked: String) throws -> Answer? {
    let found: String
    if let match = Words.groups(compare, in: asked) {
      let (a, b) = (try number(match[1]!), try number(match[2]!))
      found = "\(match[1]!) \(a < b ? "<" : a == b ? "=" : ">") \(match[2]!)"
    } else if let match = Words.groups(either, in: asked) {
      let (a, b) = (try number(match[2]!), try number(match[3]!))
      found = a == b ? "they are equal" : (a > b) == (match[1] != nil) ? match[2]! : match[3]!
    } else if let match = Words.groups(whether, in: asked) {
      let (a, b) = (try number(match[1]!), try number(match[4]!))
      found = (match[2] != nil || match[3] == ">" ? a > b : a < b) ? "yes" : "no"
    } else {
      return nil
    }
    return (found, found)
  }

  private static func number(_ text: String) throws -> Fraction {
    text.hasPrefix("-") ? -(try NumberWords.number(String(text.dropFirst()))) : try NumberWords.number(text)
  }

  private static func converted(_ asked: String) -> Answer? {
    guard let match = Words.groups(conversion, in: asked),
      let found = try? Assistant.convert(match[1]!, match[2]!)
    else { return nil }
    return (found, found)
  }

  private static func calculation(_ asked: String) throws -> Answer? {
    var asked = asked
    if Set(Words.matches(currency, in: asked)).count < 2 {
      asked = Words.replacing(currency, in: asked, with: "")
    }
    let meant = try NumberWords.formula(asked)
    if Words.isDigits(meant) || Words.groups(date, in: asked) != nil { return nil }
    let value = try Calculator.calculate(meant)
    return (value, "\(Words.matches(order, in: asked).isEmpty ? asked : "That") is \(value).")
  }
}
