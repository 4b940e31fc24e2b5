import Foundation

/// How long the functions of a model take on this device, which is measured once and kept: a prefill can be slower than
/// as many decodes, depending on where its operations run.
struct ReadingSpeeds: Equatable {
  /// Seconds of a call, by how many tokens it reads; empty before anything was measured.
  private(set) var seconds: [Int: Double] = [:]

  /// The seconds of now since some moment.
  typealias Clock = @Sendable () -> Double
  static let clock: Clock = { Double(DispatchTime.now().uptimeNanoseconds) / 1e9 }

  var isEmpty: Bool { seconds.isEmpty }

  /// Take what a call for `count` tokens took; of several the shortest counts, since others do their work meanwhile.
  mutating func add(_ time: Double, for count: Int) {
    seconds[count] = min(time, seconds[count] ?? .infinity)
  }

  /// True if reading `count` tokens at once is known to bring nothing over reading them one by one.
  func areSlow(_ count: Int) -> Bool {
    guard let one = seconds[1], let all = seconds[count] else { return false }
    return all >= one * Double(count)
  }

  /// The fastest of `counts`: the largest as long as nothing was measured; nil if there are none.
  func best(of counts: some Sequence<Int>) -> Int? {
    counts.min { a, b in
      guard let timeOfA = seconds[a], let timeOfB = seconds[b] else { return a > b }
      return timeOfA / Double(a) < timeOfB / Double(b)
    }
  }
}

/// A file beside the compiled models that keeps ``ReadingSpeeds``.
struct KeptSpeeds {
  private let folder: URL
  /// Of its files, without what tells them apart.
  private let name: String
  private static let prefix = "speeds-"

  /// - Parameters:
  ///   - cache: where compiled models are kept.
  ///   - system: the build of the system.
  ///   - hardware: the model of the device, which may be another one that a backup was restored on.
  ///   - settings: what the package says of itself.
  ///   - units: the number of the processors that the model runs on.
  init(cache: URL, system: String, hardware: String, settings: String, units: Int) {
    var hash = Fingerprint()
    hash.add(settings)
    hash.add("\(units) \(hardware)")
    folder = cache
    name = "\(Self.prefix)\(system)-\(hash.hexadecimal)"
  }

  func file(_ kind: String) -> URL { folder.appendingPathComponent("\(name).\(kind)") }

  /// What was kept; empty where nothing was, or nothing sensible.
  func read() -> ReadingSpeeds {
    var speeds = ReadingSpeeds()
    guard let data = try? Data(contentsOf: file("json")),
      let numbers = try? JSONSerialization.jsonObject(with: data) as? [String: Double]
    else { return speeds }
    for (count, time) in numbers {
      guard let count = Int(count), count > 0, time > 0, time.isFinite else { return ReadingSpeeds() }
      speeds.add(time, for: count)
    }
    return speeds
  }

  /// Keep `speeds`, and forget what was measured on other builds of the system. One that cannot be kept is measured again.
  func write(_ speeds: ReadingSpeeds) {
    let numbers = Dictionary(uniqueKeysWithValues: speeds.seconds.map { (String($0), $1) })
    guard let data = try? JSONSerialization.data(withJSONObject: numbers, options: .sortedKeys) else {
      return
    }
    write(data, to: file("json"))
    let ofThisSystem = name.dropLast(16)
    for other in (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
    where other.hasPrefix(Self.prefix) && !other.hasPrefix(ofThisSystem) {
      try? FileManager.default.removeItem(at: folder.appendingPathComponent(other))
    }
  }

  /// Write one of its files, if that can be.
  func write(_ data: Data, to url: URL) {
    try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    #if canImport(Darwin)
      var values = URLResourceValues()
      values.isExcludedFromBackup = true  // it is of this device
      var place = folder
      try? place.setResourceValues(values)
    #endif
    try? data.write(to: url, options: .atomic)
  }
}
