import Foundation

/// A day of the Gregorian calendar, in the years 1 to 9999.
struct Day: Sendable, Comparable {
  /// Since 1 January 1970.
  let ordinal: Int

  static let months = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november",
    "december",
  ]
  static let weekdays = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
  static let outside = ToolError("That is outside the years 1 to 9999.")
  private static let ordinals = -719_162...2_932_896

  /// nil outside the calendar.
  init?(ordinal: Int) {
    guard Self.ordinals.contains(ordinal) else { return nil }
    self.ordinal = ordinal
  }

  /// nil if there is no such day.
  init?(_ year: Int, _ month: Int, _ day: Int) {
    guard (1...9999).contains(year), (1...12).contains(month), day >= 1, day <= Self.length(year, month)
    else {
      return nil
    }
    // Years that begin in March, in eras of 400: the leap day stands at the end of its year.
    let shifted = month <= 2 ? year - 1 : year
    let era = Int((Double(shifted) / 400).rounded(.down))
    let ofEra = shifted - era * 400
    let ofYear = (153 * ((month + 9) % 12) + 2) / 5 + day - 1
    ordinal = era * 146_097 + ofEra * 365 + ofEra / 4 - ofEra / 100 + ofYear - 719_468
  }

  /// Year, month and day of the month.
  var parts: (year: Int, month: Int, day: Int) {
    let days = ordinal + 719_468
    let era = Int((Double(days) / 146_097).rounded(.down))
    let ofEra = days - era * 146_097
    let year = (ofEra - ofEra / 1460 + ofEra / 36524 - ofEra / 146_096) / 365
    let ofYear = ofEra - (365 * year + year / 4 - year / 100)
    let shifted = (5 * ofYear + 2) / 153
    let month = shifted < 10 ? shifted + 3 : shifted - 9
    return (era * 400 + year + (month <= 2 ? 1 : 0), month, ofYear - (153 * shifted + 2) / 5 + 1)
  }

  /// 0 for Monday.
  var weekday: Int { ((ordinal + 3) % 7 + 7) % 7 }

  /// "Monday, 1 June 2026"
  var words: String {
    let (year, month, day) = parts
    return "\(Self.weekdays[weekday].capitalized), \(day) \(Self.months[month - 1].capitalized) \(year)"
  }

  func shifted(_ days: Int) throws -> Day {
    let (ordinal, overflows) = ordinal.addingReportingOverflow(days)
    guard !overflows, let day = Day(ordinal: ordinal) else { throw Self.outside }
    return day
  }

  static func length(_ year: Int, _ month: Int) -> Int {
    switch month {
    case 2: year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) ? 29 : 28
    case 4, 6, 9, 11: 30
    default: 31
    }
  }

  static func < (a: Day, b: Day) -> Bool { a.ordinal < b.ordinal }
}

/// A moment by the clock on the wall, in seconds since 1 January 1970 by that clock.
struct Moment: Sendable, Comparable {
  let seconds: Double

  init(seconds: Double) { self.seconds = seconds }

  init(_ date: Date, in zone: TimeZone) {
    seconds = date.timeIntervalSince1970 + Double(zone.secondsFromGMT(for: date))
  }

  init(_ day: Day, _ hour: Int, _ minute: Int) {
    seconds = Double(day.ordinal * 86400 + hour * 3600 + minute * 60)
  }

  var day: Day { Day(ordinal: Int((seconds / 86400).rounded(.down))) ?? Day(1970, 1, 1)! }
  var hour: Int { secondOfDay / 3600 }
  var minute: Int { secondOfDay / 60 % 60 }
  private var secondOfDay: Int { Int(seconds.rounded(.down)) - day.ordinal * 86400 }

  /// "19:30"
  var time: String { String(format: "%02d:%02d", hour, minute) }

  /// "19:30 on Monday, 1 June 2026"
  var words: String { "\(time) on \(day.words)" }

  func shifted(_ length: Int) throws -> Moment {
    let moment = Moment(seconds: seconds + Double(length))
    guard abs(moment.seconds) < 1e12, Day(ordinal: Int((moment.seconds / 86400).rounded(.down))) != nil else {
      throw Day.outside
    }
    return moment
  }

  static func < (a: Moment, b: Moment) -> Bool { a.seconds < b.seconds }
}

