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
  private static let nothingDone =
    #"I did nothing: say what I shall do as a request, as in "set a timer for 5 minutes"."#
  private static let otherActions =
    "I cannot do that with timers, alarms, reminders and lists. I set, show and cancel them."

  /// What is none of the six tasks for certain, and what is none where the calculator can read it.
  private static let noTask =
    #"\d\s*(?:\^|\*\*|//|[<>!=]=|=\s*-?\d)|√|^\W*\d+ (?:and|or) \d+\W*$"#
    + #"|\b(?:average|mean|median|gcd|lcm|hcf|remainder|root|factorial|log|logarithm) (?:of|for)\b|\bsqrt\b"#
    + #"|\d\s*(?:mod|modulo|xor|nand|squared|cubed|to the power|prime|in binary|in hex)\b"#
  private static let sign = " *(?:[+-]|plus|minus) *"
  private static let sum =
    #"\d\s*(?:[%²³×·÷]|percent\b)|(?<![\d./-])(?:0\d+\#(sign)\d+|\d+\#(sign)0\d+)(?![\d./-])"#
  /// Numbers and signs alone, which are no sum if they are not read as one.
  private static let signsAlone = #"(?!.*\d{1001})(?=.*\d)(?=.*[+*/^-])[\d\s.,()$€£+*/^-]+"#
  /// The pointers' tasks that are not read whole by rules.
  private static let task = #"\b(?:sort\w*|arrange|order)\b|^\W*(?:[01][a-d])+;"#
  /// Answers that are no number, by their first word; of a reversal that is the model's own sentences alone.
  private static let short = ["y", "ye", "yes", "n", "no"]
  private static let words = #"^[^\W\d_][^\d ]*(?: |$)"#
  private static let ownWords = "^[A-Z][a-z']*(?: |$)"
  private static let reverse = ["reverse", "reversed", "backwards", "backward"]
  /// What stands beside a calculation and belongs to one.
  private static let ofASum =
    #"\d|[+*/^×·÷−√<>]|(?<![^\W_])-|\b(?:minus|negative|plus|times|over|half|thirds?|quarters?|twice|double|triple"#
    + "|squared?|cubed?|roots?|power|percent|mod|modulo|remainder|max\\w*|min|minimum|larger|largest|bigger|biggest"
    + #"|smaller|smallest|average|mean|median|product|difference|factorial|log\w*|sqrt|day|date)\b"#
  private static let signBefore = #"(?:\b(?:minus|negative)|(?<![^\W_])[-−])\s*$"#
  private static let numeral = #"(?<![^\W_])\d+"#

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

  /// Of timers, alarms, reminders and lists.
  private static let sets = "^(?:set|add)_"
  private static let changes = "^(?:set|add|cancel|remove|clear)_"
  private static let keeps = "^(?:set|cancel|show)_"
  private static let not = #"^\W*no\b|\b(?:do not|don'?t|not|never|already)\b(?! (?:let|f\w+t)\b)"#
  private static let notChanged =
    #"\b(?:do not|don'?t|never) (?:\w+ )?(?:cancel|stop|remove|delete|clear|empty|turn off|drop|erase)\b"#
  private static let wasDone =
    #"^\W*(?:i|we)(?:'ve| have)? (?:just )?(?:added|put|set|started|made)\b"#
  private static let whether =
    #"^\W*(?:(?:please|pls|hey|ok|hi|hello|so|um)\W+)*(?:should|shall|did|does|do (?:i|we)|is|are|was|were"#
    + "|have (?:i|we)|why|who|which|how(?! about)|what(?! about)|what's"
    + #"|when (?:should|shall|did|do|will))\b"#
  private static let other =
    #"\b(?:pause|resume|unpause|snooze|extend|rename|postpone|reschedule)\b(?=.*\b(?:timer|alarm|reminder|list))"#

  private static func has(_ text: String, _ pattern: String) -> Bool {
    !Words.matches(pattern, in: text).isEmpty
  }

  /// What to say instead of calling a function for a message; nil to call it.
  @Sendable static func instead(_ message: String, _ function: String, _ arguments: String) -> String? {
    let all = (try? JSONSerialization.jsonObject(with: Data(arguments.utf8))) as? [String: Any]
    let given = (all ?? [:]).compactMapValues { $0 as? String }
    let isOwn = Assistant.functions.contains { $0.0 == function }
    if isOwn, let known = Known.answer(message) {
      return comes(function, given, to: known) ? nil : known.sentence
    }
    // By scalars, as the model copies them.
    let isCopied = given.values.allSatisfy { text in
      text.isEmpty || (message as NSString).range(of: text, options: .literal).location != NSNotFound
    }
    if all == nil || !isCopied || (isOwn && isBeside(message, given)) {
      return insteadOfAnswer(message) ?? notSure
    }
    return TwoRequests.instead(message, function) ?? (isOwn ? insteadOfPart(message, function, given) : nil)
  }

  /// Whether a call gives what the message comes to.
  private static func comes(_ function: String, _ given: [String: String], to known: Known.Answer) -> Bool {
    switch function {
    case "convert":
      (try? Assistant.convert(given["amount"] ?? "", given["to"] ?? ""))?.lowercased() == known.sentence
    case "calculate":
      (try? Calculator.calculate(NumberWords.formula(given["expression"] ?? ""))) == known.value
    default: false
    }
  }

  /// What to say where the message has more to it than the call.
  private static func insteadOfPart(_ message: String, _ function: String, _ given: [String: String])
    -> String?
  {
    func plain(_ text: String) -> String { text.lowercased().replacingOccurrences(of: "’", with: "'") }
    let start = message.unicodeScalars.prefix(TwoRequests.longest)
    var rest = plain(String(String.UnicodeScalarView(start)))
    func order(_ item: (key: String, value: String)) -> (Int, String) {
      (-item.value.unicodeScalars.count, item.key)
    }
    for (name, text) in given.sorted(by: { order($0) < order($1) }) where !text.isEmpty {
      let found = (rest as NSString).range(of: plain(text), options: .literal)
      guard found.location != NSNotFound else { continue }
      let before = (rest as NSString).substring(to: found.location)
      if spokenOf[name] != nil && function != "date_before" && has(before, signBefore) { return notSure }
      rest = "\(before) _ \((rest as NSString).substring(from: found.location + found.length))"
    }
    if function == "convert" && has(given["to"] ?? "", numeral) { return notSure }
    if function == "calculate" && has(rest, ofASum) { return insteadOfAnswer(message) ?? otherSums }
    if !function.hasSuffix("_list") && has(rest, numeral) { return notSure }
    if ["days_until", "days_since"].contains(function) && has(rest, #"\bin +_"#) {
      return notSure  // "how many days in february"
    }
    if has(function, keeps) && has(rest, other) { return otherActions }
    let undone = has(function, sets) ? not : notChanged
    if has(function, changes) && [undone, wasDone, whether].contains(where: { has(rest, $0) }) {
      return nothingDone
    }
    return nil
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

  /// What to say where a model answers with no function; nil where nothing is known against that. What rules read
  /// whole is said by them, as the model would where it is one of its tasks.
  static func insteadOfAnswer(_ message: String) -> String? {
    let text = Words.inOneLine(message.lowercased())
    let isNoTask = text.unicodeScalars.count <= TwoRequests.longest && has(text, #"\d"#) && has(text, noTask)
    if let known = Known.answer(message) {
      return isNoTask || has(text, sum) ? known.sentence : known.value
    }
    guard let asked = Known.asked(in: message) else { return nil }
    let isSignsAlone = Words.groups(signsAlone, in: asked) != nil
    guard isNoTask || isSignsAlone || has(text, sum) else { return nil }
    do {
      _ = try Calculator.calculate(NumberWords.formula(asked))
      return nil
    } catch let error as ToolError where has(error.sentence, "(?:division|divides) by zero") {
      return "That divides by zero."
    } catch {
      return isNoTask || isSignsAlone ? otherSums : nil
    }
  }

  /// A check of what a model answers to a message with no function. Where what is to be said instead begins with what
  /// has been said, the rest of it is to follow.
  @Sendable static func checkAnswer(_ message: String) -> ToolFunctions.AnswerCheck {
    let right = insteadOfAnswer(message)
    let text = message.lowercased()
    let start = String(String.UnicodeScalarView(text.unicodeScalars.prefix(TwoRequests.longest)))
    let reversed = String(String.UnicodeScalarView(text.unicodeScalars.reversed()))
    let isReversal = Words.split(start).contains { Words.nearest($0, reverse) != nil }
    let isTask = isReversal || message.unicodeScalars.count > TwoRequests.longest || has(text, task)
    return { said, isAll in
      if let right {
        let isRight = right == said || (!isAll && right.unicodeScalars.starts(with: said.unicodeScalars))
        return isRight ? nil : right
      }
      if Words.groups(#"[-+\d., <>=]*"#, in: said) != nil || short.contains(said) {
        return isTask || said.isEmpty ? nil : notSure
      }
      if has(said, isReversal ? ownWords : words) { return nil }
      let place = (reversed as NSString).range(of: said.lowercased(), options: .literal)
      return place.location == NSNotFound ? ToolTurn.lost : nil
    }
  }
}
