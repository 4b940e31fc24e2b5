import Foundation

/// Notes beside ``KeptSpeeds`` of what goes on while a function that reads several tokens is loaded and measured for the
/// first time: Core ML may end the process then, and would at every start.
///
/// One file is there meanwhile, with the number of tokens and that of the process. Where a process has left it, the other
/// file says which number it was.
extension KeptSpeeds {
  private var begun: URL { file("begun") }
  private var failed: URL { file("failed") }

  /// Before a function that reads `count` tokens is loaded or called.
  func begin(_ count: Int) {
    write(Data("\(count) \(getpid())".utf8), to: begun)
    Begun.now.add(begun)
  }

  /// Nothing is being tried any more.
  func end() {
    Begun.now.remove(begun)
  }

  /// The fewest tokens of a function whose trial ended a process; nil if none did.
  func failedCount() -> Int? {
    var counts = Self.numbers(in: failed).prefix(1)
    let left = Self.numbers(in: begun)
    if left.count == 2, !Self.isRunning(left[1]) {
      counts.append(left[0])
      write(Data("\(counts.min()!)".utf8), to: failed)
      try? FileManager.default.removeItem(at: begun)
    }
    return counts.min()
  }

  /// Let them be tried again.
  func forgetFailure() {
    for url in [begun, failed] { try? FileManager.default.removeItem(at: url) }
  }

  private static func numbers(in url: URL) -> [Int] {
    let text = (try? String(contentsOf: url, encoding: .utf8)) ?? ""
    let words = text.split(separator: " ")
    let numbers = words.compactMap { Int($0) }.filter { $0 > 0 }
    return numbers.count == words.count ? numbers : []
  }

  /// True for a process that has not ended; one whose number is not known to be free counts as such.
  private static func isRunning(_ process: Int) -> Bool {
    guard let process = Int32(exactly: process) else { return false }
    return kill(process, 0) == 0 || errno == EPERM
  }
}

/// The files that say what this process is trying. A process that ends as it should takes them away.
private final class Begun: @unchecked Sendable {  // its lock guards what changes
  static let now = Begun()
  private let lock = NSLock()
  private var urls: Set<URL> = []

  private init() {
    atexit { for url in Begun.now.lock.withLock({ Begun.now.urls }) { Begun.now.remove(url) } }
  }

  func add(_ url: URL) { lock.withLock { _ = urls.insert(url) } }

  func remove(_ url: URL) {
    lock.withLock { _ = urls.remove(url) }
    try? FileManager.default.removeItem(at: url)
  }
}