/// A length of time in whole months, days and seconds, which are not converted into each other.
struct Length: Sendable {
  var months = 0
  var days = 0
  var seconds = 0

  /// All of it in seconds.
  func totalSeconds() throws -> Int {
    if months != 0 {
      throw ToolError("I can count days, hours, minutes and seconds, but not months or years.")
    }
    return days * 86400 + seconds
  }

  /// The day this long after `start`, or before it with `sign` -1; the month's last where it is too short.
  func from(_ start: Day, sign: Int = 1) throws -> Day {
    if seconds % 86400 != 0 {
      throw ToolError("I can add days, weeks, months and years to a date, but not hours.")
    }
    let (year, month, day) = start.parts
    let all = year * 12 + month - 1 + sign * months
    guard (12..<120_000).contains(all),
      let moved = Day(all / 12, all % 12 + 1, min(day, Day.length(all / 12, all % 12 + 1)))
    else { throw Day.outside }
    return try moved.shifted(sign * (days + seconds / 86400))
  }

  /// "an hour and a half" is "1 hour and 30 minutes".
  var words: String {
    let inWeeks = days % 7 == 0
    let units = [
      (months / 12, "year"), (months % 12, "month"), (inWeeks ? days / 7 : 0, "week"),
      (inWeeks ? 0 : days, "day"),
      (seconds / 3600, "hour"), (seconds / 60 % 60, "minute"), (seconds % 60, "second"),
    ]
    let parts = units.filter { $0.0 != 0 }.map { Words.count($0.0, $0.1) }
    return parts.isEmpty ? "0 seconds" : Words.join(parts)
  }
}

/// Durations, dates and times of day as people write them, by the rules of Python's `mlx_pararnn.pocket.date_words`.
enum DateWords {
  private enum Counted { case months, days, seconds }
  private static let units: [String: (Counted, Int)] = [
    "second": (.seconds, 1), "sec": (.seconds, 1), "s": (.seconds, 1), "minute": (.seconds, 60),
    "min": (.seconds, 60), "m": (.seconds, 60), "hour": (.seconds, 3600), "hr": (.seconds, 3600),
    "h": (.seconds, 3600), "day": (.days, 1), "d": (.days, 1), "week": (.days, 7), "wk": (.days, 7),
    "fortnight": (.days, 14), "month": (.months, 1), "year": (.months, 12), "yr": (.months, 12),
    "decade": (.months, 120), "century": (.months, 1200),
  ]
  private static let shortWeekdays = [
    "tues": "tuesday", "thur": "thursday", "thurs": "thursday", "weds": "wednesday",
  ]
  private static let holidays = [
    "christmas": (12, 25), "christmas day": (12, 25), "xmas": (12, 25), "christmas eve": (12, 24),
    "new year": (1, 1), "new year's": (1, 1), "new year's day": (1, 1), "new year's eve": (12, 31),
    "halloween": (10, 31), "valentine's day": (2, 14), "valentine's": (2, 14), "st patrick's day": (3, 17),
  ]
  private static let relativeDays = [
    "today": 0, "now": 0, "tonight": 0, "tomorrow": 1, "tmrw": 1, "yesterday": -1, "day after tomorrow": 2,
    "day before yesterday": -2,
  ]
  private enum Half { case am, pm }
  /// Which half of the day they are in, and when they begin if no time is given.
  private static let partsOfDay: [String: (Half, Int)] = [
    "morning": (.am, 9), "afternoon": (.pm, 15), "evening": (.pm, 19), "night": (.pm, 20),
  ]

  // MARK: - Durations

  /// "5 minutes", "1h30", "an hour and a half", "2 weeks", "ten-minute"
  static func duration(_ text: String) throws -> Length {
    let wrong = ToolError("I do not understand the duration '\(text)'.")
    guard let amounts = try? NumberWords.amounts(text) else { throw wrong }
    var (months, days, seconds) = (Fraction(0), Fraction(0), Fraction(0))
    var previous: String?
    for (value, word) in amounts {
      let isMinutes = word.isEmpty && ["hour", "hr", "h"].contains(previous)
      guard let name = unitName(word) ?? (isMinutes ? "minute" : nil), let (counted, size) = units[name]
      else {
        throw wrong
      }
      switch counted {
      case .months: months = months + value * Fraction(size)
      case .days: days = days + value * Fraction(size)
      case .seconds: seconds = seconds + value * Fraction(size)
      }
      previous = name
    }
    let whole = Fraction(days.floor)
    seconds = seconds + (days - whole) * Fraction(86400)
    let all = [months, whole, seconds]
    guard all.allSatisfy(\.isWhole), !all.allSatisfy(\.isZero) else { throw wrong }
    let numbers = all.compactMap { $0.numerator.bitWidth < 50 ? $0.numerator.int : nil }
    guard numbers.count == 3 else { throw Day.outside }
    return Length(months: numbers[0], days: numbers[1], seconds: numbers[2])
  }

