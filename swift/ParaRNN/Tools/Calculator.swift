import Foundation

/// An exact calculator and units, for functions that models call; the same results as Python's
/// `mlx_pararnn.pocket.standard`.
enum Calculator {
  private static let mostBits = 50_000  // of a number that is computed: some 15,000 digits
  private static let mostCharacters = 10_000

  /// Compute + - * / // % ** ( ) and sqrt, cbrt, abs, round, min, max exactly, of numbers of any length.
  static func calculate(_ expression: String) throws -> String {
    guard expression.unicodeScalars.count <= mostCharacters else {
      throw ToolError("an expression may have \(mostCharacters) characters")
    }
    var text = expression
    for (sign, plain) in [("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("^", "**")] {
      text = text.replacingOccurrences(of: sign, with: plain)
    }
    text = Words.replacing(#"%\s*of\b"#, in: text, with: "/100*")
    text = Words.replacing(#"%(?=\s*(?:[)*/]|$))"#, in: text, with: "/100")
    var parser = Parser(tokens: Words.matches(Parser.token, in: text), expression: expression)
    return try Calculator.text(parser.whole())
  }

  /// A number in digits: exact where it ends within 20 decimals, else to 15 digits.
  static func text(_ number: Fraction) throws -> String {
    if number.isWhole {
      guard number.numerator.bitWidth < mostBits else { throw tooLarge }
      return number.numerator.text
    }
    var (rest, places) = (number.denominator, 0)
    for factor in [BigInteger(2), BigInteger(5)] {
      var count = 0
      while case let (quotient, remainder) = rest.dividedDown(by: factor), remainder.isZero {
        (rest, count) = (quotient, count + 1)
      }
      places = max(places, count)
    }
    if rest == .one && places <= 20 {
      let scaled = (number * Fraction(BigInteger(10).raised(to: places))).numerator.magnitude.text
      let digits = String(repeating: "0", count: max(places + 1 - scaled.count, 0)) + scaled
      return (number < Fraction(0) ? "-" : "") + "\(digits.dropLast(places)).\(digits.suffix(places))"
    }
    return Decimal(rounding: number, digits: 15).text
  }

  // MARK: - Numbers with a point

  /// coefficient * 10^exponent, rounded half to even.
  private struct Decimal {
    let coefficient: BigInteger
    let exponent: Int

    init(rounding number: Fraction, digits: Int) {
      let magnitude = number < Fraction(0) ? -number : number
      var exponent = magnitude.numerator.text.count - magnitude.denominator.text.count - digits
      var coefficient = Self.round(magnitude, exponent)
      // The estimate may leave one digit too many, or rounding add one.
      while coefficient.text.count > digits {
        exponent += 1
        coefficient = Self.round(magnitude, exponent)
      }
      while coefficient.text.count < digits && !coefficient.isZero {
        exponent -= 1
        let finer = Self.round(magnitude, exponent)
        if finer.text.count > digits {
          exponent += 1
          break
        }
        coefficient = finer
      }
      self.coefficient = number < Fraction(0) ? -coefficient : coefficient
      self.exponent = exponent
    }

    private static func round(_ number: Fraction, _ exponent: Int) -> BigInteger {
      let scale = Fraction(BigInteger(10).raised(to: abs(exponent)))
      return rounded(exponent < 0 ? number * scale : number / scale)
    }

    var fraction: Fraction {
      let scale = BigInteger(10).raised(to: abs(exponent))
      return exponent < 0 ? Fraction(coefficient, scale) : Fraction(coefficient * scale)
    }

    /// Without zeros at the end; with an exponent where Python's Decimal writes one.
    var text: String {
      var digits = coefficient.magnitude.text
      var exponent = exponent
      while digits.count > 1 && digits.hasSuffix("0") {
        digits.removeLast()
        exponent += 1
      }
      let sign = coefficient.isNegative ? "-" : ""
      let adjusted = exponent + digits.count - 1
      if exponent <= 0 && adjusted >= -6 {
        if exponent == 0 { return sign + digits }
        let places = -exponent
        digits = String(repeating: "0", count: max(places + 1 - digits.count, 0)) + digits
        return sign + "\(digits.dropLast(places)).\(digits.suffix(places))"
      }
      let tail = digits.count > 1 ? ".\(digits.dropFirst())" : ""
      return sign + "\(digits.prefix(1))\(tail)E\(adjusted < 0 ? "-" : "+")\(abs(adjusted))"
    }
  }

  /// The nearest whole number, of two the even one.
  private static func rounded(_ number: Fraction) -> BigInteger {
    let below = number.floor
    let rest = number - Fraction(below)
    let half = Fraction(.one, BigInteger(2))
    return rest < half || (rest == half && !below.isOdd) ? below : below + .one
  }

  private static let tooLarge = ToolError("the number is too large")
  private static let byZero = ToolError("division by zero")

  private static func checked(_ number: Fraction) throws -> Fraction {
    if max(number.numerator.bitWidth, number.denominator.bitWidth) > mostBits { throw tooLarge }
    return number
  }

  private static func power(_ base: Fraction, _ exponent: Fraction) throws -> Fraction {
    guard exponent.isWhole else {
      if exponent == Fraction(.one, BigInteger(2)) { return try squareRoot(base) }
      throw ToolError("exponents must be whole numbers, or 0.5")
    }
    if base.isZero && exponent < Fraction(0) { throw byZero }
    let bits = BigInteger(max(base.numerator.bitWidth, base.denominator.bitWidth, 1))
    if exponent.numerator.magnitude * bits > BigInteger(mostBits) {
      guard base.isZero || base == Fraction(1) || base == Fraction(-1) else { throw tooLarge }
      return exponent.numerator.isOdd ? base : base * base
    }
    let n = exponent.numerator.int!
    let (top, bottom) = (base.numerator.raised(to: abs(n)), base.denominator.raised(to: abs(n)))
    return n < 0 ? Fraction(bottom, top) : Fraction(top, bottom)
  }

  /// Exact where it is a fraction, else to 30 digits.
  private static func squareRoot(_ number: Fraction) throws -> Fraction {
    if number < Fraction(0) { throw ToolError("the square root of a negative number") }
    let (top, bottom) = (number.numerator.squareRoot, number.denominator.squareRoot)
    if top * top == number.numerator && bottom * bottom == number.denominator { return Fraction(top, bottom) }
    let decimal = Decimal(rounding: number, digits: 30)
    // 40 digits of the root, and a last one that says whether more follow: enough to round to 30.
    let shift = 50 + (decimal.exponent & 1)
    let scaled = decimal.coefficient * BigInteger(10).raised(to: shift)
    let root = scaled.squareRoot
    let sticky = root * root == scaled ? root * BigInteger(10) : root * BigInteger(10) + .one
    let exponent = (decimal.exponent - shift) / 2 - 1
    let scale = BigInteger(10).raised(to: abs(exponent))
    let value = exponent < 0 ? Fraction(sticky, scale) : Fraction(sticky * scale)
    return Decimal(rounding: value, digits: 30).fraction
  }

  /// Exact where it is a whole number, else to some 16 digits.
  private static func cubeRoot(_ number: Fraction) throws -> Fraction {
    if number.isZero { return number }
    let guess = cbrt(double(number))
    guard guess.isFinite, let nearest = Fraction(String(format: "%.0f", guess)) else { throw tooLarge }
    if nearest * nearest * nearest == number { return nearest }
    // All of its binary digits, of which 15 decimal ones are shown.
    let digits = BigInteger(Int(guess.significand * 0x1p52) * (guess < 0 ? -1 : 1))
    let scale = BigInteger(2).raised(to: abs(Int(guess.exponent) - 52))
    return guess.exponent < 52 ? Fraction(digits, scale) : Fraction(digits * scale)
  }

  static func double(_ number: Fraction) -> Double {
    number.isZero ? 0 : Double(Decimal(rounding: number, digits: 30).text) ?? .nan
  }

  // MARK: - Expressions

  private struct Parser {
    /// A number may stand in quotes, as Python's calculator reads it.
    static let token =
      #"(?<![\w.'])(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?!\w))?"#
      + #"|'(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE]\d{1,4})?'|\*\*|//|[A-Za-z_]\w*|\S"#
    private let tokens: [String]
    private let expression: String
    private var at = 0
    private var depth = 0

    init(tokens: [String], expression: String) {
      self.tokens = tokens
      self.expression = expression
    }

    private var wrong: ToolError { ToolError("'\(expression.prefix(100))' is no expression") }

    private mutating func take(_ token: String) -> Bool {
      guard at < tokens.count, tokens[at] == token else { return false }
      at += 1
      return true
    }

    mutating func whole() throws -> Fraction {
      let value = try sum()
      guard at == tokens.count else { throw wrong }
      return value
    }

    private mutating func sum() throws -> Fraction {
      depth += 1
      defer { depth -= 1 }
      if depth > 90 { throw wrong }
      var value = try product()
      while true {
        if take("+") {
          value = try checked(value + product())
        } else if take("-") {
          value = try checked(value - product())
        } else {
          return value
        }
      }
    }

    private mutating func product() throws -> Fraction {
      var value = try signed()
      while true {
        if take("*") {
          value = try checked(value * signed())
        } else if take("/") {
          value = try checked(value / divisor())
        } else if take("//") {
          value = try checked(Fraction((value / divisor()).floor))
        } else if take("%") {
          let by = try divisor()
          value = try checked(value - by * Fraction((value / by).floor))
        } else {
          return value
        }
      }
    }

    private mutating func divisor() throws -> Fraction {
      let value = try signed()
      if value.isZero { throw byZero }
      return value
    }

    private mutating func signed() throws -> Fraction {
      depth += 1
      defer { depth -= 1 }
      if depth > 90 { throw wrong }
      if take("-") { return try -signed() }
      if take("+") { return try signed() }
      let base = try atom()
      return take("**") ? try checked(power(base, signed())) : base
    }

    private mutating func atom() throws -> Fraction {
      guard at < tokens.count else { throw wrong }
      let token = tokens[at]
      at += 1
      if token == "(" {
        let value = try sum()
        guard take(")") else { throw wrong }
        return value
      }
      let digits = token.trimmingCharacters(in: CharacterSet(charactersIn: "'"))
      if let number = Fraction(digits.replacingOccurrences(of: "_", with: "")) { return try checked(number) }
      switch token {
      case "pi": return Fraction("3.14159265358979323846")!
      case "e": return Fraction("2.71828182845904523536")!
      case "sqrt", "cbrt", "abs", "round", "min", "max":
        guard take("(") else { throw ToolError("\(token) is not arithmetic") }
        var values = [try sum()]
        while take(",") { values.append(try sum()) }
        guard take(")") else { throw wrong }
        return try checked(apply(token, values))
      case _ where token.first!.isLetter: throw ToolError("\(token.prefix(60)) is not arithmetic")
      default: throw wrong
      }
    }

    private func apply(_ name: String, _ values: [Fraction]) throws -> Fraction {
      switch (name, values.count) {
      case ("min", 2...): return values.min()!
      case ("max", 2...): return values.max()!
      case ("abs", 1): return values[0] < Fraction(0) ? -values[0] : values[0]
      case ("round", 1): return Fraction(rounded(values[0]))
      case ("sqrt", 1): return try squareRoot(values[0])
      case ("cbrt", 1): return try cubeRoot(values[0])
      default: throw wrong
      }
    }
  }

  // MARK: - Units

  /// Convert lengths, areas, volumes, masses, speeds, times, temperatures, amounts of data and energy.
  static func convert(_ value: Fraction, _ from: String, _ to: String) throws -> Fraction {
    let (a, b) = (try unit(from), try unit(to))
    guard a.kind == b.kind else {
      throw ToolError("\(from) is a unit of \(a.kind) and \(to) one of \(b.kind)")
    }
    return (value + a.zero) * a.factor / b.factor - b.zero
  }

  /// A unit's kind, its factor, and what is added before.
  private static func unit(_ name: String) throws -> (kind: String, factor: Fraction, zero: Fraction) {
    let plain = name.trimmingCharacters(in: .whitespacesAndNewlines).lowercased()
      .replacingOccurrences(of: "degrees ", with: "").replacingOccurrences(of: "²", with: "2")
      .replacingOccurrences(of: "³", with: "3")
    let wanted = plain.split(whereSeparator: \.isWhitespace).joined(separator: "_")
    let spellings = [
      wanted, wanted.hasSuffix("s") ? String(wanted.dropLast()) : wanted,
      wanted.hasSuffix("es") ? String(wanted.dropLast(2)) : wanted,
    ]
    for spelled in spellings {
      for (kind, units) in units {
        for (names, factor) in units {
          let names = names.split(separator: " ").map(String.init)
          guard names.contains(spelled) else { continue }
          let zero =
            names.contains("celsius") ? "273.15" : names.contains("fahrenheit") ? "459.67" : "0"
          return (kind, Fraction(factor)!, Fraction(zero)!)
        }
      }
    }
    throw ToolError("there is no unit '\(name.prefix(60))' here")
  }

  /// Of each kind: names of a unit, and how many of the first unit it is.
  private static let units: [(String, [(String, String)])] = [
    (
      "length",
      [
        ("m meter metre", "1"), ("km kilometer kilometre", "1000"), ("cm centimeter centimetre", "0.01"),
        ("mm millimeter millimetre", "0.001"), ("mi mile", "1609.344"), ("yd yard", "0.9144"),
        ("ft foot feet", "0.3048"), ("in inch inches", "0.0254"), ("nmi nautical_mile", "1852"),
      ]
    ),
    (
      "area",
      [
        ("m2 square_meter square_metre", "1"), ("km2 square_kilometer square_kilometre", "1000000"),
        ("ha hectare", "10000"), ("acre", "4046.8564224"), ("ft2 square_foot square_feet", "0.09290304"),
        ("mi2 square_mile", "2589988.110336"),
      ]
    ),
    (
      "volume",
      [
        ("l liter litre", "1"), ("ml milliliter millilitre", "0.001"), ("cl centiliter centilitre", "0.01"),
        ("m3 cubic_meter cubic_metre", "1000"), ("gal gallon", "3.785411784"), ("qt quart", "0.946352946"),
        ("pt pint", "0.473176473"), ("cup", "0.2365882365"), ("fl_oz fluid_ounce", "0.0295735295625"),
        ("tbsp tablespoon", "0.01478676478125"), ("tsp teaspoon", "0.00492892159375"),
      ]
    ),
    (
      "mass",
      [
        ("g gram gramme", "1"), ("kg kilogram kilo", "1000"), ("mg milligram", "0.001"),
        ("t ton tonne", "1000000"), ("lb lbs pound", "453.59237"), ("oz ounce", "28.349523125"),
        ("st stone", "6350.29318"),
      ]
    ),
    (
      "speed",
      [
        ("m/s meters_per_second", "1"), ("km/h kmh kph kilometers_per_hour", "5/18"),
        ("mph miles_per_hour", "0.44704"), ("kn knot", "463/900"),
      ]
    ),
    (
      "time",
      [
        ("s sec second", "1"), ("ms millisecond", "0.001"), ("min minute", "60"), ("h hr hour", "3600"),
        ("d day", "86400"), ("week", "604800"), ("year", "31557600"),
      ]
    ),
    (
      "temperature",
      [
        ("c celsius °c", "1"), ("k kelvin", "1"), ("f fahrenheit °f", "5/9"),
      ]
    ),
    (
      "data",
      [
        ("byte b", "1"), ("bit", "0.125"), ("kb kilobyte", "1000"), ("mb megabyte", "1000000"),
        ("gb gigabyte", "1000000000"), ("tb terabyte", "1000000000000"), ("kib kibibyte", "1024"),
        ("mib mebibyte", "1048576"), ("gib gibibyte", "1073741824"),
      ]
    ),
    (
      "energy",
      [
        ("j joule", "1"), ("kj kilojoule", "1000"), ("cal calorie", "4.184"), ("kcal kilocalorie", "4184"),
        ("wh watt_hour", "3600"), ("kwh kilowatt_hour", "3600000"),
      ]
    ),
  ]
}
