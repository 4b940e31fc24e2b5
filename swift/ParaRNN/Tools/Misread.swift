import Foundation

/// Messages that a small model is known to misread: the rules of Python's `mlx_pararnn.pocket.misread`.
///
/// It copies what it calls a function with from the message: what does not stand there was not read right. And what
/// looks much like one of its six tasks with numbers ("10 mod 3", "average of 3 and 5") it takes for one.
enum Misread {
  private static let notSure =
    "I did not understand that: please say it in other words. "
    + "I can do sums, timers, alarms, reminders, lists, dates and units."
  private static let otherSums =
    "I cannot do that with numbers. I add, subtract, multiply, divide, compare, sort and reverse them."

  /// What is none of the six tasks for certain, and what is none where the calculator can read it.
  private static let noTask =
    #"\d\s*(?:\^|\*\*|//|[<>!=]=|=\s*-?\d)|√|^\W*\d+ (?:and|or) \d+\W*$"#
    + #"|\b(?:average|mean|median|gcd|lcm|hcf|remainder|root|factorial|log|logarithm) (?:of|for)\b|\bsqrt\b"#
    + #"|\d\s*(?:mod|modulo|xor|nand|squared|cubed|to the power|prime|in binary|in hex)\b"#
  private static let sign = " *(?:[+-]|plus|minus) *"
  private static let sum =
    #"\d\s*(?:[%²³×·÷]|percent\b)|(?<![\d./-])(?:0\d+\#(sign)\d+|\d+\#(sign)0\d+)(?![\d./-])"#
  private static let asked =
    #"[\s,:]*(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so|thanks)\b[\s,:]*)*"#
    + "(?:(?:what is|what's|whats|how much is|calculate|compute|work out|solve|evaluate|figure out|tell me)"
    + #"\b[\s:]*)?(.*?)(?:[\s,]*\b(?:please|pls|thanks|thx))?[\s?.!=]*"#

  /// Words with which people speak of numbers and of times, or how these begin.
  private static let number =
    #"\d|\b(?:(?:an?|half|halves|thirds?|one|two|ten|once|zero|dozen|couple)\b|quarter|three|four|five|fif|six|seven"#
    + #"|eig|nin|eleven|twel|\w+teen|twent|thirt|fort|hundred|thousand|\w+illion|twice|double|triple)"#
  private static let time =
    number
    + #"|\b(?:(?:now|may|sun|mon|tues?|weds?|thu|thurs?|thur|fri|sat|\w+tieth|first|second|tenth|h|m|s|d|wk)\b"#
    + #"|\w*day|\w*night|sec|min|ho?u?r|we+k|fortn|mont|year|yr|decad|centur|tom+or|tmr|yest|noon|midd|morn|after|even"#
    + "|o'?clo|past|dawn|dusk|sunris|sunset|lunch|dinner|breakf|bedt|chris|xmas|hallow|valen|new year|patrick|easter"
    + "|jan|feb|mar|apr|jun|jul|aug|sep|oct|nov|dec|date|time)"
  /// Where one letter of these is wrong, they are meant.
  private static let misspelt =
    Day.months + Day.weekdays + [
      "today", "tonight", "tomorrow", "yesterday", "seconds", "minutes", "morning", "afternoon", "evening",
      "midnight", "christmas", "halloween", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
      "seventeen", "eighteen", "nineteen", "twenty", "thirty", "hundred", "thousand", "million",
      "billion",
    ]
  private static let spokenOf = [
    "duration": time, "time": time, "day": time, "amount": number, "expression": number,
  ]
  private static let dates = ["date", "start", "end"]

  /// What to say instead of calling a function for a message; nil to call it.
  @Sendable static func instead(_ message: String, _ function: String, _ arguments: String) -> String? {
    let all = (try? JSONSerialization.jsonObject(with: Data(arguments.utf8))) as? [String: Any]
    let given = (all ?? [:]).compactMapValues { $0 as? String }
    // By scalars, as the model copies them.
    let isCopied = given.values.allSatisfy { text in
      text.isEmpty || (message as NSString).range(of: text, options: .literal).location != NSNotFound
    }
    let isBeside = Assistant.functions.contains { $0.0 == function } && isBeside(message, given)
    if all == nil || !isCopied || isBeside { return insteadOfAnswer(message) ?? notSure }
    return TwoRequests.instead(message, function)
  }

  /// Whether a time, an amount or a calculation is none, or a date comes from a message that has no time.
  private static func isBeside(_ message: String, _ given: [String: String]) -> Bool {
    given.contains { name, text in
      if let pattern = spokenOf[name] { return !text.isEmpty && !speaks(text, pattern) }
      return dates.contains(name) && !speaks(message, time)
    }
  }

  /// Whether a text has such a word, or one that is misspelt.
  private static func speaks(_ text: String, _ pattern: String) -> Bool {
    let words = Words.split(String(String.UnicodeScalarView(text.unicodeScalars.prefix(TwoRequests.longest))))
    return !Words.matches(pattern, in: text.lowercased()).isEmpty
      || words.contains { word in misspelt.contains { Words.nearest(word, [$0]) != nil } }
  }

  /// What to say where a model answers with no function; nil where nothing is known against that. A sum that the
  /// calculator reads is calculated.
  @Sendable static func insteadOfAnswer(_ message: String) -> String? {
    let words = message.lowercased().unicodeScalars.split { $0.properties.isWhitespace }
    let text = words.map { String(String.UnicodeScalarView($0)) }.joined(separator: " ")
    let isNoTask = !Words.matches(noTask, in: text).isEmpty
    guard message.unicodeScalars.count <= TwoRequests.longest, !Words.matches(#"\d"#, in: text).isEmpty,
      isNoTask || !Words.matches(sum, in: text).isEmpty, let asked = Words.groups(asked, in: text)?[1]
    else { return nil }
    do {
      return "\(asked) is \(try Calculator.calculate(NumberWords.formula(asked)))."
    } catch let error as ToolError where error.sentence == "division by zero" {
      return "That divides by zero."
    } catch {
      return isNoTask ? otherSums : nil
    }
  }
}