  private static func unitName(_ word: String) -> String? {
    if units[word] != nil { return word }
    if word == "centuries" { return "century" }
    let single = word.hasSuffix("s") ? String(word.dropLast()) : word
    if units[single] != nil { return single }
    return Words.nearest(single, units.keys) ?? Words.nearest(word, units.keys)
  }

  /// "in 20 minutes", "20 minutes from now"
  private static func lengthFromNow(_ words: [String]) throws -> Length? {
    if words.first == "in" { return try duration(words.dropFirst().joined(separator: " ")) }
    if [["from", "now"], ["from", "today"]].contains(Array(words.suffix(2))) {
      return try duration(words.dropLast(2).joined(separator: " "))
    }
    return nil
  }

  // MARK: - Moments

  /// The next moment that a time of day and a day mean; either may be empty.
  static func moment(_ text: String, _ day: String, _ now: Moment) throws -> Moment {
    var words = Words.split(text)
    if let length = try lengthFromNow(words), day.isEmpty { return try now.shifted(length.totalSeconds()) }
    let (ownHalf, begins, rest) = partOfDay(words)
    words = rest
    let (dayHalf, dayBegins, found) = partOfDay(Words.split(day))
    var dayWords = found
    if dayHalf != nil && dayWords.isEmpty { dayWords = ["today"] }
    let half = ownHalf ?? dayHalf
    var (hour, minute, isSure) = (begins ?? dayBegins ?? 9, 0, true)
    if !words.isEmpty { (hour, minute, isSure) = try clockTime(words, half, text) }
    if !dayWords.isEmpty {
      let on = try date(dayWords.joined(separator: " "), now.day)
      if !isSure && !(6...11).contains(hour) { hour = hour % 12 + 12 }
      return Moment(on, hour, minute)
    }
    let hours = isSure ? [hour] : [hour % 12, hour % 12 + 12]
    let today = hours.map { Moment(now.day, $0, minute) }
    if let next = today.first(where: { $0 > now }) { return next }
    return try today[0].shifted(86400)
  }

  /// The times that a text may mean: "7:30" 07:30 and then 19:30, "7:30 pm" 19:30 alone.
  static func timesOfDay(_ text: String, _ now: Moment) throws -> [(hour: Int, minute: Int)] {
    if let length = try lengthFromNow(Words.split(text)) {
      let at = try now.shifted(length.totalSeconds())
      return [(at.hour, at.minute)]
    }
    let (half, begins, words) = partOfDay(Words.split(text))
    if words.isEmpty { return [(begins ?? 9, 0)] }
    let (hour, minute, isSure) = try clockTime(words, half, text)
    return isSure ? [(hour, minute)] : [(hour, minute), ((hour + 12) % 24, minute)]
  }

  /// The half of the day, the hour at which its named part begins, and the words without it.
  private static func partOfDay(_ words: [String]) -> (Half?, Int?, [String]) {
    guard let last = words.last else { return (nil, nil, words) }
    if last == "am" || last == "pm" { return (last == "am" ? .am : .pm, nil, Array(words.dropLast())) }
    if last == "tonight" { return (.pm, 20, Array(words.dropLast())) }
    guard let (half, begins) = partsOfDay[last] else { return (nil, nil, words) }
    var rest = Array(words.dropLast())
    for filler in [["in", "the"], ["at"], ["this"]] where Array(rest.suffix(filler.count)) == filler {
      rest.removeLast(filler.count)
    }
    return (half, begins, rest)
  }

