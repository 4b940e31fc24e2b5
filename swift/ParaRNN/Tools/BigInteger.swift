/// A whole number of any size.
struct BigInteger: Sendable, Hashable, Comparable {
  /// Base 2^32, the lowest first, without zeros at the end; empty for 0.
  private var limbs: [UInt32]
  private(set) var isNegative: Bool

  init(_ value: Int) {
    let magnitude = UInt64(value.magnitude)
    self.init(
      limbs: [UInt32(truncatingIfNeeded: magnitude), UInt32(truncatingIfNeeded: magnitude >> 32)],
      isNegative: value < 0)
  }

  private init(limbs: [UInt32], isNegative: Bool) {
    var limbs = limbs
    while limbs.last == 0 { limbs.removeLast() }
    self.limbs = limbs
    self.isNegative = isNegative && !limbs.isEmpty
  }

  /// From decimal digits alone; nil for anything else.
  init?(digits: some StringProtocol) {
    guard !digits.isEmpty, digits.utf8.allSatisfy({ (0x30...0x39).contains($0) }) else { return nil }
    var limbs: [UInt32] = []
    var rest = Array(digits.utf8)[...]
    while !rest.isEmpty {
      let part = rest.prefix(9)
      rest = rest.dropFirst(9)
      var scale: UInt64 = 1
      var carry: UInt64 = 0
      for digit in part { (carry, scale) = (carry * 10 + UInt64(digit - 0x30), scale * 10) }
      for i in limbs.indices {
        let product = UInt64(limbs[i]) * scale + carry
        limbs[i] = UInt32(truncatingIfNeeded: product)
        carry = product >> 32
      }
      if carry > 0 { limbs.append(UInt32(carry)) }
    }
    self.init(limbs: limbs, isNegative: false)
  }

  static let zero = BigInteger(0)
  static let one = BigInteger(1)

  var isZero: Bool { limbs.isEmpty }
  var isOdd: Bool { limbs.first.map { $0 & 1 == 1 } ?? false }
  var magnitude: BigInteger { BigInteger(limbs: limbs, isNegative: false) }
  var bitWidth: Int { limbs.last.map { 32 * limbs.count - $0.leadingZeroBitCount } ?? 0 }

  /// nil if it does not fit.
  var int: Int? {
    guard bitWidth < 64 else { return nil }
    let value = limbs.reversed().reduce(0) { $0 << 32 | Int($1) }
    return isNegative ? -value : value
  }

  /// Decimal digits.
  var text: String {
    var parts: [UInt32] = []
    var rest = limbs
    while !rest.isEmpty {
      var remainder: UInt64 = 0
      for i in rest.indices.reversed() {
        let value = remainder << 32 | UInt64(rest[i])
        rest[i] = UInt32(value / 1_000_000_000)
        remainder = value % 1_000_000_000
      }
      while rest.last == 0 { rest.removeLast() }
      parts.append(UInt32(remainder))
    }
    guard let first = parts.popLast() else { return "0" }
    let tail = parts.reversed().map { part in
      let digits = String(part)
      return String(repeating: "0", count: 9 - digits.count) + digits
    }
    return (isNegative ? "-" : "") + String(first) + tail.joined()
  }

  static prefix func - (a: BigInteger) -> BigInteger {
    BigInteger(limbs: a.limbs, isNegative: !a.isNegative)
  }

  static func < (a: BigInteger, b: BigInteger) -> Bool {
    if a.isNegative != b.isNegative { return a.isNegative }
    return a.isNegative ? isLess(b.limbs, a.limbs) : isLess(a.limbs, b.limbs)
  }

  static func + (a: BigInteger, b: BigInteger) -> BigInteger {
    if a.isNegative == b.isNegative {
      return BigInteger(limbs: sum(a.limbs, b.limbs), isNegative: a.isNegative)
    }
    return isLess(a.limbs, b.limbs)
      ? BigInteger(limbs: difference(b.limbs, a.limbs), isNegative: b.isNegative)
      : BigInteger(limbs: difference(a.limbs, b.limbs), isNegative: a.isNegative)
  }

  static func - (a: BigInteger, b: BigInteger) -> BigInteger { a + -b }

  static func * (a: BigInteger, b: BigInteger) -> BigInteger {
    var limbs = [UInt32](repeating: 0, count: a.limbs.count + b.limbs.count)
    for (i, x) in a.limbs.enumerated() {
      var carry: UInt64 = 0
      for (j, y) in b.limbs.enumerated() {
        let value = UInt64(x) * UInt64(y) + UInt64(limbs[i + j]) + carry
        limbs[i + j] = UInt32(truncatingIfNeeded: value)
        carry = value >> 32
      }
      limbs[i + b.limbs.count] = UInt32(carry)
    }
    return BigInteger(limbs: limbs, isNegative: a.isNegative != b.isNegative)
  }

