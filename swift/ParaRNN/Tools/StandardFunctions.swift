import Foundation

extension ToolFunctions {
  /// What the model that ships can call: timers, alarms, reminders, lists, dates, conversions and calculations, with
  /// the results of Python's `mlx_pararnn.pocket.assistant`.
  ///
  /// Every argument is a piece of the user's message as it was written. What is remembered belongs to a chat, and is
  /// saved and taken back with it; ``ParaRNNChat/due()`` tells which timers are over.
  ///
  /// - Parameters:
  ///   - now: the clock.
  ///   - zone: where it hangs.
  ///   - seconds: how long a call may take.
  public static func standard(
    now: @escaping @Sendable () -> Date = { Date() }, zone: TimeZone = .current, seconds: Double = 5
  ) throws -> ToolFunctions {
    var functions = ToolFunctions(seconds: seconds)
    functions.instead = Misread.instead
    functions.checkAnswer = Misread.checkAnswer
    functions.assistant = Assistant { Moment(now(), in: zone) }
    for (name, description, parameters) in Assistant.functions {
      let schema = JSONText.object([
        .init(name: "type", value: .string("object")),
        .init(
          name: "properties",
          value: .object(
            parameters.map { parameter in
              let name = parameter.hasSuffix("?") ? String(parameter.dropLast()) : parameter
              return .init(name: name, value: .object([.init(name: "type", value: .string("string"))]))
            })),
        .init(name: "required", value: .array(parameters.filter { !$0.hasSuffix("?") }.map { .string($0) })),
        .init(name: "additionalProperties", value: .bool(false)),
      ])
      try functions.add(name, description, schema.text) { data, assistant in
        let arguments = try JSONDecoder().decode([String: String].self, from: data)
        return try await assistant!.call(name) { arguments[$0] ?? "" }
      }
    }
    return functions
  }
}

