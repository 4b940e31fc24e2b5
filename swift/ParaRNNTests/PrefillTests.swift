#if canImport(CoreML) && os(Linux)
  import CoreML
  import Foundation
  import Testing

  @testable import ParaRNN

  /// Which function reads how much of a prompt.
  @Suite struct PrefillTests {
    /// Which functions were loaded.
    final class Loaded: @unchecked Sendable {
      private let lock = NSLock()
      private var list: [String] = []
      func add(_ function: String?) { lock.withLock { list.append(function ?? "") } }
      func takeAll() -> [String] {
        lock.withLock {
          defer { list = [] }
          return list
        }
      }
    }

    func load(
      _ fake: HashModel, in folder: FakeFolder, units: MLComputeUnits = .cpuOnly,
      without missing: String? = nil,
      noting loaded: Loaded = .init(), clock: ReadingSpeeds.Clock? = nil
    ) async throws -> ParaRNNModel {
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        try await MLModel.$whileLoading.withValue({ _, function in
          loaded.add(function)
          if function == missing { throw MLModelError(.generic, "not here") }
        }) {
          let model = try await ParaRNNModel(
            contentsOf: folder.package, tokenizer: ASCII(), computeUnits: units, cache: folder.cache,
            clock: clock)
          await model.prefillLoaded()
          return model
        }
      }
    }

    /// How a prompt of `length` tokens is read; what follows must be what follows plain steps.
    func read(_ model: ParaRNNModel, _ fake: HashModel, _ length: Int) async throws -> [Int] {
      let prompt = (0..<length).map { 33 + $0 % 90 }
      let before = fake.calls.all.count
      let ours = try await tokens(model.generate(tokens: prompt, options: .init(maxTokens: 2)))
      #expect(ours == fake.continuation(of: prompt, count: 2))
      return fake.calls.all[before...].dropLast()  // which reads the first of the answer
    }

    func parts(_ length: Int, _ counts: [Int]) -> [Int] {
      var (parts, rest) = ([Int](), length)
      for count in counts + [1] {
        parts += [Int](repeating: count, count: rest / count)
        rest %= count
      }
      return parts
    }

    @Test(arguments: [true, false]) func theLargestThatFits(inGraph: Bool) async throws {
      for (missing, sizes) in [(nil, [8, 3]), ("prefill", [3]), ("prefill_3", [8])] as [(String?, [Int])] {
        let fake = ascii(HashModel(inGraph: inGraph, chunk: 8, small: 3))
        let model = try await load(fake, in: try FakeFolder(), without: missing)
        for length in [1, 2, 3, 7, 8, 11, 16, 19, 29] {
          #expect(try await read(model, fake, length) == parts(length, sizes))
        }
      }
    }

    /// What is faster here is measured at the first load, kept, and used from then on.
    @Test func theFastest() async throws {
      for (cost, sizes) in [
        ([1: 1, 3: 2, 8: 4], [8, 3]), ([1: 1, 3: 1, 8: 4], [3]), ([1: 1, 3: 2, 8: 9], [3]),
        ([1: 1, 3: 3, 8: 4], [8]), ([1: 1, 3: 4, 8: 9], []),
      ] as [([Int: Double], [Int])] {
        let folder = try FakeFolder()
        let fake = ascii(HashModel(chunk: 8, small: 3, cost: { cost[$0]! }))
        let loaded = Loaded()
        let model = try await load(fake, in: folder, noting: loaded, clock: fake.clock)
        #expect(loaded.takeAll() == ["decode", "prefill", "prefill_3"])
        #expect(fake.calls.all == [1, 3, 8, 1, 3, 8, 1, 3, 8, 1, 3, 8])
        #expect(try await read(model, fake, 28) == parts(28, sizes))
        // Nothing is measured at the second load, and what is slow is not even loaded.
        let before = fake.calls.all.count
        let again = try await load(fake, in: folder, noting: loaded, clock: fake.clock)
        let names = [8: "prefill", 3: "prefill_3"].filter { cost[$0.key]! < Double($0.key) }.values.sorted()
        #expect(loaded.takeAll() == ["decode"] + names)
        #expect(fake.calls.all.count == before)
        #expect(try await read(again, fake, 28) == parts(28, sizes))
      }
    }

    @Test func measuredAgainWhereThatIsNeeded() async throws {
      let folder = try FakeFolder()
      let fake = ascii(HashModel(chunk: 8, small: 3, cost: { _ in 1 }))
      func kept() throws -> [String] {
        try FileManager.default.contentsOfDirectory(atPath: folder.cache.path).filter {
          $0.hasSuffix(".json")
        }.sorted()
      }
      /// How many calls loading makes.
      func calls(_ fake: HashModel, _ units: MLComputeUnits = .cpuOnly) async throws -> Int {
        let before = fake.calls.all.count
        _ = try await load(fake, in: folder, units: units, clock: fake.clock)
        return fake.calls.all.count - before
      }
      try folder.folder.write("{}", to: "cache/speeds-0123456789abcdef-0123456789abcdef.json")
      #expect(try await calls(fake) == 12)
      let file = try #require(try kept().first)
      #expect(try kept().count == 1 && !file.contains("0123456789abcdef"))
      #expect(try await calls(fake) == 0)
      for damaged in ["", "[]", "{\"1\": -1}", "{\"x\": 1}", "{\"8\": \"fast\"}"] {
        try folder.folder.write(damaged, to: "cache/\(file)")
        #expect(try await calls(fake) == 12, "\(damaged)")
      }
      // On other processors, and for another export of the same weights.
      #expect(try await calls(fake, .all) == 12)
      var other = fake
      other.changes = { $0["iterations"] = 5 }
      #expect(try await calls(other) == 12)
      #expect(try kept().count == 3)
      // A prediction that fails says nothing of the speed: all is used, and measured at the next load.
      let failing = ascii(
        HashModel(chunk: 8, small: 3, cost: { Double($0 * $0) }, failsAt: 0, failsOnce: true))
      let elsewhere = try FakeFolder()
      let model = try await load(failing, in: elsewhere, clock: failing.clock)
      #expect(failing.calls.all == [1])
      #expect(try await read(model, failing, 11) == [8, 3])
      let again = try await load(failing, in: elsewhere, clock: failing.clock)
      #expect(try await read(again, failing, 11) == parts(11, []))
    }

    /// What an app loads measures, too: its model comes from the same initializer, with the system's clock.
    @Test func theSystemsClock() async throws {
      let before = ReadingSpeeds.clock()
      try await Task.sleep(for: .milliseconds(2))
      #expect(ReadingSpeeds.clock() - before > 0.001)
    }
  }
#endif
