import Foundation

/// What the standard functions remember. As text it is what Python's `mlx_pararnn.pocket.assistant` writes and reads.
struct AssistantMemory: Sendable, Equatable {
  /// A timer, an alarm or a reminder.
  struct Entry: Sendable, Equatable {
    let name: String
    let at: Moment?
  }
  struct List: Sendable, Equatable {
    let key: String
    var items: [String]
  }

  static let most = 100  // timers, alarms, reminders, and items of all lists
  var timers: [Entry] = []
  var alarms: [Entry] = []
  var reminders: [Entry] = []
  var lists: [List] = []

  struct Malformed: Error {}

  init() {}

  /// - Throws: ``Malformed``
  init(_ text: String) throws {
    if text.isEmpty { return }
    guard let json = try? JSONText(text), case .object = json else { throw Malformed() }
    timers = try Self.entries(json["timers"])
    alarms = try Self.entries(json["alarms"])
    reminders = try Self.entries(json["reminders"])
    guard timers.allSatisfy({ $0.at != nil }), alarms.allSatisfy({ $0.at != nil }),
      case .object(let lists) = json["lists"] ?? .object([])
    else { throw Malformed() }
    self.lists = try lists.map { List(key: $0.name, items: try Self.array($0.value).map(Self.string)) }
  }

  /// As JSON; "" where nothing is remembered.
  var text: String {
    if self == AssistantMemory() { return "" }
    func json(_ entries: [Entry]) -> JSONText {
      .array(entries.map { .array([.string($0.name), $0.at.map { .string($0.iso) } ?? .null]) })
    }
    let lists = JSONText.object(
      lists.map { .init(name: $0.key, value: .array($0.items.map(JSONText.string))) })
    return JSONText.object([
      .init(name: "timers", value: json(timers)), .init(name: "alarms", value: json(alarms)),
      .init(name: "reminders", value: json(reminders)), .init(name: "lists", value: lists),
    ]).text
  }

  /// Forget what was due by `now`; returns sentences for what was not at `told`.
  mutating func takeDue(by now: Moment, told: Moment?) -> [String] {
    func over(_ entries: inout [Entry]) -> [(name: String, at: Moment)] {
      let over = entries.compactMap { entry in entry.at.flatMap { $0 <= now ? (entry.name, $0) : nil } }
      entries.removeAll { $0.at.map { $0 <= now } ?? false }
      return over.filter { told == nil || $0.1 > told! }
    }
    return over(&timers).map { "The timer\($0.name.isEmpty ? "" : " for \($0.name)") is over." }
      + over(&alarms).map { "Alarm of \($0.at.words)." } + over(&reminders).map { "Reminder: \($0.name)" }
  }

  private static func entries(_ json: JSONText?) throws -> [Entry] {
    let entries = try array(json ?? .array([])).map { pair in
      let parts = try array(pair)
      guard parts.count == 2 else { throw Malformed() }
      if parts[1] == .null { return Entry(name: try string(parts[0]), at: nil) }
      guard let at = Moment(iso: try string(parts[1])) else { throw Malformed() }
      return Entry(name: try string(parts[0]), at: at)
    }
    if entries.count > most { throw Malformed() }
    return entries
  }

  private static func array(_ json: JSONText) throws -> [JSONText] {
    guard case .array(let items) = json else { throw Malformed() }
    return items
  }

  private static func string(_ json: JSONText) throws -> String {
    guard case .string(let text) = json else { throw Malformed() }
    return text
  }
}

extension Moment {
  /// "2026-06-01T19:30:00", with six digits of a second's fraction where there is one, as Python writes it.
  var iso: String {
    let (year, month, day) = day.parts
    let micros = Int(((seconds - seconds.rounded(.down)) * 1e6).rounded())
    let second = Int(seconds.rounded(.down)) - self.day.ordinal * 86400 - hour * 3600 - minute * 60
    let text = String(format: "%04d-%02d-%02dT%02d:%02d:%02d", year, month, day, hour, minute, second)
    return micros == 0 ? text : text + String(format: ".%06d", min(micros, 999_999))
  }

  /// nil for another text than ``iso`` gives.
  init?(iso: String) {
    guard let parts = iso.wholeMatch(of: /(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(\.\d{6})?/),
      let day = Day(Int(parts.1)!, Int(parts.2)!, Int(parts.3)!), let hour = Int(parts.4), hour < 24,
      let minute = Int(parts.5), minute < 60, let second = Double(parts.6), second < 60
    else { return nil }
    let fraction = parts.7.flatMap { Double("0\($0)") } ?? 0
    self.init(seconds: Moment(day, hour, minute).seconds + second + fraction)
  }
}
