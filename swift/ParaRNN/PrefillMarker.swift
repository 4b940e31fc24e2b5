import Foundation

/// Notes beside ``KeptSpeeds`` of what goes on while a function that reads several tokens is loaded and measured for the
/// first time: Core ML may end the process then, and would at every start.
///
/// Meanwhile there is a file of the process, named by its number, with the number of tokens. What a process left is a
/// failure of that size, and noted in another file. An app that is stopped from outside just then leaves one too: so a size
/// is given up after its second failure.
extension KeptSpeeds {
  private static let suffix = ".begun"
  /// Seconds after which nothing goes on any more: the number is that of another process by now.
  private static let longest = 600.0
  private var failed: URL { file("failed") }
  private var begun: URL { file("\(getpid())\(Self.suffix)") }

  /// Before a function that reads `count` tokens is loaded or called.
  func begin(_ count: Int) {
    Begun.now.add(begun) { write(Data("\(count)".utf8), to: $0) }
  }

  /// Nothing is being tried any more.
  func end() {
    Begun.now.remove(begun)
  }

  /// The fewest tokens of a function whose trial ended a process twice; nil if none did.
  func failedCount() -> Int? {
    var counts = Self.numbers(in: failed)
    for url in left() {
      let count = Self.numbers(in: url).prefix(1)
      // Counted by the one that takes it away, once.
      guard (try? FileManager.default.removeItem(at: url)) != nil else { continue }
      counts += count
      write(Data(counts.map { "\($0)" }.joined(separator: " ").utf8), to: failed)
    }
    return Dictionary(grouping: counts) { $0 }.filter { $0.value.count > 1 }.keys.min()
  }

  /// Let them be tried again.
  func forgetFailure() {
    for url in left() + [failed] { try? FileManager.default.removeItem(at: url) }
  }

  /// The files of processes that have ended.
  private func left() -> [URL] {
    let folder = failed.deletingLastPathComponent()
    let start = failed.deletingPathExtension().lastPathComponent + "."
    return ((try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []).compactMap { name in
      guard name.hasPrefix(start), name.hasSuffix(Self.suffix) else { return nil }
      let url = folder.appendingPathComponent(name)
      let process = Int32(name.dropFirst(start.count).dropLast(Self.suffix.count))
      let written = (try? FileManager.default.attributesOfItem(atPath: url.path))?[.modificationDate] as? Date
      let isOld = written.map { -$0.timeIntervalSinceNow > Self.longest } ?? false
      // It may have been in the background meanwhile.
      let isOwn = process == getpid() && Begun.now.has(url)
      return !isOwn && (isOld || !Self.isRunning(process ?? 0)) ? url : nil
    }
  }

  private static func numbers(in url: URL) -> [Int] {
    let text = (try? String(contentsOf: url, encoding: .utf8)) ?? ""
    let words = text.split(separator: " ")
    let numbers = words.compactMap { Int($0) }.filter { $0 > 0 }
    return numbers.count == words.count ? numbers : []
  }

  /// True for a process that has not ended; one whose number is not known to be free counts as such.
  private static func isRunning(_ process: Int32) -> Bool {
    process > 0 && (kill(process, 0) == 0 || errno == EPERM)
  }
}

/// The files that say what this process is trying. A process that ends as it should takes them away, and writes none any
/// more.
private final class Begun: @unchecked Sendable {  // its lock guards what changes
  static let now = Begun()
  private let lock = NSLock()
  private var urls: Set<URL> = []
  private var hasEnded = false

  private init() {
    atexit {
      Begun.now.lock.withLock {
        Begun.now.hasEnded = true
        for url in Begun.now.urls { try? FileManager.default.removeItem(at: url) }
      }
    }
  }

  func add(_ url: URL, write: (URL) -> Void) {
    lock.withLock {
      if hasEnded { return }
      urls.insert(url)
      write(url)
    }
  }

  func has(_ url: URL) -> Bool { lock.withLock { urls.contains(url) } }

  func remove(_ url: URL) {
    lock.withLock {
      urls.remove(url)
      try? FileManager.default.removeItem(at: url)
    }
  }
}
