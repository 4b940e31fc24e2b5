import Foundation

/// Messages that a small model is known to misread: the rules of Python's `mlx_pararnn.pocket.misread`.
///
/// It copies what it calls a function with from the message: what does not stand there was not read right. And what
/// looks much like one of its six tasks with numbers ("10 mod 3", "average of 3 and 5") it takes for one.
enum Misread {
  private static let notSure = "I did not understand that: please say it in other words."
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

  /// What to say instead of calling a standard function for a message; nil to call it.
  @Sendable static func instead(_ message: String, _ function: String, _ arguments: String) -> String? {
    let given = (try? JSONSerialization.jsonObject(with: Data(arguments.utf8))) as? [String: Any]
    // By scalars, as the model copies them.
    let isCopied = given?.values.compactMap { $0 as? String }.allSatisfy { text in
      text.isEmpty || (message as NSString).range(of: text, options: .literal).location != NSNotFound
    }
    return isCopied == true ? TwoRequests.instead(message, function) : insteadOfAnswer(message) ?? notSure
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