  /// Quotient and remainder, the quotient towards minus infinity, as Python's; `divisor` is not 0.
  func dividedDown(by divisor: BigInteger) -> (quotient: BigInteger, remainder: BigInteger) {
    let (q, r) = Self.divide(limbs, divisor.limbs)
    let quotient = BigInteger(limbs: q, isNegative: isNegative != divisor.isNegative)
    let remainder = BigInteger(limbs: r, isNegative: isNegative)
    if !remainder.isZero && isNegative != divisor.isNegative {
      return (quotient - .one, remainder + divisor)
    }
    return (quotient, remainder)
  }

  func raised(to power: Int) -> BigInteger {
    var (result, base, rest) = (BigInteger.one, self, power)
    while rest > 0 {
      if rest & 1 == 1 { result = result * base }
      rest >>= 1
      if rest > 0 { base = base * base }
    }
    return result
  }

  /// The largest whole number whose square is not above this one, which is not negative.
  var squareRoot: BigInteger {
    if isZero { return self }
    var root = BigInteger(2).raised(to: (bitWidth + 1) / 2)
    while true {
      let next = (root + dividedDown(by: root).quotient).dividedDown(by: BigInteger(2)).quotient
      if next >= root { return root }
      root = next
    }
  }

  static func greatestCommonDivisor(_ a: BigInteger, _ b: BigInteger) -> BigInteger {
    var (x, y) = (a.magnitude, b.magnitude)
    while !y.isZero { (x, y) = (y, x.dividedDown(by: y).remainder) }
    return x
  }

  // MARK: - Magnitudes

  private static func isLess(_ a: [UInt32], _ b: [UInt32]) -> Bool {
    a.count != b.count ? a.count < b.count : a.reversed().lexicographicallyPrecedes(b.reversed())
  }

  private static func sum(_ a: [UInt32], _ b: [UInt32]) -> [UInt32] {
    var limbs: [UInt32] = []
    var carry: UInt64 = 0
    for i in 0..<max(a.count, b.count) {
      let value = UInt64(i < a.count ? a[i] : 0) + UInt64(i < b.count ? b[i] : 0) + carry
      limbs.append(UInt32(truncatingIfNeeded: value))
      carry = value >> 32
    }
    return limbs + [UInt32(carry)]
  }

  /// `b` is not above `a`.
  private static func difference(_ a: [UInt32], _ b: [UInt32]) -> [UInt32] {
    var limbs = a
    var borrow: Int64 = 0
    for i in limbs.indices {
      let value = Int64(a[i]) - Int64(i < b.count ? b[i] : 0) - borrow
      borrow = value < 0 ? 1 : 0
      limbs[i] = UInt32(truncatingIfNeeded: value)
    }
    return limbs
  }

