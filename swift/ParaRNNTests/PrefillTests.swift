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

    /// One that is divided reads what a whole one does, or nothing where a part of it cannot be loaded.
    @Test(arguments: [true, false]) func inParts(inGraph: Bool) async throws {
      for (missing, sizes) in [
        (nil, [8, 3]), ("prefill_part_3", [3]), ("prefill_3_part_1", [8]),
      ] as [(String?, [Int])] {
        let fake = ascii(
          HashModel(inGraph: inGraph, chunk: 8, small: 3, parts: 3, cost: { _ in 1 }, positions: 100))
        let loaded = Loaded()
        let folder = try FakeFolder()
        let model = try await load(fake, in: folder, without: missing, noting: loaded, clock: fake.clock)
        for length in [1, 3, 8, 11, 29] {
          #expect(try await read(model, fake, length) == parts(length, sizes))
        }
        guard missing == nil else { continue }
        let names = ["prefill", "prefill_3"].flatMap { name in (1...3).map { "\(name)_part_\($0)" } }
        #expect(loaded.takeAll() == ["decode"] + names)
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

    /// The system's clock counts seconds. That an app's model is given it, as by both public initializers, is not tested:
    /// they keep what they measure in the user's own folder.
    @Test func theSystemsClock() async throws {
      let before = ReadingSpeeds.clock()
      try await Task.sleep(for: .milliseconds(2))
      #expect((0.001..<60).contains(ReadingSpeeds.clock() - before))
      let folder = try FakeFolder()
      let fake = ascii(HashModel(chunk: 8, small: 3))
      _ = try await load(fake, in: folder, clock: ReadingSpeeds.clock)
      let name = try #require(try files(folder, "json").first)
      let text = try Data(contentsOf: folder.cache.appendingPathComponent(name))
      let kept = try #require(try JSONSerialization.jsonObject(with: text) as? [String: Double])
      #expect(Set(kept.keys) == ["1", "3", "8"] && kept.values.allSatisfy { (0..<60).contains($0) })
    }

    /// Names of what is kept beside the compiled models, of a kind.
    func files(_ folder: FakeFolder, _ kind: String) throws -> [String] {
      try FileManager.default.contentsOfDirectory(atPath: folder.cache.path).filter {
        $0.hasPrefix("speeds-") && $0.hasSuffix(".\(kind)")
      }
    }

    /// A backup that is restored on another device brings the cache along.
    @Test func anotherDevice() throws {
      let folder = try TemporaryFolder()
      func kept(_ hardware: String) -> KeptSpeeds {
        KeptSpeeds(cache: folder.url, system: "0123", hardware: hardware, settings: "{}", units: 1)
      }
      var speeds = ReadingSpeeds()
      speeds.add(1, for: 8)
      kept("iPhone17,1").write(speeds)
      kept("iPhone17,1").begin(8)
      #expect(kept("iPhone17,1").read() == speeds)
      #expect(kept("iPhone18,1").read().isEmpty)
      kept("iPhone18,1").end()
      let note = kept("iPhone17,1").file("\(getpid()).begun").path
      #expect(FileManager.default.fileExists(atPath: note))
      kept("iPhone17,1").end()
    }

    /// What a process that ended in the middle leaves: a file of its number, which is free again, and no speeds.
    func leave(_ text: String, by process: String = "\(Int32.max)", in folder: FakeFolder) throws {
      let name = try #require(try files(folder, "json").first)
      try FileManager.default.removeItem(at: folder.cache.appendingPathComponent(name))
      try folder.folder.write(text, to: "cache/\(name.replacingOccurrences(of: "json", with: process)).begun")
    }

    @Test func onePrefillEndsTheProcess() async throws {
      for (ended, sizes) in [(8, [3]), (3, [])] as [(Int, [Int])] {
        let folder = try FakeFolder()
        let fake = ascii(HashModel(chunk: 8, small: 3, cost: { _ in 1 }))
        // The note is there while a function is loaded and called for the first time, and gone afterwards.
        let seen = Loaded()
        let note: @Sendable (String) -> Void = { what in
          let files = (try? FileManager.default.contentsOfDirectory(atPath: folder.cache.path)) ?? []
          let name = files.first { $0.hasSuffix(".begun") }
          let text = name.flatMap {
            try? String(contentsOf: folder.cache.appendingPathComponent($0), encoding: .utf8)
          }
          seen.add("\(what): \(text?.split(separator: " ").first ?? "")")
        }
        var behaviour = fake.behaviour
        let predict = behaviour.predict
        behaviour.predict = { function, inputs, state in
          note("call \(function!)")
          return try predict(function, inputs, state)
        }
        try await MLModel.$behaviour.withValue(behaviour) {
          try await MLModel.$whileLoading.withValue({ _, function in note("load \(function!)") }) {
            let model = try await ParaRNNModel(
              contentsOf: folder.package, tokenizer: ASCII(), computeUnits: .cpuOnly, cache: folder.cache,
              clock: fake.clock)
            await model.prefillLoaded()
            #expect(await model.failedPrefill == nil)
          }
        }
        let all = seen.takeAll()
        #expect(all.prefix(3) == ["load decode: ", "load prefill: 8", "load prefill_3: 3"])
        #expect(all.contains("call prefill: 8") && all.contains("call prefill_3: 3"))
        #expect(!all.contains("call prefill: ") && !all.contains("call prefill_3: "))
        #expect(try files(folder, "begun") == [])
        #expect(try files(folder, "failed") == [])
        // As if it had ended there: once may be its user's doing.
        try leave("\(ended)", in: folder)
        let once = try await load(fake, in: folder, clock: fake.clock)
        #expect(await once.failedPrefill == nil)
        #expect(try await read(once, fake, 28) == parts(28, [8, 3]))
        try leave("\(ended)", in: folder)
        for _ in 0..<2 {
          let loaded = Loaded()
          let before = fake.calls.all.count
          let model = try await load(fake, in: folder, noting: loaded, clock: fake.clock)
          #expect(await model.failedPrefill == ended)
          #expect(loaded.takeAll() == ["decode"] + (sizes.isEmpty ? [] : ["prefill_3"]))
          #expect(!fake.calls.all[before...].contains { $0 >= ended })
          #expect(try await read(model, fake, 28) == parts(28, sizes))
          #expect(try files(folder, "begun") == [])
        }
        let model = try await load(fake, in: folder, clock: fake.clock)
        await MLModel.$behaviour.withValue(fake.behaviour) {
          await model.tryPrefillAgain()
          await model.prefillLoaded()
        }
        #expect(await model.failedPrefill == nil)
        #expect(try await read(model, fake, 28) == parts(28, [8, 3]))
        let again = try await load(fake, in: folder, clock: fake.clock)
        #expect(await again.failedPrefill == nil)
      }
    }

    /// Another model of this process, or another process, may be trying it right now; and a note may be damaged.
    @Test func whatIsNoFailure() async throws {
      let left = [
        ("8", "\(getpid())"), ("8", "1"), ("x", "\(Int32.max)"), ("", "\(Int32.max)"),
        ("8 x", "\(Int32.max)"),
      ]
      for (text, process) in left {
        let folder = try FakeFolder()
        let fake = ascii(HashModel(chunk: 8, small: 3))
        _ = try await load(fake, in: folder, clock: fake.clock)
        for _ in 0..<2 {
          try leave(text, by: process, in: folder)
          let model = try await load(fake, in: folder, clock: fake.clock)
          #expect(await model.failedPrefill == nil, "\(text) \(process)")
        }
      }
    }

    /// A number may be that of another process by now, as after the device has started anew.
    @Test func aNumberThatIsAnothersByNow() async throws {
      let folder = try FakeFolder()
      let fake = ascii(HashModel(chunk: 8, small: 3))
      _ = try await load(fake, in: folder, clock: fake.clock)
      for expected in [nil, 8] {
        try leave("8", by: "1", in: folder)
        let note = try #require(try files(folder, "begun").first)
        try FileManager.default.setAttributes(
          [.modificationDate: Date(timeIntervalSinceNow: -3600)],
          ofItemAtPath: folder.cache.appendingPathComponent(note).path)
        let model = try await load(fake, in: folder, clock: fake.clock)
        #expect(await model.failedPrefill == expected)
      }
    }
  }
#endif
