import Foundation

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

/// Fetches a model folder from a web server, whole or not at all.
///
/// Beside the model's files the server has `SHA256SUMS`, which `shasum -a 256` or `sha256sum` makes: a line for each
/// file with its SHA-256 and its path. Files are fetched one after another; what was received of one when the connection
/// broke, the task was cancelled or the app ended is kept, and the next run asks the server for the rest. A file whose
/// sum is another is fetched once more, and then refused. Only when all are there does the folder stand in its place.
///
/// ```swift
/// let download = ModelDownload(from: URL(string: "https://example.org/my-model")!, to: place)
/// let model = try await ParaRNNModel(contentsOf: try await download.run { print($0.fraction) })
/// ```
public struct ModelDownload: Sendable {
  public struct Progress: Sendable, Equatable {
    /// Of all files so far, what earlier runs received included.
    public let bytes: Int
    /// The share of the files that are there, a part of one in its own share; 1 at the end.
    public let fraction: Double
  }

  public static let manifest = "SHA256SUMS"
  private static let longestManifest = 1 << 20
  private let base: URL
  private let folder: URL

  /// - Parameters:
  ///   - base: the folder on the server.
  ///   - folder: where it is to stand; what is there already is taken as it is.
  public init(from base: URL, to folder: URL) {
    self.base = base
    self.folder = folder
  }

  /// Fetch what is not there yet; returns the folder.
  ///
  /// - Parameter progress: is told of what has been received, in some thread.
  /// - Throws: ``ParaRNNError/downloadFailed(_:reason:)``; `CancellationError` once the task is cancelled.
  public func run(progress: @escaping @Sendable (Progress) -> Void = { _ in }) async throws -> URL {
    let files = FileManager.default
    if files.fileExists(atPath: folder.path) { return folder }
    let partial = folder.deletingLastPathComponent().appendingPathComponent(
      "\(folder.lastPathComponent).partial")
    let source = base.appendingPathComponent(Self.manifest)
    do {
      try files.createDirectory(at: partial, withIntermediateDirectories: true)
      let sums = partial.appendingPathComponent(Self.manifest)
      try? files.removeItem(at: sums)
      try await Transfer(to: sums) { received, _ in
        if received > Self.longestManifest { throw Failed("it is too long") }
      }.run(source, from: 0)
      let entries = try Self.entries(String(decoding: Data(contentsOf: sums), as: UTF8.self), source)
      let tally = Tally(count: entries.count, progress)
      for entry in entries {
        try Task.checkCancellation()
        let file = partial.appendingPathComponent(entry.path)
        try files.createDirectory(at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
        try await fetch(entry, to: file, tally)
      }
      try Self.removeOthers(than: entries, in: partial)
      try files.moveItem(at: partial, to: folder)
      #if canImport(Darwin)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true  // it can be fetched again
        var place = folder
        try place.setResourceValues(values)
      #endif
    } catch let error as ParaRNNError {
      throw error
    } catch  where Task.isCancelled || error is CancellationError {
      throw CancellationError()
    } catch {
      throw ParaRNNError.downloadFailed(source, reason: Self.said(error))
    }
    return folder
  }

  // MARK: - Files

  private struct Entry {
    let path: String
    let sum: String
  }

  /// A file that is whole, or a part of it with the name's ending `.part`.
  private func fetch(_ entry: Entry, to file: URL, _ tally: Tally) async throws {
    let files = FileManager.default
    func size(_ file: URL) -> Int {
      (try? files.attributesOfItem(atPath: file.path)[.size] as? NSNumber)?.intValue ?? 0
    }
    if files.fileExists(atPath: file.path) {  // of an earlier run, since which the server may have another
      if try FileHash.hexadecimal(of: file) == entry.sum { return tally.end(size(file)) }
      try files.removeItem(at: file)
    }
    let part = file.appendingPathExtension("part")
    let source = base.appendingPathComponent(entry.path)
    for begun in [size(part), 0] {
      do {
        if begun == 0 { try? files.removeItem(at: part) }
        try await Transfer(to: part, told: tally.tell).run(source, from: begun)
      } catch  where !Task.isCancelled {
        throw ParaRNNError.downloadFailed(source, reason: Self.said(error))
      }
      if try FileHash.hexadecimal(of: part) == entry.sum {
        try files.moveItem(at: part, to: file)
        return tally.end(size(file))
      }
      try files.removeItem(at: part)
      if begun == 0 { break }
    }
    throw ParaRNNError.downloadFailed(source, reason: "its SHA-256 is another than \(Self.manifest) says")
  }

  /// What an earlier run fetched and the server no longer lists.
  private static func removeOthers(than entries: [Entry], in folder: URL) throws {
    let listed = Set(entries.map(\.path) + [manifest])
    for path in try FileManager.default.subpathsOfDirectory(atPath: folder.path) where !listed.contains(path)
    {
      let file = folder.appendingPathComponent(path)
      var isFolder: ObjCBool = false
      if FileManager.default.fileExists(atPath: file.path, isDirectory: &isFolder), !isFolder.boolValue {
        try FileManager.default.removeItem(at: file)
      }
    }
  }

  private static func said(_ error: any Error) -> String {
    (error as? Failed)?.reason ?? error.localizedDescription
  }

  private static func entries(_ text: String, _ source: URL) throws -> [Entry] {
    func refuse(_ reason: String) -> ParaRNNError { .downloadFailed(source, reason: reason) }
    let entries = try text.split(whereSeparator: \.isNewline).map { line in
      guard let parts = line.wholeMatch(of: /([0-9a-fA-F]{64}) [ *](.+)/) else {
        throw refuse("it has a line that is no SHA-256 with a path")
      }
      let path = parts.2.hasPrefix("./") ? parts.2.dropFirst(2) : parts.2
      let names = path.split(separator: "/", omittingEmptySubsequences: false)
      let isSafe = names.allSatisfy {
        !["", ".", ".."].contains($0) && !$0.contains("\\") && !$0.contains("\0")
      }
      guard isSafe, !path.hasSuffix(".part"), path != manifest else {
        throw refuse("it has the path \(path)")
      }
      return Entry(path: String(path), sum: parts.1.lowercased())
    }
    guard !entries.isEmpty, Set(entries.map { $0.path.lowercased() }).count == entries.count else {
      throw refuse("it names no file, or one twice")
    }
    return entries
  }

  /// What has been received of all files.
  private final class Tally: @unchecked Sendable {  // one transfer at a time uses it
    private let count: Int
    private let progress: @Sendable (Progress) -> Void
    private var ended = 0
    private var bytes = 0

    init(count: Int, _ progress: @escaping @Sendable (Progress) -> Void) {
      self.count = count
      self.progress = progress
    }

    /// - Parameters:
    ///   - received: bytes of the file at hand.
    ///   - expected: how many it has; nil if the server does not say.
    func tell(_ received: Int, _ expected: Int?) {
      let share = expected.map { min(Double(received) / Double(max($0, 1)), 1) } ?? 0
      progress(Progress(bytes: bytes + received, fraction: (Double(ended) + share) / Double(count)))
    }

    func end(_ size: Int) {
      bytes += size
      ended += 1
      tell(0, nil)
    }
  }
}

private struct Failed: Error {
  let reason: String
  init(_ reason: String) { self.reason = reason }
}

/// One request, whose body goes to a file.
private final class Transfer: NSObject, URLSessionDataDelegate, @unchecked Sendable {
  // Its session calls it from one queue, which is all that changes it after the request has begun.
  private let file: URL
  private let told: (Int, Int?) throws -> Void
  private var handle: FileHandle?
  /// Bytes of the file so far, and at the end; nil if the server does not say.
  private var (received, expected): (Int, Int?) = (0, nil)
  private var failure: (any Error)?
  private let lock = NSLock()
  private var end: CheckedContinuation<Void, any Error>?
  /// How it ended before anybody waited for that, as where it was cancelled before it had begun.
  private var outcome: Result<Void, any Error>?

