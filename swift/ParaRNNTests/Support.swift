import Foundation
import Testing

@testable import ParaRNN

enum TestData {
  static func url(_ name: String) -> URL {
    URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("Data/\(name)")
  }

  static func decode<T: Decodable>(_ type: T.Type, _ name: String) throws -> T {
    try JSONDecoder().decode(type, from: Data(contentsOf: url(name)))
  }
}

/// A folder that is gone after the test.
final class TemporaryFolder: Sendable {
  let url: URL

  init() throws {
    url = FileManager.default.temporaryDirectory.appendingPathComponent("pararnn-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(at: url) }

  @discardableResult
  func write(_ text: String, to name: String) throws -> URL {
    let file = url.appendingPathComponent(name)
    try FileManager.default.createDirectory(
      at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
    try Data(text.utf8).write(to: file)
    return file
  }
}

/// The library's error that `body` throws; records an issue where it throws another one or none.
func failure(_ body: () async throws -> Void) async -> ParaRNNError? {
  do {
    try await body()
    Issue.record("nothing was thrown")
  } catch let error as ParaRNNError {
    #expect(error.description == error.localizedDescription && error.description.count > 20)
    return error
  } catch {
    Issue.record("thrown: \(error)")
  }
  return nil
}
