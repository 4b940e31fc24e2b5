import Foundation
import Testing

@testable import ParaRNN

@Suite struct SystemTests {
  @Test func whichSystemAModelNeeds() throws {
    let url = URL(fileURLWithPath: "/models/m.mlpackage")
    let (old, new) =
      switch SystemRequirement.systemName {
      case "iOS": (18, 26)
      case "visionOS": (2, 26)
      default: (15, 26)
      }
    try SystemRequirement.check(url, formatNumber: 9, major: old)
    try SystemRequirement.check(url, formatNumber: 8, major: old)
    try SystemRequirement.check(url, formatNumber: nil, major: old)
    try SystemRequirement.check(url, formatNumber: 10, major: new)
    let name = SystemRequirement.systemName
    #expect(throws: ParaRNNError.needsNewerSystem(url, required: "\(name) 26")) {
      try SystemRequirement.check(url, formatNumber: 10, major: new - 1)
    }
    #expect(throws: ParaRNNError.needsNewerSystem(url, required: "\(name) \(old)")) {
      try SystemRequirement.check(url, formatNumber: 9, major: old - 1)
    }
  }

  @Test func formatNumbers() throws {
    let folder = try TemporaryFolder()
    let package = folder.url.appendingPathComponent("m.mlpackage")
    #expect(SystemRequirement.formatNumber(of: package) == nil)
    for (bytes, number) in [
      ([0x08, 0x09, 0x12], 9), ([0x08, 0x90, 0x4E], 10_000), ([0x12, 0x09], nil), ([], nil),
    ]
      as [([UInt8], Int?)]
    {
      let file = try folder.write("", to: "m.mlpackage/Data/com.apple.CoreML/model.mlmodel")
      try Data(bytes).write(to: file)
      #expect(SystemRequirement.formatNumber(of: package) == number)
    }
    try folder.write(#"[{"specificationVersion": 10}]"#, to: "m.mlmodelc/metadata.json")
    #expect(SystemRequirement.formatNumber(of: folder.url.appendingPathComponent("m.mlmodelc")) == 10)
  }

  @Test func processMemory() throws {
    #expect(try #require(ProcessMemory.bytes) > 1_000_000)
  }
}

@Suite struct SettingsTests {
  static var good: JSON {
    [
      "format": "pararnn-coreml", "format_version": 1, "functions": ["decode", "prefill"], "chunk": 64,
      "state": "io", "output": "logits", "weights": "int4", "eos_token_id": [2, 3], "vocab_size": 500,
      "cell": "lstm", "parameters": 12, "max_position_embeddings": 100, "hidden_size": 20,
      "states": [
        ["name": "cell_state", "shape": [2, 2, 32], "dtype": "float32"],
        ["name": "conv", "shape": [2, 3, 32], "dtype": "float16"],
      ],
    ]
  }

  func settings(_ changes: JSON = [:]) throws -> PackageSettings {
    let data = try JSONSerialization.data(withJSONObject: Self.good.merging(changes) { $1 })
    return try PackageSettings(json: String(decoding: data, as: UTF8.self))
  }

  @Test func whatAPackageSays() throws {
    let settings = try settings()
    #expect(settings.vocabularySize == 500 && settings.chunk == 64 && !settings.keepsStateInGraph)
    #expect(settings.prefills.map(\.count) == [64])
    let both = try self.settings([
      "functions": ["decode", "prefill", "prefill_16"], "chunks": ["prefill_16": 16, "prefill": 64],
    ])
    #expect(both.prefills.map(\.functions) == [["prefill"], ["prefill_16"]])
    #expect(both.prefills.map(\.count) == [64, 16])
    let divided = try self.settings([
      "functions": ["decode", "prefill_part_1", "prefill_part_2"], "parts": 2, "format_version": 2,
    ])
    #expect(divided.prefills.map(\.functions) == [["prefill_part_1", "prefill_part_2"]])
    #expect(settings.endTokens == [2, 3] && settings.positions == 100 && settings.cell == "lstm")
    #expect(settings.stateBytes == 2 * 2 * 32 * 4 + 2 * 3 * 32 * 2)
    let small = try self.settings([
      "functions": ["decode"], "chunk": NSNull(), "max_position_embeddings": NSNull(), "output": "token",
      "eos_token_id": [Int](), "state": "graph",
    ])
    #expect(settings.layout == .plain)
    #expect(try self.settings(["layout": "ane"]).layout == .ane)
    #expect(small.chunk == nil && small.positions == nil && small.output == .token && small.keepsStateInGraph)
  }

