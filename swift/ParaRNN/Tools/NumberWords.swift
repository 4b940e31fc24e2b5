import Foundation

/// Regular expressions on texts, and words as people write them.
enum Words {
  private static func expression(_ pattern: String) -> NSRegularExpression {
    // Every pattern stands in this package.
    try! NSRegularExpression(pattern: pattern)
  }

  private static func range(_ text: String) -> NSRange { NSRange(location: 0, length: text.utf16.count) }

  static func replacing(_ pattern: String, in text: String, with template: String) -> String {
    expression(pattern).stringByReplacingMatches(
      in: text, range: range(text), withTemplate: template.replacingOccurrences(of: "*", with: "\\*"))
  }

  static func matches(_ pattern: String, in text: String) -> [String] {
    expression(pattern).matches(in: text, range: range(text)).map {
      (text as NSString).substring(with: $0.range)
    }
  }

  /// The groups of a pattern that the whole text fits, the text itself first; nil if it does not.
  static func groups(_ pattern: String, in text: String) -> [String?]? {
    guard let match = expression("^(?:\(pattern))$").firstMatch(in: text, range: range(text)),
      match.range.length == text.utf16.count
    else { return nil }
    return (0..<match.numberOfRanges).map { i in
      let range = match.range(at: i)
      return range.location == NSNotFound ? nil : (text as NSString).substring(with: range)
    }
  }

