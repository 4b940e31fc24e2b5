import Foundation

/// Messages that a small model is known to misread: the rules of Python's `mlx_pararnn.pocket.misread`.
///
/// It copies what it calls a function with from the message: what does not stand there was not read right. And what
/// looks much like one of its six tasks with numbers ("10 mod 3", "average of 3 and 5") it takes for one.
enum Misread {
  private static let notSure = "I did not understand that: please say it in other words."
  private static let otherSums =
    "I cannot do that with numbers. I add, subtract, multiply, divide, compare, sort and reverse them."

  private static let sign = " *(?:[+-]|plus|minus) *"
  private static let other =
    #"\d\s*(?:[%^²³×·÷]|\*\*|//|[<>!=]=|=\s*-?\d)|√|^\W*\d+ (?:and|or) \d+\W*$"#
    + #"|(?<![\d./-])(?:0\d+\#(sign)\d+|\d+\#(sign)0\d+)(?![\d./-])"#
    + #"|\b(?:average|mean|median|gcd|lcm|hcf|remainder|root|factorial|log|logarithm) (?:of|for)\b|\bsqrt\b"#
    + #"|\d\s*(?:mod|modulo|xor|nand|percent|squared|cubed|to the power|prime|even|odd|in binary|in hex)\b"#
  private static let asked =
    #"[\s,:]*(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so)\b[\s,:]*)*"#
    + "(?:(?:what is|what's|whats|how much is|calculate|compute|work out|solve|evaluate|figure out|tell me)"
    + #"\b[\s:]*)?(.*?)[\s?.!=]*"#

  /// What to say instead of calling a standard function for a message; nil to call it.
  @Sendable static func instead(_ message: String, _ function: String, _ arguments: String) -> String? {
    let given = (try? JSONSerialization.jsonObject(with: Data(arguments.utf8))) as? [String: Any] ?? [:]
    let texts = given.values.compactMap { $0 as? String }
    // By scalars, as the model copies them.
    let isCopied = texts.allSatisfy { text in
      text.isEmpty || (message as NSString).range(of: text, options: .literal).location != NSNotFound
    }
    return isCopied ? TwoRequests.instead(message, function) : insteadOfAnswer(message) ?? notSure
  }

  /// What to say where a model answers with no function; nil where nothing is known against that. A sum that the
  /// calculator reads is calculated.
  @Sendable static func insteadOfAnswer(_ message: String) -> String? {
    let text = String(String.UnicodeScalarView(message.unicodeScalars.prefix(TwoRequests.longest)))
      .lowercased()
    if Words.matches(#"\d"#, in: text).isEmpty || Words.matches(other, in: text).isEmpty { return nil }
    let plain = text.split(whereSeparator: \.isWhitespace).joined(separator: " ")
    guard let sum = Words.groups(asked, in: plain)?[1], let formula = try? NumberWords.formula(sum),
      let value = try? Calculator.calculate(formula)
    else { return otherSums }
    return "\(sum) is \(value)."
  }
}