  /// Hour, minute, and whether it is sure which half of the day is meant.
  private static func clockTime(_ words: [String], _ half: Half?, _ text: String) throws -> (Int, Int, Bool) {
    let fillers = ["at", "around", "about", "by", "o'clock", "oclock", "sharp"]
    let words = words.filter { !fillers.contains($0) }
    if words == ["noon"] || words == ["midday"] { return (12, 0, true) }
    if words == ["midnight"] { return (0, 0, true) }
    guard let (hour, minute) = try hourAndMinute(words), (0...23).contains(hour), (0...59).contains(minute)
    else {
      throw ToolError("I do not understand the time '\(text)'.")
    }
    if let half, (1...12).contains(hour) { return (hour % 12 + (half == .pm ? 12 : 0), minute, true) }
    return (hour, minute, half != nil || !(1...12).contains(hour) || words.first?.first == "0")
  }

  private static func hourAndMinute(_ words: [String]) throws -> (Int, Int)? {
    if words.count == 1, let groups = Words.groups(#"(\d{1,2})[:.](\d\d)|(\d{1,2})(\d\d)"#, in: words[0]) {
      let numbers = groups.dropFirst().compactMap { $0.flatMap(Int.init) }
      if numbers.count == 2 { return (numbers[0], numbers[1]) }
    }
    for (sign, sides) in [(1, ["past", "after"]), (-1, ["to", "till", "before"])] {
      if let at = words.firstIndex(where: sides.contains) {
        return try minutesFromHour(sign, Array(words[..<at]), Array(words[(at + 1)...]))
      }
    }
    if words.first == "half" { return try minutesFromHour(1, ["half"], Array(words.dropFirst())) }  // 7:30
    guard let (hour, next) = try NumberWords.readSmall(words, 0) else { return nil }
    var at = next
    if let word = words.word(at), ["oh", "o"].contains(word) { at += 1 }
    let second = try NumberWords.readSmall(words, at)
    if at == words.count { return (hour, 0) }
    return second.flatMap { $0.next == words.count ? (hour, $0.value) : nil }
  }

  /// "quarter to eight": 7, 45
  private static func minutesFromHour(_ sign: Int, _ minutes: [String], _ hour: [String]) throws -> (
    Int, Int
  )? {
    let minutes = minutes.filter { !["a", "minute", "minutes"].contains($0) }
    let length: Int
    if minutes == ["half"] {
      length = 30
    } else if minutes == ["quarter"] {
      length = 15
    } else if let read = try NumberWords.readSmall(minutes, 0), read.next == minutes.count {
      length = read.value
    } else {
      return nil
    }
    guard let whole = try NumberWords.readSmall(hour, 0), whole.next == hour.count, (1...59).contains(length)
    else { return nil }
    if sign > 0 { return (whole.value, length) }
    let before = ((whole.value - 1) % 12 + 12) % 12
    return (before == 0 ? 12 : before, 60 - length)
  }

  // MARK: - Dates