  /// Words, numerals and signs in lower case; "5km" is two, "twenty-one" is too, "p.m." is "pm".
  static func split(_ text: String) -> [String] {
    var text = text.lowercased().replacingOccurrences(of: "’", with: "'")
    text = replacing(#"\b([ap])\.\s?m\b\.?"#, in: text, with: "$1m")
    text = replacing(#"(?<=[^\W_])-(?=[^\W\d_])"#, in: text, with: " ")
    return matches(
      #"\d+:\d\d|\d+/\d+|\d+(?:st|nd|rd|th)\b|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+"#
        + #"|[^\W\d_°]+(?:['/][^\W\d_]+)*|\*\*|//|[^\s\w,?!.°]"#, in: text)
  }

  /// The word of a vocabulary that is meant: itself, or the only one that differs by one letter.
  static func nearest(_ word: String, _ vocabulary: some Sequence<String>) -> String? {
    let vocabulary = Array(vocabulary)
    if vocabulary.contains(word) { return word }
    if word.count < 5 || NumberWords.words.contains(word) || NumberWords.ordinals[word] != nil { return nil }
    let near = vocabulary.filter { $0.count >= 5 && areOneLetterApart(Array(word), Array($0)) }
    return near.count == 1 ? near[0] : nil
  }

  /// One letter replaced, inserted, left out, or swapped with its neighbour.
  private static func areOneLetterApart(_ a: [Character], _ b: [Character]) -> Bool {
    let start = zip(a, b).prefix { $0 == $1 }.count
    let (x, y) = (a[start...], b[start...])
    let isSwapped =
      x.count > 1 && y.count > 1 && x[start] == y[start + 1] && x[start + 1] == y[start]
      && x.dropFirst(2) == y.dropFirst(2)
    return x.dropFirst() == y.dropFirst() || x.dropFirst() == y || x == y.dropFirst() || isSwapped
  }

  /// A text without blanks and line breaks around it, which are one space each inside of it.
  static func inOneLine(_ text: String) -> String {
    text.unicodeScalars.split { $0.properties.isWhitespace }.map { String(String.UnicodeScalarView($0)) }
      .joined(separator: " ")
  }

  static func isDigits(_ text: String) -> Bool {
    !text.isEmpty && text.allSatisfy { ("0"..."9").contains($0) }
  }

  /// "1 day", "2 days".
  static func count(_ value: Int, _ unit: String) -> String { "\(value) \(unit)\(value == 1 ? "" : "s")" }

  /// "a", "a and b", "a, b and c".
  static func join(_ parts: [String]) -> String {
    parts.count > 1
      ? parts.dropLast().joined(separator: ", ") + " and " + parts.last! : parts.first ?? ""
  }
}

extension Array where Element == String {
  /// The word at a place; nil beyond the end.
  func word(_ at: Int) -> String? { indices.contains(at) ? self[at] : nil }
}

/// Numbers, amounts and calculations as people write them, by the rules of Python's
/// `mlx_pararnn.pocket.number_words`: all of a text is understood, or ``ToolError`` says that it is not.
enum NumberWords {
  private static let small = Dictionary(
    uniqueKeysWithValues: [
      "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
      "twelve",
      "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    ].enumerated().map { ($1, $0) })
  private static let tens = Dictionary(
    uniqueKeysWithValues: ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
      .enumerated().map { ($1, 20 + 10 * $0) })
  private static let large = [
    "thousand": 1000, "million": 1_000_000, "billion": 1_000_000_000, "trillion": 1_000_000_000_000,
  ]
  private static let parts = [
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fifth": 5, "fifths": 5,
  ]
  private static let counts = ["hundred": 100, "dozen": 12, "couple": 2]
  static let ordinals = Dictionary(
    uniqueKeysWithValues: [
      "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
      "eleventh",
      "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth",
      "nineteenth",
      "twentieth",
    ].enumerated().map { ($1, $0 + 1) })
  static let words = Set(small.keys).union(tens.keys).union(large.keys).union(parts.keys).union(counts.keys)
  private static let mostDigits = 1000

  typealias Read = (value: Fraction, next: Int)

  /// A number, all of a text.
  static func number(_ text: String) throws -> Fraction {
    let words = Words.split(text)
    guard let (value, next) = try read(words, 0), next == words.count else {
      throw ToolError("I do not understand the number '\(text)'.")
    }
    return value
  }

  /// Numbers with what they count: "5 km", "six feet two inches", "a mile", "an hour and a half".
  static func amounts(_ text: String) throws -> [(value: Fraction, unit: String)] {
    let words = Words.split(text)
    var found: [(value: Fraction, unit: String)] = []
    var at = 0
    while at < words.count {
      if !found.isEmpty, Array(words[at...].prefix(2)) == ["and", "a"],
        [["half"], ["quarter"]].contains(Array(words.dropFirst(at + 2)))
      {
        found[found.count - 1].value = found.last!.value + Fraction(.one, BigInteger(parts[words[at + 2]]!))
        return found
      }
      if !found.isEmpty && words[at] == "and" { at += 1 }
      guard let (value, next) = try read(words, at, article: true) else { break }
      var start = next
      while let word = words.word(start), ["of", "a", "an"].contains(word) { start += 1 }
      at = start
      while at < words.count, words[at] != "and", try read(words, at) == nil { at += 1 }
      found.append((value, words[start..<at].joined(separator: " ")))
    }
    if found.isEmpty || at != words.count { throw ToolError("I do not understand the amount '\(text)'.") }
    return found
  }

  /// The number that begins at a word, and where it ends; with `article`, "a" and "an" alone are 1.
  static func read(_ words: [String], _ at: Int, article: Bool = false) throws -> Read? {
    guard let (value, next) = try wholeNumber(words, at) else {
      guard let word = words.word(at), ["a", "an"].contains(word) else { return nil }
      let counted = isCount(words, at + 1) ? try read(words, at + 1) : nil
      return counted ?? (article ? (Fraction(1), at + 1) : nil)
    }
    var at = next
    if words.word(at) == "point" {
      var digits = ""
      while let word = words.word(at + 1), small[word].map({ $0 < 10 }) ?? Words.isDigits(word) {
        digits += Words.isDigits(word) ? word : String(small[word]!)
        at += 1
      }
      guard let part = Fraction("0." + digits), !digits.isEmpty else { return nil }
      return (value + part, at + 1)
    }
    if let word = words.word(at), Words.groups(#"\d+/\d+"#, in: word) != nil, value.isWhole,  // "3 1/2"
      let part = try numeral(word), part < Fraction(1)
    {
      return (value + part, at + 1)
    }
    if words.word(at) == "and" {
      let first = words.word(at + 1) == "a" ? at + 2 : at + 1
      if let part = try wholeNumber(words, first), part.value < Fraction(1) {
        return (value + part.value, part.next)
      }
    }
    return (value, at)
  }

  /// A whole number, as ``read(_:_:article:)``.
  static func readSmall(_ words: [String], _ at: Int) throws -> (value: Int, next: Int)? {
    guard let (value, next) = try read(words, at), value.isWhole, let number = value.numerator.int else {
      return nil
    }
    return (number, next)
  }

  private static func isCount(_ words: [String], _ at: Int) -> Bool {
    words.word(at).map { parts[$0] != nil || large[$0] != nil || counts[$0] != nil } ?? false
  }

  /// A numeral or number words, and a part after them: "three quarters".
  private static func wholeNumber(_ words: [String], _ start: Int) throws -> Read? {
    guard let first = words.word(start) else { return nil }
    var at = start
    if var value = try numeral(first) {
      at += 1
      while let word = words.word(at), let size = large[word] ?? (word == "hundred" ? 100 : nil) {
        value = value * Fraction(size)
        at += 1
      }
      return (value, at)
    }
    var (total, current, isKnown) = (Fraction(0), 0, false)
    while let raw = words.word(at) {
      let word = Words.nearest(raw, Self.words) ?? raw
      if let value = small[word],
        current % 100 == 0 || (current % 10 == 0 && 0 < value && value < 10)
      {
        if current % 100 == 10 { break }
        current += value
      } else if let value = tens[word], current % 100 == 0 {
        current += value
      } else if word == "hundred" && current < 100 {
        current = (current == 0 ? 1 : current) * 100
      } else if let size = large[word],
        total.isZero || (current != 0 && (total / Fraction(size * 1000)).isWhole)
      {
        total = total + Fraction(current == 0 ? 1 : current) * Fraction(size)
        current = 0
      } else if let size = counts[word], word != "hundred", total.isZero {
        return (Fraction((current == 0 ? 1 : current) * size), at + 1)
      } else if let part = parts[word], total.isZero {
        return (Fraction(BigInteger(isKnown ? current : 1), BigInteger(part)), at + 1)
      } else if word == "and", isKnown, !total.isZero || current != 0, current % 100 == 0,
        let next = words.word(at + 1), let near = Words.nearest(next, Self.words),
        small[near] != nil || tens[near] != nil
      {
        // "one hundred and two"
      } else {
        break
      }
      isKnown = true
      at += 1
    }
    return at > start ? (total + Fraction(current), at) : nil
  }

  private static func numeral(_ word: String) throws -> Fraction? {
    guard Words.groups(#"[\d,]*\.?\d+|\d+/\d+"#, in: word) != nil else { return nil }
    if word.count > mostDigits { throw ToolError("I can use numbers of up to \(mostDigits) digits there.") }
    let plain = word.replacingOccurrences(of: ",", with: "")
    guard let number = Fraction(plain) else { throw ToolError("'\(word)' divides by zero.") }
    return number
  }

  // MARK: - Calculations

  private static let operators = [
    "+": "+", "-": "-", "*": "*", "/": "/", "//": "//", "**": "**", "(": "(", ")": ")", "plus": "+",
    "minus": "-", "negative": "-", "times": "*", "x": "*", "of": "*", "over": "/", "squared": "**2",
    "cubed": "**3",
    "mod": "%", "percent": "/100", "%": "/100", "twice": "2*", "double": "2*", "triple": "3*",
  ]
  /// Of these, those that begin an operand, and those that may stand where one begins; others come after one.
  private static let begin = ["(", "2*", "3*"]
  private static let signs = ["+", "-"]
  private static let end = [")", "/100", "**2", "**3"]  // an operand ends with them
  private static let shorter = [
    (#"\bdivided by\b"#, "over"), (#"\bmultiplied (by|with)\b"#, "times"),
    (#"\b(added to|and then add)\b"#, "plus"), (#"\b(raised )?to the power( of)?\b"#, "**"),
    (#"\bper cent\b"#, "percent"), (#"\bmodulo\b"#, "mod"),
    (#"\b(the )?square root of\b|\bsqrt\b( of\b)?"#, "sqrt"),
  ]
  private static let orders: [(pattern: String, connecting: [String], shape: String, isSwapped: Bool)] = [
    (#"(?:the )?sum of (.+)"#, ["and", "plus"], "+", false),
    (#"add (.+)"#, ["and", "to", "plus"], "+", false),
    (#"(?:the )?difference (?:between|of) (.+)"#, ["and"], "-", false),
    (#"(?:the )?product of (.+)|multiply (.+)"#, ["and", "by", "with"], "*", false),
    (#"divide (.+)"#, ["by"], "/", false),
    (#"(?:the )?remainder of (.+)"#, ["over", "/", "and", "by"], "%", false),
    (#"subtract (.+)|take (.+)"#, ["from"], "-", true),
  ]

  /// What a calculation means, in digits and + - * / // ** ( ) and sqrt: "twelve plus seven" gives "12+7".
  /// Two numbers without a sign between them are no calculation.
  static func formula(_ text: String) throws -> String {
    var plain = text
    for (sign, word) in [
      ("²", " squared"), ("³", " cubed"), ("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("^", "**"),
      ("√", "square root of "),
    ] {
      plain = plain.replacingOccurrences(of: sign, with: word)
    }
    // "5% 7" is no remainder.
    plain = Words.replacing(#"\s%\s*(?=-?[\d(])|%(?=[\d(])"#, in: plain, with: " mod ")
    plain = Words.split(plain).joined(separator: " ")
    for (pattern, word) in shorter { plain = Words.replacing(pattern, in: plain, with: word) }
    guard let found = try order(plain) ?? expression(plain) else {
      throw ToolError("I cannot calculate '\(text)'.")
    }
    return found
  }

  /// "add twelve and seven": two operands around the first connecting word that leaves two.
  private static func order(_ text: String) throws -> String? {
    for order in orders {
      guard let groups = Words.groups(order.pattern, in: text) else { continue }
      let words = (groups.dropFirst().compactMap { $0 }.first ?? "").split(separator: " ").map(String.init)
      for (at, word) in words.enumerated() where order.connecting.contains(word) {
        guard let first = try expression(words[..<at].joined(separator: " ")),
          let second = try expression(words[(at + 1)...].joined(separator: " "))
        else { continue }
        let sides = [first, second].map { side in
          Words.groups(#"[\d.]+|\([^()]*\)"#, in: side) == nil ? "(\(side))" : side
        }
        return order.isSwapped ? sides[1] + order.shape + sides[0] : sides[0] + order.shape + sides[1]
      }
    }
    return nil
  }

  /// Numbers and operators from left to right; nil if a word is neither or there is none where one must be.
  private static func expression(_ text: String) throws -> String? {
    let words = text.split(separator: " ").map(String.init)
    var found: [String] = []
    var (at, isWhole) = (0, false)  // whether an operand has just ended
    while at < words.count {
      let isRoot = words[at] == "sqrt"
      if isRoot { at += 1 }
      if isWhole && words.word(at) == "negative" { return nil }
      let word = words.word(at).flatMap { Words.nearest($0, operators.keys) }
      let sign = isRoot && word != "(" ? nil : word.flatMap { operators[$0] }
      var piece: String
      if let sign {
        piece = isRoot ? "sqrt(" : sign
        at += 1
      } else {
        guard let (value, next) = try read(words, at) else { return nil }
        piece = isRoot ? "sqrt(\(try digits(value)))" : try digits(value)
        at = next
      }
      if sign.map(begin.contains) ?? true {
        if isWhole { throw ToolError("I cannot calculate '\(text)': there is no sign between two numbers.") }
        // "6 over twice 3" is not 6/2*3.
        if ["/", "//", "**"].contains(found.last), ["2*", "3*"].contains(sign) { return nil }
      } else if let sign, !isWhole && !signs.contains(sign) {
        return nil
      }
      if sign == "/100", let last = found.last, !end.contains(last) {
        found.removeLast()
        piece = "(\(last)/100)"  // of "6 over 50%"
      }
      found.append(piece)
      isWhole = sign.map(end.contains) ?? true
    }
    return isWhole ? found.joined() : nil
  }

  private static func digits(_ value: Fraction) throws -> String {
    if value >= Fraction(BigInteger(10).raised(to: mostDigits)) {
      throw ToolError("I can use numbers of up to \(mostDigits) digits there.")
    }
    return value.isWhole ? value.numerator.text : "(\(value.numerator.text)/\(value.denominator.text))"
  }
}