  @Test func descriptionsThatCannotBeRead() async throws {
    let changes: [JSON] = [
      ["format": "other"], ["format_version": 2], ["state": "disk"], ["functions": ["prefill"]],
      ["chunk": NSNull()],
      ["layout": "other"], ["layout": "ane", "state": "graph"],
      ["chunks": ["prefill": 64, "prefill_16": 16]], ["chunks": ["prefill": 16]], ["chunks": [String: Int]()],
      ["functions": ["decode", "prefill", "prefill_16"], "chunks": ["prefill": 64, "prefill_16": 0]],
      ["parts": 0, "format_version": 2], ["parts": 2, "format_version": 2], ["parts": 1],
      ["parts": Int.max, "format_version": 2], ["parts": "two", "format_version": 2],
      ["functions": ["decode"]], ["chunk": 0], ["vocab_size": 0], ["vocab_size": "many"],
      ["states": [JSON]()],
      ["max_position_embeddings": 0], ["output": "text"],
      ["states": [["name": "state", "shape": [0], "dtype": "float16"]]],
      ["states": [["name": "state", "shape": [1], "dtype": "int8"]]],
      ["states": [["name": "state", "shape": [Int](), "dtype": "float16"]]],
      ["states": [["name": "state", "shape": [Int.max, 3], "dtype": "float16"]]],
      ["states": [["name": "state", "shape": [1 << 20, 1 << 20], "dtype": "float16"]]],
      ["vocab_size": Int.max], ["max_position_embeddings": Int.max],
    ]
    for change in changes {
      guard case .unreadableSettings = await failure({ _ = try settings(change) }) else {
        Issue.record("\(change)")
        continue
      }
    }
    for text in ["", "{", "[]", "{}", "{\"for\u{0E}mat\": 1}"] {
      guard case .unreadableSettings = await failure({ _ = try PackageSettings(json: text) }) else {
        Issue.record("\(text)")
        continue
      }
    }
  }
}

