#if os(Linux)
  import Foundation
  import Glibc
  import Testing

  @testable import ParaRNN

  /// A web server on this machine that sends files, with or without ranges, and hangs up where it is told to.
  final class LocalServer: @unchecked Sendable {
    private let lock = NSLock()
    private var files: [String: Data] = [:]
    private var requests: [String] = []
    private var hangsUpAfter: Int?
    private var gate: DispatchSemaphore?
    private let knowsRanges: Bool
    private let listener: Int32
    let url: URL

    init(_ files: [String: Data], knowsRanges: Bool = true) throws {
      self.files = files
      self.knowsRanges = knowsRanges
      let listener = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
      self.listener = listener
      var address = sockaddr_in()
      address.sin_family = sa_family_t(AF_INET)
      address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
      var size = socklen_t(MemoryLayout<sockaddr_in>.size)
      let port: UInt16? = withUnsafeMutablePointer(to: &address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { pointer in
          guard Glibc.bind(listener, pointer, size) == 0, listen(listener, 8) == 0,
            getsockname(listener, pointer, &size) == 0
          else { return nil }
          return pointer.withMemoryRebound(to: sockaddr_in.self, capacity: 1) {
            UInt16(bigEndian: $0.pointee.sin_port)
          }
        }
      }
      url = URL(string: "http://127.0.0.1:\(try #require(port))/models/m")!
      Thread.detachNewThread { [self] in
        while case let connection = accept(listener, nil, nil), connection >= 0 {
          answer(connection)
          close(connection)
        }
      }
    }

    /// Ends the server.
    func end() { shutdown(listener, Int32(SHUT_RDWR)) }

    /// Hang up once, after so many bytes of a .bin file, and before that wait for `gate`.
    func hangUp(after count: Int, until gate: DispatchSemaphore? = nil) {
      lock.withLock { (hangsUpAfter, self.gate) = (count, gate) }
    }

    func set(_ path: String, _ data: Data) { lock.withLock { files[path] = data } }

    /// Paths and where they were asked from, since the last call.
    func takeRequests() -> [String] {
      lock.withLock {
        defer { requests = [] }
        return requests
      }
    }

    private func answer(_ connection: Int32) {
      var head = ""
      var byte: UInt8 = 0
      while !head.hasSuffix("\r\n\r\n"), read(connection, &byte, 1) == 1 {
        head.unicodeScalars.append(Unicode.Scalar(byte))
      }
      let path =
        head.split(separator: " ").dropFirst().first.map { String($0.dropFirst("/models/m/".count)) } ?? ""
      let asked = knowsRanges ? head.firstMatch(of: /[Rr]ange: bytes=(\d+)-/).flatMap { Int($0.1) } : nil
      let (file, stop): (Data?, Int?) = lock.withLock {
        requests.append("\(path) \(asked ?? 0)")
        let isLarge = path.hasSuffix(".bin")
        defer { if isLarge { hangsUpAfter = nil } }
        return (files[path.removingPercentEncoding ?? path], isLarge ? hangsUpAfter : nil)
      }
      func send(_ status: String, _ fields: String, _ body: Data) {
        var all = Data(
          "HTTP/1.1 \(status)\r\n\(fields)Content-Length: \(body.count)\r\nConnection: close\r\n\r\n".utf8)
        all += body.prefix(stop ?? .max)
        all.withUnsafeBytes { raw in
          var sent = 0
          while sent < raw.count {
            let count = Glibc.send(connection, raw.baseAddress! + sent, raw.count - sent, Int32(MSG_NOSIGNAL))
            if count <= 0 { break }
            sent += count
          }
        }
        if stop != nil { lock.withLock { gate }?.wait() }
      }
      guard let file else { return send("404 Not Found", "", Data("no".utf8)) }
      guard let asked else { return send("200 OK", "", file) }
      if asked >= file.count { return send("416 Range Not Satisfiable", "", Data()) }
      send(
        "206 Partial Content", "Content-Range: bytes \(asked)-\(file.count - 1)/\(file.count)\r\n",
        file.dropFirst(asked))
    }
  }

  @Suite(.timeLimit(.minutes(5))) struct DownloadTests {
    static let files: [String: Data] = [
      "tokenizer.json": Data("{}".utf8), "model.mlpackage/Manifest.json": Data(),
      "model.mlpackage/Data/a weight.bin": Data(
        (0..<40_000).map { UInt8(truncatingIfNeeded: $0 * $0 >> 7) }),
    ]

    static func sums(_ files: [String: Data]) -> Data {
      let lines = files.sorted { $0.key > $1.key }.map { path, data in
        var hash = FileHash()
        hash.add(data)
        return "\(hash.hexadecimal)  ./\(path)\n"
      }
      return Data(lines.joined().utf8)
    }

    static func server(knowsRanges: Bool = true) throws -> LocalServer {
      try LocalServer(files.merging([ModelDownload.manifest: sums(files)]) { $1 }, knowsRanges: knowsRanges)
    }

    func check(_ folder: URL) throws {
      for (path, data) in Self.files {
        #expect(try Data(contentsOf: folder.appendingPathComponent(path)) == data)
      }
      let there = try FileManager.default.contentsOfDirectory(atPath: folder.deletingLastPathComponent().path)
      #expect(there == ["m"])
    }

    final class Told: @unchecked Sendable {
      private let lock = NSLock()
      private var list: [ModelDownload.Progress] = []
      func add(_ progress: ModelDownload.Progress) { lock.withLock { list.append(progress) } }
      var all: [ModelDownload.Progress] { lock.withLock { list } }
    }

    @Test func aWholeFolder() async throws {
      let (server, home) = (try Self.server(), try TemporaryFolder())
      defer { server.end() }
      let folder = home.url.appendingPathComponent("m")
      let told = Told()
      #expect(try await ModelDownload(from: server.url, to: folder).run { told.add($0) } == folder)
      try check(folder)
      let total = Self.files.values.reduce(0) { $0 + $1.count }
      #expect(told.all.last == .init(bytes: total, fraction: 1))
      #expect(
        zip(told.all, told.all.dropFirst()).allSatisfy { $0.bytes <= $1.bytes && $0.fraction <= $1.fraction })
      _ = server.takeRequests()
      #expect(try await ModelDownload(from: server.url, to: folder).run() == folder)
      #expect(server.takeRequests().isEmpty)  // what is there is taken as it is
    }

    @Test(arguments: [true, false]) func aBrokenConnectionIsTakenUpAgain(knowsRanges: Bool) async throws {
      let (server, home) = (try Self.server(knowsRanges: knowsRanges), try TemporaryFolder())
      defer { server.end() }
      let folder = home.url.appendingPathComponent("m")
      let large = "model.mlpackage/Data/a%20weight.bin"
      let download = ModelDownload(from: server.url, to: folder)
      server.set("tokenizer.json", Data())
      guard case .downloadFailed(let url, _) = await failure({ _ = try await download.run() }) else { return }
      #expect(url.lastPathComponent == "tokenizer.json")
      server.set("tokenizer.json", Self.files["tokenizer.json"]!)
      _ = server.takeRequests()
      var begun: [Int] = []
      for count in [0, 2, 10_000] {
        server.hangUp(after: count)
        guard case .downloadFailed = await failure({ _ = try await download.run() }) else { return }
        #expect(!FileManager.default.fileExists(atPath: folder.path))
        begun += server.takeRequests().filter { $0.hasPrefix(large) }.map {
          Int($0.split(separator: " ")[1])!
        }
      }
      _ = try await download.run()
      try check(folder)
      begun += server.takeRequests().filter { $0.hasPrefix(large) }.map { Int($0.split(separator: " ")[1])! }
      if knowsRanges {
        #expect(begun == [0, 0, 2, 10_002])
      } else {
        #expect(begun.allSatisfy { $0 == 0 })
      }
    }

    @Test(arguments: [true, false]) func cancelledAndTakenUpAgain(isBegun: Bool) async throws {
      let (server, home) = (try Self.server(), try TemporaryFolder())
      defer { server.end() }
      let folder = home.url.appendingPathComponent("m")
      let download = ModelDownload(from: server.url, to: folder)
      let (told, gate) = (Told(), DispatchSemaphore(value: 0))
      server.hangUp(after: 1000, until: gate)
      let task = Task { try await download.run { told.add($0) } }
      if isBegun {
        while told.all.last.map({ $0.bytes > 2 }) != true { try await Task.sleep(for: .milliseconds(1)) }
      }
      task.cancel()
      await #expect(throws: CancellationError.self) { try await task.value }
      gate.signal()
      server.hangUp(after: .max)
      #expect(!FileManager.default.fileExists(atPath: folder.path))
      _ = try await download.run()
      try check(folder)
    }

    @Test func aDamagedFileIsFetchedAgainAndThenRefused() async throws {
      let (server, home) = (try Self.server(), try TemporaryFolder())
      defer { server.end() }
      let folder = home.url.appendingPathComponent("m")
      let download = ModelDownload(from: server.url, to: folder)
      // What was received earlier is of another file.
      let part = "m.partial/model.mlpackage/Data/a weight.bin.part"
      for old in [Data(count: 1000), Data(count: 40_000), Data(count: 50_000)] {
        try home.write("", to: part)
        try old.write(to: home.url.appendingPathComponent(part))
        _ = try await download.run()
        try check(folder)
        try FileManager.default.removeItem(at: folder)
      }
      server.set("tokenizer.json", Data("[]".utf8))
      guard case .downloadFailed(let url, let reason) = await failure({ _ = try await download.run() }) else {
        return
      }
      #expect(url.lastPathComponent == "tokenizer.json" && reason.contains("SHA-256"))
      #expect(!FileManager.default.fileExists(atPath: folder.path))
    }

    @Test func manifestsThatAreNone() async throws {
      let (server, home) = (try Self.server(), try TemporaryFolder())
      defer { server.end() }
      let sum = String(repeating: "a", count: 64)
      let texts = [
        "", "hello", "\(sum)", "\(sum)  ../out", "\(sum)  /etc/passwd", "\(sum)  a/../b", "\(sum)  a//b",
        "\(sum)  a\n\(sum)  a", "\(sum)  \(ModelDownload.manifest)", "\(sum)  x.part",
        String(repeating: "\(sum)  a\n", count: 20_000),
      ]
      for text in texts {
        server.set(ModelDownload.manifest, Data(text.utf8))
        let download = ModelDownload(from: server.url, to: home.url.appendingPathComponent("m"))
        guard case .downloadFailed(let url, _) = await failure({ _ = try await download.run() }) else {
          continue
        }
        #expect(url.lastPathComponent == ModelDownload.manifest, "\(text.prefix(90))")
      }
      let nowhere = ModelDownload(
        from: URL(string: "http://127.0.0.1:1/m")!, to: home.url.appendingPathComponent("n"))
      guard case .downloadFailed = await failure({ _ = try await nowhere.run() }) else { return }
    }

    /// FIPS 180-4's examples, and lengths around a block's.
    @Test func sha256() {
      func sum(_ data: Data, pieces: Int) -> String {
        var hash = FileHash()
        var rest = data
        while !rest.isEmpty {
          hash.add(rest.prefix(pieces))
          rest = rest.dropFirst(pieces)
        }
        return hash.hexadecimal
      }
      for (text, expected) in [
        ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
          "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        ),
        (
          String(repeating: "a", count: 119),
          "31eba51c313a5c08226adf18d4a359cfdfd8d2e816b13f4af952f7ea6584dcfb"
        ),
        (
          String(repeating: "a", count: 128),
          "6836cf13bac400e9105071cd6af47084dfacad4e5e302c94bfed24e013afb73e"
        ),
      ] {
        for pieces in [1, 63, 64, 1000] { #expect(sum(Data(text.utf8), pieces: pieces) == expected) }
      }
    }
  }
#endif