/// The standard functions and what they remember.
actor Assistant {
  /// Names, descriptions and parameters; those with a question mark can be left out.
  static let functions: [(String, String, [String])] = [
    ("set_timer", "Start a timer.", ["duration", "name?"]),
    ("cancel_timer", "Cancel the timer with a name, or all of them.", ["name?"]),
    ("show_timers", "Say how much time is left on the timers.", []),
    ("set_alarm", "Set an alarm.", ["time", "day?"]),
    ("cancel_alarm", "Cancel the alarm at a time of day, or all of them.", ["time?"]),
    ("show_alarms", "Say which alarms are set.", []),
    ("set_reminder", "Remember something.", ["text", "time?", "day?"]),
    ("cancel_reminder", "Forget the reminder with a text, or all of them.", ["text?"]),
    ("show_reminders", "Say which reminders there are.", []),
    ("add_to_list", "Put items on a list.", ["items", "list?"]),
    ("remove_from_list", "Take items off a list, or off all of them if none is named.", ["items", "list?"]),
    ("show_list", "Say what is on a list, or on all of them if none is named.", ["list?"]),
    ("clear_list", "Empty a list.", ["list?"]),
    ("date_after", "The date some time after a date, or after today.", ["duration", "date?"]),
    ("date_before", "The date some time before a date, or before today.", ["duration", "date?"]),
    ("days_until", "How many days it is until a date.", ["date"]),
    ("days_since", "How many days it has been since a date.", ["date"]),
    ("days_between", "How many days there are from one date to another.", ["start", "end"]),
    ("weekday", "Which day of the week a date is.", ["date"]),
    ("convert", "Convert an amount to another unit.", ["amount", "to"]),
    (
      "calculate", "Calculate something in words or digits, as in \"twelve plus seven\" or \"15% of 80\".",
      ["expression"]
    ),
    ("time_now", "What time it is.", []),
    ("date_today", "What date it is.", []),
  ]
  private static let defaultList = "to-do"
  private typealias Entry = AssistantMemory.Entry

  private let now: @Sendable () -> Moment
  private(set) var kept: AssistantMemory
  /// When ``due()`` was asked last.
  private var told: Moment?

  init(kept: AssistantMemory = .init(), now: @escaping @Sendable () -> Moment) {
    self.kept = kept
    self.now = now
  }

  /// Another one with the same clock.
  nonisolated func another(_ kept: AssistantMemory) -> Assistant { Assistant(kept: kept, now: now) }

  func recall(_ kept: AssistantMemory) { self.kept = kept }

  /// Sentences for the timers, alarms and reminders whose time has come since it was last asked for; each once, also
  /// where an earlier memory is recalled.
  func due() -> [String] {
    let now = now()
    defer { told = now }
    return kept.takeDue(by: now, told: told)
  }

  private static let several = #"\b(?:all|both|every\w*|any|each|them|timers|alarms|reminders)\b"#

  /// What to ask instead of cancelling several things of which a message names none; nil to call the function.
  func instead(_ message: String, _ function: String, _ arguments: String) -> String? {
    let count =
      switch function {
      case "cancel_timer": kept.timers.count
      case "cancel_alarm": kept.alarms.count
      case "cancel_reminder": kept.reminders.count
      default: 0
      }
    let given = (try? JSONDecoder().decode([String: String].self, from: Data(arguments.utf8))) ?? [:]
    guard count > 1, given.values.allSatisfy(\.isEmpty),
      Words.matches(Self.several, in: message.lowercased()).isEmpty,
      let shown = try? call("\(function.replacingOccurrences(of: "cancel", with: "show"))s", { _ in "" })
    else { return nil }
    return "\(shown) Which one shall I cancel? Say all for all of them."
  }

  func call(_ name: String, _ argument: (String) -> String) throws -> String {
    switch name {
    case "set_timer": try setTimer(argument("duration"), argument("name"))
    case "cancel_timer":
      cancel(&kept.timers, "timer", isNamed(argument("name")))
    case "show_timers": showTimers()
    case "set_alarm": try setAlarm(argument("time"), argument("day"))
    case "cancel_alarm": try cancelAlarm(argument("time"))
    case "show_alarms": showAlarms()
    case "set_reminder": try setReminder(argument("text"), argument("time"), argument("day"))
    case "cancel_reminder":
      cancel(&kept.reminders, "reminder", isNamed(argument("text")))
    case "show_reminders":
      show(
        "reminder", kept.reminders.map { entry in entry.name + (entry.at.map { " (\($0.words))" } ?? "") })
    case "add_to_list": try addToList(argument("items"), argument("list"))
    case "remove_from_list": removeFromList(argument("items"), argument("list"))
    case "show_list": showList(argument("list"))
    case "clear_list": clearList(argument("list"))
    case "date_after": try shiftedDate(argument("duration"), argument("date"), "after", 1)
    case "date_before": try shiftedDate(argument("duration"), argument("date"), "before", -1)
    case "days_until": daysFromToday(try date(argument("date")))
    case "days_since": daysFromToday(try DateWords.date(argument("date"), now().day, past: true))
    case "days_between": try daysBetween(argument("start"), argument("end"))
    case "weekday": "That is \(try date(argument("date")).words)."
    case "convert": try Self.convert(argument("amount"), argument("to"))
    case "calculate": try calculate(argument("expression"))
    case "time_now": "It is \(now().time)."
    default: "Today is \(now().day.words)."
    }
  }

  // MARK: - Timers, alarms, reminders

  private func setTimer(_ duration: String, _ name: String) throws -> String {
    let length = try DateWords.duration(duration)
    guard let at = try? now().shifted(length.totalSeconds()) else {
      _ = try length.totalSeconds()
      throw ToolError("That is too long for a timer.")
    }
    try add(&kept.timers, Entry(name: name, at: at), "timers")
    return "\(name.isEmpty ? "Timer" : "Timer for \(name)") set for \(length.words)."
  }

  private func showTimers() -> String {
    let now = now()
    kept.timers.removeAll { $0.at! <= now }
    return show(
      "timer",
      kept.timers.map { entry in
        let left = Length(seconds: Int((entry.at!.seconds - now.seconds).rounded(.toNearestOrEven)))
        return "\(entry.name.isEmpty ? "timer" : entry.name): \(left.words) left"
      })
  }

  private func setAlarm(_ time: String, _ day: String) throws -> String {
    let at = try DateWords.moment(time, day, now())
    try add(&kept.alarms, Entry(name: "", at: at), "alarms")
    return "Alarm set for \(at.words)."
  }

  private func cancelAlarm(_ time: String) throws -> String {
    func isAt(_ time: (hour: Int, minute: Int)) -> (Entry) -> Bool {
      { $0.at!.hour == time.hour && $0.at!.minute == time.minute }
    }
    if time.isEmpty { return cancel(&kept.alarms, "alarm") { _ in true } }
    let meant = try DateWords.timesOfDay(time, now())
    let named = meant.first { kept.alarms.contains(where: isAt($0)) } ?? meant[0]
    return cancel(&kept.alarms, "alarm", isAt(named))
  }

  private func showAlarms() -> String {
    let now = now()
    kept.alarms.removeAll { $0.at! <= now }
    return show("alarm", kept.alarms.map { $0.at!.words })
  }

  private func setReminder(_ text: String, _ time: String, _ day: String) throws -> String {
    let at = time.isEmpty && day.isEmpty ? nil : try DateWords.moment(time, day, now())
    try add(&kept.reminders, Entry(name: text, at: at), "reminders")
    return "I will remind you: \(text)" + (at.map { ", \($0.words)." } ?? ".")
  }

  private func add(_ entries: inout [Entry], _ entry: Entry, _ what: String) throws {
    if entries.count >= AssistantMemory.most {
      throw ToolError("There are \(AssistantMemory.most) \(what) already. Cancel one first.")
    }
    entries.append(entry)
  }

  private func isNamed(_ name: String) -> (Entry) -> Bool {
    { name.isEmpty || $0.name.lowercased() == name.lowercased() }
  }

  private func cancel(_ entries: inout [Entry], _ what: String, _ isMeant: (Entry) -> Bool) -> String {
    let before = entries.count
    entries.removeAll(where: isMeant)
    let cancelled = before - entries.count
    return cancelled > 0 ? "Cancelled \(Words.count(cancelled, what))." : "There is no such \(what)."
  }

  private func show(_ what: String, _ texts: [String]) -> String {
    texts.isEmpty
      ? "You have no \(what)s."
      : "You have \(Words.count(texts.count, what)): \(texts.joined(separator: "; "))."
  }

  // MARK: - Lists

  private func items(_ text: String) -> [String] {
    Words.replacing(#",(?:\s*and\s)?|\s(?:and|&)\s"#, in: text, with: "\u{1F}").split(separator: "\u{1F}")
      .map { $0.trimmingCharacters(in: .whitespacesAndNewlines) }.filter { !$0.isEmpty }
  }

  private func place(_ name: String) -> Int? { kept.lists.firstIndex { $0.key == name.lowercased() } }

  private func addToList(_ items: String, _ list: String) throws -> String {
    let name = list.isEmpty ? Self.defaultList : list
    if kept.lists.reduce(0, { $0 + $1.items.count }) >= AssistantMemory.most {
      throw ToolError("The lists are full. Remove something first.")
    }
    let new = self.items(items)
    if let place = place(name) {
      kept.lists[place].items += new
    } else {
      kept.lists.append(.init(key: name.lowercased(), items: new))
    }
    return "Added \(Words.join(new)) to your \(name) list."
  }

  private func removeFromList(_ items: String, _ list: String) -> String {
    let names = list.isEmpty ? kept.lists.map(\.key) : [list]
    var removed: [String] = []
    for item in self.items(items) {
      for at in names.compactMap(place) {
        let left = kept.lists[at].items.filter { $0.lowercased() != item.lowercased() }
        guard left.count < kept.lists[at].items.count else { continue }
        kept.lists[at].items = left
        removed.append(item)
        break
      }
    }
    let source = list.isEmpty ? "your lists" : "your \(list) list"
    return removed.isEmpty
      ? "There is no \(items) on \(source)." : "Removed \(Words.join(removed)) from \(source)."
  }

  private func showList(_ list: String) -> String {
    let shown = kept.lists.filter { !$0.items.isEmpty && (list.isEmpty || $0.key == list.lowercased()) }.map {
      list in
      "\(list.key.prefix(1).uppercased())\(list.key.dropFirst()) list: \(list.items.joined(separator: ", "))."
    }
    return shown.isEmpty
      ? "Your \(list.isEmpty ? Self.defaultList : list) list is empty." : shown.joined(separator: " ")
  }

  private func clearList(_ list: String) -> String {
    let name = list.isEmpty ? Self.defaultList : list
    if let place = place(name) { kept.lists.remove(at: place) }
    return "Your \(name) list is empty now."
  }

  // MARK: - Dates and numbers

  private func date(_ text: String) throws -> Day { try DateWords.date(text, now().day) }

  private func shiftedDate(_ duration: String, _ date: String, _ word: String, _ sign: Int) throws -> String {
    let start = try self.date(date.isEmpty ? "today" : date)
    let length = try DateWords.duration(duration)
    return "\(length.words) \(word) \(start.words) is \(try length.from(start, sign: sign).words)."
  }

  private func daysFromToday(_ day: Day) -> String {
    let days = day.ordinal - now().day.ordinal
    if days == 0 { return "\(day.words) is today." }
    let number = abs(days)
    var weeks = ""
    if number > 13 {
      let rest = number % 7 == 0 ? [] : [Words.count(number % 7, "day")]
      weeks = " (\(Words.join([Words.count(number / 7, "week")] + rest)))"
    }
    return "\(Words.count(number, "day"))\(weeks) \(days > 0 ? "until" : "since") \(day.words)."
  }

  private func daysBetween(_ start: String, _ end: String) throws -> String {
    let first = try date(start)
    let last = try DateWords.date(end, first)
    let days = Words.count(abs(last.ordinal - first.ordinal), "day")
    return "From \(first.words) to \(last.words) it is \(days)."
  }

  static func convert(_ amount: String, _ to: String) throws -> String {
    func refused(_ reason: String) -> ToolError {
      ToolError("I cannot convert \(amount) to \(to): \(reason).")
    }
    var plain = Words.replacing(#"(?i)(?<=[mti])2\b"#, in: amount, with: "²")
    plain = Words.replacing(#"(?i)(?<=[mti])3\b"#, in: plain, with: "³")
    let belowZero = #"(?i)^\s*(?:[-−]\s*|(?:minus|negative)\s+)"#
    let sign = Fraction(Words.matches(belowZero, in: amount).isEmpty ? 1 : -1)
    let parts = try NumberWords.amounts(Words.replacing(belowZero, in: plain, with: ""))
    if parts.contains(where: \.unit.isEmpty) {
      throw ToolError("I do not understand the amount '\(amount)'.")
    }
    var total = Fraction(0)
    for (value, words) in parts {
      let unit = Words.replacing(" (?=[²³])", in: words, with: "")  // which are no letters here
      do {
        let number = Calculator.double(sign * value)
        if !number.isFinite { throw ToolError("the number is too large") }
        // As a number with a point, which is what the conversion takes.
        let rounded = Fraction(String(number)) ?? sign * value
        let text = try Calculator.text(Calculator.convert(rounded, unit, to))
        total = total + (Fraction(text) ?? Fraction(0))
      } catch let error as ToolError {
        throw refused(error.sentence)
      }
    }
    let number = Calculator.double(total)
    if !number.isFinite { throw refused("the number is too large") }
    let short = Fraction(String(format: "%.6g", number)) ?? total
    return "\(amount) is \(short == total ? "" : "about ")\(try Calculator.text(short)) \(to)."
  }

  private func calculate(_ expression: String) throws -> String {
    let formula = try NumberWords.formula(expression)
    do {
      return "\(expression) is \(try Calculator.calculate(formula))."
    } catch let error as ToolError {
      throw ToolError("I cannot calculate \(expression): \(error.sentence).")
    }
  }
}