#if canImport(CoreML) && os(Linux)
  import CoreML

  @Suite struct LoadingTests {
    static let byteTokenizer = #"""
      {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
       "decoder": {"type": "ByteLevel"}, "pre_tokenizer": null}
      """#

    func load(
      _ fake: FakeFolder, _ model: HashModel = .init(), url: URL? = nil,
      tokenizer: (any ParaRNNTokenizer)? = nil
    ) async throws -> ParaRNNModel {
      try await MLModel.$behaviour.withValue(model.behaviour) {
        try await ParaRNNModel(contentsOf: url ?? fake.package, tokenizer: tokenizer, cache: fake.cache)
      }
    }

    @Test func theTokenizerBesideTheModel() async throws {
      let fake = try FakeFolder(tokenizer: Self.byteTokenizer)
      let model = try await load(fake)
      #expect(model.tokenizer.encode("abba", addingSpecialTokens: true) == [2, 1, 0])
      #expect(model.settings.vocabularySize == 256)
      #expect(model.settings.stateBytes == 128)
      // The folder itself will do as well.
      #expect(try await load(fake, url: fake.folder.url).settings == model.settings)
    }

    @Test func compiledOnceAndAgainWhenThePackageChanges() async throws {
      let fake = try FakeFolder()
      func compiled() throws -> [String] {
        (try? FileManager.default.contentsOfDirectory(atPath: fake.cache.path))?.sorted() ?? []
      }
      _ = try await load(fake, tokenizer: ByteTokenizer())
      let first = try compiled()
      #expect(first.count == 1 && first[0].hasSuffix(".mlmodelc"))
      try fake.folder.write("kept", to: "cache/\(first[0])/mark")
      _ = try await load(fake, tokenizer: ByteTokenizer())
      #expect(
        FileManager.default.fileExists(atPath: fake.cache.appendingPathComponent("\(first[0])/mark").path))
      try fake.folder.write("other weights", to: "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
      _ = try await load(fake, tokenizer: ByteTokenizer())
      // What was made of the package as it was is gone; another package's stays.
      let second = try compiled()
      #expect(second.count == 1 && second != first)
      // The same package at another place is not compiled again, whatever its dates are.
      let other = fake.folder.url.appendingPathComponent("elsewhere/model.mlpackage")
      try FileManager.default.createDirectory(
        at: other.deletingLastPathComponent(), withIntermediateDirectories: true)
      try FileManager.default.copyItem(at: fake.package, to: other)
      _ = try await load(fake, url: other, tokenizer: ByteTokenizer())
      #expect(try compiled() == second)
      // Another package of the same name is; both stay. What another system compiled goes.
      try fake.folder.write(
        "weights of its own", to: "elsewhere/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
      let old = "model-0123456789abcdef-0123456789abcdef-0123456789abcdef.mlmodelc"
      try fake.folder.write("old", to: "cache/\(old)/mark")
      _ = try await load(fake, url: other, tokenizer: ByteTokenizer())
      #expect(try compiled().count == 2 && compiled().contains(second[0]) && !compiled().contains(old))
    }

    @Test func aDamagedCacheIsMadeAnew() async throws {
      let fake = try FakeFolder()
      var behaviour = HashModel().behaviour
      let inner = behaviour.load
      behaviour.load = { url, function in
        guard FileManager.default.fileExists(atPath: url.appendingPathComponent("Data").path) else {
          throw MLModelError(.io, "cut off")
        }
        return try inner(url, function)
      }
      try await MLModel.$behaviour.withValue(behaviour) {
        _ = try await ParaRNNModel(contentsOf: fake.package, tokenizer: ByteTokenizer(), cache: fake.cache)
        let name = try FileManager.default.contentsOfDirectory(atPath: fake.cache.path)[0]
        try FileManager.default.removeItem(at: fake.cache.appendingPathComponent("\(name)/Data"))
        _ = try await ParaRNNModel(contentsOf: fake.package, tokenizer: ByteTokenizer(), cache: fake.cache)
      }
    }

    /// What was loaded, and what fails or waits.
    final class Loads: @unchecked Sendable {
      private let lock = NSLock()
      private var list: [String] = []
      private var isOpen = false
      func add(_ units: MLComputeUnits, _ function: String?) {
        lock.withLock { list.append("\(units.rawValue) \(function ?? "")") }
      }
      var all: [String] { lock.withLock { list } }
      func open() { lock.withLock { isOpen = true } }
      func wait() async throws {
        while !lock.withLock({ isOpen }) { try await Task.sleep(for: .milliseconds(2)) }
      }
    }

    func load(
      _ fake: FakeFolder, _ model: HashModel = .init(), units: MLComputeUnits? = nil,
      timeout: Duration = .seconds(600),
      while loading: @escaping @Sendable (MLComputeUnits, String?) async throws -> Void
    ) async throws -> ParaRNNModel {
      try await MLModel.$behaviour.withValue(model.behaviour) {
        try await MLModel.$whileLoading.withValue(loading) {
          guard let units else {
            return try await ParaRNNModel(
              contentsOf: fake.package, tokenizer: ByteTokenizer(), timeout: timeout, cache: fake.cache)
          }
          return try await ParaRNNModel(
            contentsOf: fake.package, tokenizer: ByteTokenizer(), computeUnits: units, timeout: timeout,
            cache: fake.cache)
        }
      }
    }

    @Test func whichProcessorsAreTried() async throws {
      let fake = try FakeFolder()
      for (asked, failing, tried) in [
        (nil, [], [.cpuAndGPU]), (.all, [], [.all]), (.all, [.all], [.all, .cpuAndGPU]),
        (
          .cpuAndNeuralEngine, [.cpuAndNeuralEngine, .cpuAndGPU], [.cpuAndNeuralEngine, .cpuAndGPU, .cpuOnly]
        ),
        (nil, [.cpuAndGPU], [.cpuAndGPU, .cpuOnly]), (.cpuOnly, [], [.cpuOnly]),
      ] as [(MLComputeUnits?, [MLComputeUnits], [MLComputeUnits])] {
        let loads = Loads()
        let model = try await load(fake, units: asked) { units, function in
          loads.add(units, function)
          if failing.contains(units) { throw MLModelError(.generic, "not here") }
        }
        #expect(model.computeUnits == tried.last)
        await model.prefillLoaded()
        let expected = tried.map { "\($0.rawValue) decode" } + ["\(tried.last!.rawValue) prefill"]
        #expect(loads.all == expected)
      }
      let error = await failure {
        _ = try await load(fake, units: .all) { units, _ in
          throw MLModelError(.generic, "not \(units.rawValue)")
        }
      }
      #expect(error == .cannotLoad(fake.package.standardizedFileURL, reason: "not 2"))
    }

    /// By what an app calls: a model that came compiled is not kept, and one without prefill not measured.
    @Test func aConfigurationOfCoreMLs() async throws {
      let (folder, loads) = (try TemporaryFolder(), Loads())
      try folder.write("", to: "model.mlmodelc/model.mil")
      for (failing, used) in [(nil, .cpuAndNeuralEngine), (.cpuAndNeuralEngine, .cpuAndGPU)]
        as [(MLComputeUnits?, MLComputeUnits)]
      {
        let model = try await MLModel.$behaviour.withValue(HashModel(chunk: nil).behaviour) {
          try await MLModel.$whileLoading.withValue({ units, function in
            loads.add(units, function)
            if units == failing { throw MLModelError(.generic, "not here") }
          }) {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = .cpuAndNeuralEngine
            return try await ParaRNNModel(
              contentsOf: folder.url, tokenizer: ByteTokenizer(), configuration: configuration)
          }
        }
        #expect(model.computeUnits == used)
        #expect(try await tokens(model.generate(tokens: [1, 2], options: .init(maxTokens: 3))).count == 3)
      }
      let asked = MLComputeUnits.cpuAndNeuralEngine.rawValue
      #expect(loads.all == [asked, asked, MLComputeUnits.cpuAndGPU.rawValue].map { "\($0) decode" })
    }

    @Test(.timeLimit(.minutes(5))) func loadingThatHangs() async throws {
      let loads = Loads()
      let model = try await load(try FakeFolder(), units: .all, timeout: .seconds(3)) { units, _ in
        if units == .all { try await loads.wait() }
      }
      #expect(model.computeUnits != .all)
      loads.open()
    }

    @Test func prefillComesWhenItIsThere() async throws {
      let (folder, fake, loads) = (try FakeFolder(), HashModel(chunk: 4), Loads())
      defer { withExtendedLifetime(folder) {} }
      let model = try await load(folder, fake) { _, function in
        if function == "prefill" { try await loads.wait() }
      }
      let prompt = [1, 2, 3, 4, 5]
      func ours() async throws -> [Int] {
        try await tokens(model.generate(tokens: prompt, options: .init(maxTokens: 1)))
      }
      #expect(try await ours() == fake.continuation(of: prompt, count: 1))
      #expect(fake.calls.all == [1, 1, 1, 1, 1])
      loads.open()
      await model.prewarm()
      #expect(fake.calls.all.dropFirst(5) == [1, 4])
      #expect(try await ours() == fake.continuation(of: prompt, count: 1))
      #expect(fake.calls.all.dropFirst(7) == [4, 1])
    }

    /// As when the system is short of memory.
    @Test func prefillThatWasReleased() async throws {
      let (folder, fake, loads) = (try FakeFolder(), ascii(HashModel(chunk: 4)), Loads())
      try await MLModel.$behaviour.withValue(fake.behaviour) {
        try await MLModel.$whileLoading.withValue({ units, function in loads.add(units, function) }) {
          let model = try await ParaRNNModel(
            contentsOf: folder.package, tokenizer: ASCII(), cache: folder.cache)
          try await release(model, fake, loads)
        }
      }
    }

    func release(_ model: ParaRNNModel, _ fake: HashModel, _ loads: Loads) async throws {
      @Sendable func read(_ prompt: [Int]) async throws -> [Int] {
        let before = fake.calls.all.count
        let ours = try await tokens(model.generate(tokens: prompt, options: .init(maxTokens: 1)))
        #expect(ours == fake.continuation(of: prompt, count: 1))
        return Array(fake.calls.all[before...])
      }
      await model.prefillLoaded()
      #expect(try await read([1, 2, 3, 4, 5]) == [4, 1])
      await model.releasePrefill()
      let before = loads.all
      // A short prompt does not want it; a long one does, and does not wait for it.
      #expect(try await read([1, 2, 3]) == [1, 1, 1])
      #expect(loads.all == before)
      #expect(try await read([1, 2, 3, 4, 5]).first == 1)
      await model.prefillLoaded()
      #expect(loads.all.count == before.count + 1 && loads.all.last?.hasSuffix("prefill") == true)
      #expect(try await read([1, 2, 3, 4, 5]) == [4, 1])
      // Given up in the middle of a prompt, whatever the moment.
      for _ in 0..<20 {
        async let ours = read(Array(0..<40))
        await model.releasePrefill()
        #expect(try await ours.reduce(0, +) == 40)
      }
    }

    @Test func whatLoadingIsAt() async throws {
      let fake = try FakeFolder()
      let said = Stages()
      for (units, stages) in [
        (.all, [.checking, .compiling, .loading(.all), .loading(.cpuAndGPU), .loaded]),
        (.cpuOnly, [.checking, .loading(.cpuOnly), .loaded]),
      ] as [(MLComputeUnits, [LoadingStage])] {
        try await MLModel.$behaviour.withValue(HashModel().behaviour) {
          try await MLModel.$whileLoading.withValue({ units, _ in
            if units == .all { throw MLModelError(.generic, "not here") }
          }) {
            _ = try await ParaRNNModel(
              contentsOf: fake.package, tokenizer: ByteTokenizer(), computeUnits: units, cache: fake.cache
            ) { said.add($0) }
          }
        }
        #expect(said.takeAll() == stages)
      }
    }

    final class Stages: @unchecked Sendable {
      private let lock = NSLock()
      private var list: [LoadingStage] = []
      func add(_ stage: LoadingStage) { lock.withLock { list.append(stage) } }
      func takeAll() -> [LoadingStage] {
        lock.withLock {
          defer { list = [] }
          return list
        }
      }
    }

    /// A prediction blocks its thread: not one of the few that all tasks share.
    @Test(.timeLimit(.minutes(5))) func predictionsLeaveTheSharedThreadsAlone() async throws {
      var waits = HashModel().behaviour
      let (inner, gate) = (waits.predict, DispatchSemaphore(value: 0))
      waits.predict = {
        gate.wait()
        return try inner($0, $1, $2)
      }
      let count = ProcessInfo.processInfo.activeProcessorCount + 2
      try await MLModel.$behaviour.withValue(waits) {
        var tasks: [Task<Void, any Error>] = []
        for _ in 0..<count {
          let fake = try FakeFolder()
          let model = try await ParaRNNModel(
            contentsOf: fake.package, tokenizer: ByteTokenizer(), cache: fake.cache)
          tasks.append(Task { for try await _ in model.generate("a", options: .init(maxTokens: 1)) {} })
        }
        // More models wait than there are shared threads, and this task goes on nevertheless.
        try await Task.sleep(for: .milliseconds(50))
        for _ in 0..<count { gate.signal() }
        for task in tasks { try await task.value }
      }
    }

    @Test func prefillThatCannotBeLoaded() async throws {
      let fake = HashModel(chunk: 4)
      let model = try await load(try FakeFolder(), fake) { _, function in
        if function == "prefill" { throw MLModelError(.generic, "too large") }
      }
      await model.prewarm()
      let ours = try await tokens(model.generate(tokens: [1, 2, 3, 4, 5], options: .init(maxTokens: 1)))
      #expect(ours == fake.continuation(of: [1, 2, 3, 4, 5], count: 1))
      #expect(fake.calls.all == [1, 1, 1, 1, 1, 1])
    }

    @Test func aCompiledModelIsLoadedAsItIs() async throws {
      let fake = try FakeFolder(tokenizer: Self.byteTokenizer)
      let compiled = try fake.folder.write("[]", to: "model.mlmodelc/metadata.json")
        .deletingLastPathComponent()
      _ = try await load(fake, url: compiled)
      #expect(!FileManager.default.fileExists(atPath: fake.cache.path))
    }

    @Test func whatCannotBeLoaded() async throws {
      let fake = try FakeFolder()
      let nowhere = fake.folder.url.appendingPathComponent("other.mlpackage")
      #expect(await failure { _ = try await load(fake, url: nowhere) } == .notFound(nowhere))
      let folder = fake.folder.url.appendingPathComponent("none")
      #expect(
        await failure { _ = try await load(fake, url: folder) }
          == .notFound(folder.appendingPathComponent("model.mlpackage")))

      // A tokenizer that is missing, damaged or of another model.
      #expect(
        await failure { _ = try await load(fake) }
          == .missingTokenizer(CompiledModel.folder(of: fake.package.standardizedFileURL)))
      try fake.folder.write("{}", to: "tokenizer.json")
      guard case .unreadableTokenizer = await failure({ _ = try await load(fake) }) else { return }
      try fake.folder.write(Self.byteTokenizer, to: "tokenizer.json")
      let small = HashModel(vocabulary: 2)
      #expect(await failure { _ = try await load(fake, small) } == .wrongVocabulary(tokenizer: 3, model: 2))

      // A model of another maker, with and without functions, and one for another system.
      var foreign = HashModel().behaviour
      foreign.load = { _, function in
        if function != nil { throw MLModelError(.io, "no such function") }
        return MLModelDescription(metadata: [.author: "someone"])
      }
      var nameless = foreign
      nameless.load = { _, _ in MLModelDescription() }
      for behaviour in [foreign, nameless] {
        await MLModel.$behaviour.withValue(behaviour) {
          #expect(
            await failure { _ = try await ParaRNNModel(contentsOf: fake.package, cache: fake.cache) }
              == .notAParaRNNPackage(fake.package.standardizedFileURL))
        }
      }
      var broken = foreign
      broken.load = { _, _ in throw MLModelError(.io, "it is broken") }
      await MLModel.$behaviour.withValue(broken) {
        #expect(
          await failure { _ = try await ParaRNNModel(contentsOf: fake.package, cache: fake.cache) }
            == .cannotLoad(fake.package.standardizedFileURL, reason: "it is broken"))
      }
      var newer = HashModel()
      newer.changes = { $0["format_version"] = 2 }
      guard case .unreadableSettings = await failure({ _ = try await load(fake, newer) }) else {
        Issue.record("a newer format was read")
        return
      }
      let future = try FakeFolder(specification: [0x08, 0x0A])
      #expect(
        await failure { _ = try await load(future) }
          == .needsNewerSystem(future.package.standardizedFileURL, required: "macOS 26"))
    }
  }
#endif