  /// Knuth, The Art of Computer Programming, volume 2, 4.3.1, algorithm D.
  private static func divide(_ a: [UInt32], _ b: [UInt32]) -> ([UInt32], [UInt32]) {
    if isLess(a, b) { return ([], a) }
    if b.count == 1 {
      var (quotient, remainder) = (a, UInt64(0))
      for i in a.indices.reversed() {
        let value = remainder << 32 | UInt64(a[i])
        quotient[i] = UInt32(value / UInt64(b[0]))
        remainder = value % UInt64(b[0])
      }
      return (quotient, [UInt32(remainder)])
    }
    let shift = UInt64(b.last!.leadingZeroBitCount)
    func shifted(_ limbs: [UInt32]) -> [UInt32] {
      var carry: UInt64 = 0
      var result: [UInt32] = []
      for limb in limbs {
        let value = UInt64(limb) << shift | carry
        result.append(UInt32(truncatingIfNeeded: value))
        carry = value >> 32
      }
      return result + [UInt32(carry)]
    }
    let divisor = Array(shifted(b).prefix(b.count))
    var rest = shifted(a)
    var quotient = [UInt32](repeating: 0, count: a.count - b.count + 1)
    let n = b.count
    let base = UInt64(1) << 32
    for j in quotient.indices.reversed() {
      let top = UInt64(rest[j + n]) << 32 | UInt64(rest[j + n - 1])
      var guess = top / UInt64(divisor[n - 1])
      var left = top % UInt64(divisor[n - 1])
      while guess >= base || guess * UInt64(divisor[n - 2]) > left << 32 | UInt64(rest[j + n - 2]) {
        guess -= 1
        left += UInt64(divisor[n - 1])
        if left >= base { break }
      }
      var (borrow, carry): (Int64, UInt64) = (0, 0)
      for i in 0..<n {
        let product = guess * UInt64(divisor[i]) + carry
        carry = product >> 32
        let value = Int64(rest[i + j]) - borrow - Int64(product & 0xFFFF_FFFF)
        rest[i + j] = UInt32(truncatingIfNeeded: value)
        borrow = value < 0 ? 1 : 0
      }
      let value = Int64(rest[j + n]) - borrow - Int64(carry)
      rest[j + n] = UInt32(truncatingIfNeeded: value)
      if value < 0 {
        guess -= 1
        var carry: UInt64 = 0
        for i in 0..<n {
          let value = UInt64(rest[i + j]) + UInt64(divisor[i]) + carry
          rest[i + j] = UInt32(truncatingIfNeeded: value)
          carry = value >> 32
        }
        rest[j + n] = UInt32(truncatingIfNeeded: UInt64(rest[j + n]) + carry)
      }
      quotient[j] = UInt32(guess)
    }
    var remainder = Array(rest.prefix(n))
    if shift > 0 {
      for i in remainder.indices {
        let above = i + 1 < n ? remainder[i + 1] : 0
        remainder[i] = UInt32(
          truncatingIfNeeded: UInt64(remainder[i]) >> shift | UInt64(above) << (32 - shift))
      }
    }
    return (quotient, remainder)
  }
}

/// A fraction in lowest terms, its denominator above 0.
struct Fraction: Sendable, Hashable, Comparable {
  let numerator: BigInteger
  let denominator: BigInteger

  /// `denominator` is not 0.
  init(_ numerator: BigInteger, _ denominator: BigInteger = .one) {
    let divisor = BigInteger.greatestCommonDivisor(numerator, denominator)
    let sign = BigInteger(denominator.isNegative ? -1 : 1)
    self.numerator = (numerator * sign).dividedDown(by: divisor).quotient
    self.denominator = (denominator * sign).dividedDown(by: divisor).quotient
  }

  init(_ value: Int) { self.init(BigInteger(value)) }

  /// "12", "3.5", ".5", "1e-3", "5/18", with a sign or without; nil for anything else.
  init?(_ text: String) {
    if let slash = text.firstIndex(of: "/") {
      guard let top = BigInteger(digits: text[..<slash]),
        let bottom = BigInteger(digits: text[text.index(after: slash)...]), !bottom.isZero
      else { return nil }
      self.init(top, bottom)
      return
    }
    var rest = text[...]
    let isNegative = rest.first == "-"
    if isNegative || rest.first == "+" { rest = rest.dropFirst() }
    let parts = rest.split(omittingEmptySubsequences: false) { $0 == "e" || $0 == "E" }
    guard parts.count <= 2, var exponent = parts.count == 2 ? Int(parts[1]) : 0, abs(exponent) < 10_000 else {
      return nil
    }
    let sides = parts[0].split(separator: ".", omittingEmptySubsequences: false)
    guard sides.count <= 2, let whole = BigInteger(digits: sides.joined()) else { return nil }
    exponent -= sides.count == 2 ? sides[1].count : 0
    let scale = BigInteger(10).raised(to: abs(exponent))
    let signed = isNegative ? -whole : whole
    self = exponent < 0 ? Fraction(signed, scale) : Fraction(signed * scale)
  }

  var isWhole: Bool { denominator == .one }
  var isZero: Bool { numerator.isZero }

  /// The largest whole number that is not above this one.
  var floor: BigInteger { numerator.dividedDown(by: denominator).quotient }

  static func < (a: Fraction, b: Fraction) -> Bool {
    a.numerator * b.denominator < b.numerator * a.denominator
  }
  static prefix func - (a: Fraction) -> Fraction { Fraction(-a.numerator, a.denominator) }
  static func + (a: Fraction, b: Fraction) -> Fraction {
    Fraction(a.numerator * b.denominator + b.numerator * a.denominator, a.denominator * b.denominator)
  }
  static func - (a: Fraction, b: Fraction) -> Fraction { a + -b }
  static func * (a: Fraction, b: Fraction) -> Fraction {
    Fraction(a.numerator * b.numerator, a.denominator * b.denominator)
  }
  /// `b` is not 0.
  static func / (a: Fraction, b: Fraction) -> Fraction {
    Fraction(a.numerator * b.denominator, a.denominator * b.numerator)
  }
}