  /// "3 March", "march 3rd 2027", "2027-03-03", "christmas", "tomorrow", "next friday", "in 3 days"; without a year the
  /// next such date, today included, with `past` the last one.
  static func date(_ text: String, _ today: Day, past: Bool = false) throws -> Day {
    let wrong = ToolError("I do not understand the date '\(text)'.")
    func numbers(_ groups: [String?]) -> [Int] { groups.dropFirst().compactMap { $0.flatMap(Int.init) } }
    if let groups = Words.groups(#"\s*(\d{4})-(\d{1,2})-(\d{1,2})\s*"#, in: text) {
      let parts = numbers(groups)
      guard parts.count == 3, let day = Day(parts[0], parts[1], parts[2]) else { throw wrong }
      return day
    }
    if let groups = Words.groups(#"\s*(\d{1,2})/(\d{1,2})(?:/(\d{4}))?\s*"#, in: text) {
      return try slashed(numbers(groups), today, past, wrong)
    }
    let words = Words.split(text).filter { !["on", "the", "of"].contains($0) }
    let plain = words.joined(separator: " ")
    if let found = Words.nearest(plain, relativeDays.keys) { return try today.shifted(relativeDays[found]!) }
    let apostrophes = Words.replacing(#"\b(new year|valentine|patrick)s\b"#, in: plain, with: "$1's")
    if let found = Words.nearest(apostrophes, holidays.keys) {
      let (month, day) = holidays[found]!
      return try withoutYear(month, day, today, past, Day.outside)
    }
    if let length = try lengthFromNow(words) { return try length.from(today) }
    if words.last == "ago" {
      return try duration(words.dropLast().joined(separator: " ")).from(today, sign: -1)
    }
    if let last = words.last, let weekday = weekdayNumber(last),
      [[], ["next"], ["this"], ["last"]].contains(Array(words.dropLast()))
    {
      let back = past || words[0] == "last"
      let distance = back ? today.weekday - weekday : weekday - today.weekday
      let days = ((distance - 1) % 7 + 7) % 7 + 1
      return try today.shifted(back ? -days : days)
    }
    return try dayAndMonth(words, today, past, wrong)
  }

  private static func weekdayNumber(_ word: String) -> Int? {
    let word = shortWeekdays[word] ?? word
    let found = Words.nearest(word, Day.weekdays) ?? Day.weekdays.first { $0.prefix(3) == word }
    return found.flatMap(Day.weekdays.firstIndex)
  }

  private static func monthNumber(_ word: String) -> Int? {
    let found =
      Words.nearest(word, Day.months) ?? Day.months.first { $0.prefix(3) == word || $0.prefix(4) == word }
    return found.flatMap(Day.months.firstIndex).map { $0 + 1 }
  }

  /// "3 march 2027", "march 3rd", "twenty first march", "the 5th", "march"
  private static func dayAndMonth(
    _ words: [String], _ today: Day, _ past: Bool, _ wrong: ToolError
  ) throws -> Day {
    var words = words
    var year: Int?
    if words.count > 1, Words.isDigits(words.last!), words.last!.count == 4 { year = Int(words.removeLast()) }
    let at = words.firstIndex { monthNumber($0) != nil }
    var days = words
    if let at { days.remove(at: at) }
    if let at, at != 0, at != words.count - 1 { throw wrong }
    let day = try dayOfMonth(days)
    if day == nil && (!days.isEmpty || at == nil) { throw wrong }
    let number = day == nil || day == 0 ? 1 : day!
    guard let at else { return try nextDayOfMonth(number, today, past, wrong) }
    let month = monthNumber(words[at]) ?? 1
    guard let year else { return try withoutYear(month, number, today, past, wrong) }
    guard let found = Day(year, month, number) else { throw wrong }
    return found
  }

  private static func dayOfMonth(_ words: [String]) throws -> Int? {
    if words.count == 1, let groups = Words.groups(#"(\d{1,2})(?:st|nd|rd|th)?"#, in: words[0]) {
      return groups[1].flatMap(Int.init)
    }
    let tens = ["twenty": 20, "thirty": 30]
    if words.count == 2, let ten = tens[words[0]], let one = NumberWords.ordinals[words[1]], one < 10 {
      return ten + one
    }
    if words == ["thirtieth"] { return 30 }
    if words.count == 1, let ordinal = NumberWords.ordinals[words[0]] { return ordinal }
    guard let read = try NumberWords.readSmall(words, 0), read.next == words.count else { return nil }
    return read.value
  }

  private static func slashed(_ parts: [Int], _ today: Day, _ past: Bool, _ wrong: ToolError) throws -> Day {
    let (first, second) = (parts[0], parts[1])
    if first <= 12 && second <= 12 && first != second {
      let sentence = "\(wrong.sentence.dropLast()): which is the month? Write it as a word, as in 3 March."
      throw ToolError(sentence)
    }
    let (day, month) = second > 12 ? (second, first) : (first, second)
    guard parts.count == 3 else { return try withoutYear(month, day, today, past, wrong) }
    guard let found = Day(parts[2], month, day) else { throw wrong }
    return found
  }

  private static func withoutYear(
    _ month: Int, _ day: Int, _ today: Day, _ past: Bool, _ wrong: ToolError
  ) throws -> Day {
    guard (1...12).contains(month) else { throw wrong }
    for years in 0..<9 {  // 29 February may take eight
      let year = today.parts.year + (past ? -years : years)
      guard let found = Day(year, month, day) else {
        if (1...9999).contains(year) && day < 1 { throw wrong }
        continue
      }
      if past ? found <= today : found >= today { return found }
    }
    throw wrong
  }

  private static func nextDayOfMonth(
    _ day: Int, _ today: Day, _ past: Bool, _ wrong: ToolError
  ) throws -> Day {
    let (year, month, _) = today.parts
    for months in 0..<3 {
      let all = year * 12 + month - 1 + (past ? -months : months)
      if let found = Day(all / 12, all % 12 + 1, day), past ? found <= today : found >= today { return found }
    }
    throw wrong
  }
}