  /// - Parameter told: is called with the bytes of the file so far and at the end; what it throws ends the transfer.
  init(to file: URL, told: @escaping (Int, Int?) throws -> Void) {
    self.file = file
    self.told = told
  }

  /// - Parameter begun: how many bytes of it are in the file; a server that knows no ranges sends them again.
  func run(_ source: URL, from begun: Int) async throws {
    received = begun
    var request = URLRequest(url: source, cachePolicy: .reloadIgnoringLocalCacheData)
    request.setValue("identity", forHTTPHeaderField: "Accept-Encoding")
    if begun > 0 { request.setValue("bytes=\(begun)-", forHTTPHeaderField: "Range") }
    let session = URLSession(configuration: .ephemeral, delegate: self, delegateQueue: nil)
    defer { session.finishTasksAndInvalidate() }
    let task = session.dataTask(with: request)
    try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { continuation in
        let ended = lock.withLock {
          if outcome == nil, Task.isCancelled { outcome = .failure(CancellationError()) }
          if outcome == nil { end = continuation }
          return outcome
        }
        if let ended { return continuation.resume(with: ended) }
        task.resume()
      }
    } onCancel: {
      task.cancel()
    }
  }

  func urlSession(
    _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
    completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
  ) {
    do {
      try begin(response)
      completionHandler(.allow)
    } catch {
      failure = error
      completionHandler(.cancel)
    }
  }

  private func begin(_ response: URLResponse) throws {
    guard let response = response as? HTTPURLResponse else { throw Failed("the server does not speak HTTP") }
    switch response.statusCode {
    case 200: received = 0
    case 206:
      let range = response.value(forHTTPHeaderField: "Content-Range") ?? ""
      guard received > 0, range.hasPrefix("bytes \(received)-") else {
        throw Failed("the server sends another part")
      }
    case 416 where received > 0: return  // it is whole already, or longer than the server's: its sum tells
    default: throw Failed("the server answers with status \(response.statusCode)")
    }
    let length = response.expectedContentLength
    expected = length >= 0 ? received + Int(length) : nil
    if !FileManager.default.fileExists(atPath: file.path) { try Data().write(to: file) }
    handle = try FileHandle(forWritingTo: file)
    try handle?.truncate(atOffset: UInt64(received))
  }

  func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
    guard failure == nil, let handle else { return }
    do {
      try handle.write(contentsOf: data)
      received += data.count
      try told(received, expected)
    } catch {
      failure = error
      dataTask.cancel()
    }
  }

  func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
    try? handle?.close()
    var result: Result<Void, any Error> = .success(())
    if let failure = failure ?? error {
      result = .failure(failure)
    } else if handle != nil, let expected, received != expected {
      result = .failure(Failed("the connection broke"))
    }
    let waiting = lock.withLock {
      defer { (end, outcome) = (nil, result) }
      return end
    }
    waiting?.resume(with: result)
  }
}
