#if canImport(CoreML) && canImport(CoreAI) && os(Linux)
  import CoreAI
  import CoreML
  import Testing

  @testable import ParaRNN

  extension HashModel {
    /// The same model as a Core AI package, with the memory in `dtype` and, if asked, a second state that counts tokens.
    func coreAI(
      _ dtype: String = "float32", convolves: Bool = false, step: Int = 1, interleaved: Bool = false
    ) throws -> AIModel.Behaviour {
      var settings = settings
      settings["format"] = "pararnn-coreai"
      settings["state"] = "graph"
      settings["states"] =
        [["name": "cell_state", "shape": [1, 2, 32], "dtype": dtype]]
        + (convolves ? [["name": "conv", "shape": [1, 3, 32], "dtype": dtype]] : [])
      let text = String(decoding: try JSONSerialization.data(withJSONObject: settings), as: UTF8.self)
      return .init(metadata: ["pararnn": text], functions: settings["functions"] as! [String]) {
        name, inputs, states in
        await Task.yield()
        let tokens = Self.multiArray(try #require(inputs["tokens"]))
        let ids = (0..<tokens.count).map { tokens[$0].intValue }
        calls.add(ids.count)
        try #require(tokens.shape == [1, NSNumber(value: count(of: name))])
        try #require(Set(states.keys) == (convolves ? ["cell_state", "conv"] : ["cell_state"]))
        var features: [String: Any] = [:]
        if let position = inputs["position"] { features["position"] = Self.multiArray(position) }
        let outputs = try run(
          ids, MLDictionaryFeatureProvider(dictionary: features), Self.multiArray(states["cell_state"]!))
        if let conv = states["conv"].map(Self.multiArray) {
          try #require(conv[95].intValue + ids.count == Self.multiArray(states["cell_state"]!)[63].intValue)
          conv[95] = NSNumber(value: conv[95].intValue + ids.count)
        }
        let logits = outputs["logits"] as! MLMultiArray
        let values = (0..<logits.count).map { logits[$0].floatValue }
        // `step` numbers from one to the next, between which stands nothing sensible.
        var memory = [Float](repeating: .nan, count: (values.count - 1) * step + 1)
        for (i, value) in values.enumerated() { memory[i * step] = value }
        let shape = [1, 1, values.count]
        let strides = [memory.count, memory.count, step]
        let given =
          dtype == "float16"
          ? NDArray(
            standInMemory: memory.map(Float16.init), shape: shape, strides: strides, interleaved: interleaved)
          : NDArray(standInMemory: memory, shape: shape, strides: strides, interleaved: interleaved)
        return ["logits": given, "cell_state_out": states["cell_state"]!]
      }
    }

    private static func multiArray(_ array: NDArray) -> MLMultiArray {
      let type: MLMultiArrayDataType =
        switch array.scalarType {
        case .float16: .float16
        case .float32: .float32
        case .int32: .int32
        }
      var strides = [Int](repeating: 1, count: array.shape.count)
      for i in strides.indices.dropLast().reversed() { strides[i] = strides[i + 1] * array.shape[i + 1] }
      return try! MLMultiArray(
        dataPointer: array.standInBytes.baseAddress!, shape: array.shape.map { NSNumber(value: $0) },
        dataType: type, strides: strides.map { NSNumber(value: $0) },
        deallocator: { _ in withExtendedLifetime(array) {} })
    }
  }

  @Suite struct CoreAITests {
    /// A folder with nothing of a package but what Core AI's stand-in looks for.
    func folder(_ name: String = "model.aimodel") throws -> TemporaryFolder {
      let folder = try TemporaryFolder()
      try folder.write("", to: "\(name)/main.mlirb")
      return folder
    }

    func load(
      _ behaviour: AIModel.Behaviour, at url: URL, units: MLComputeUnits = .cpuAndGPU
    ) async throws -> ParaRNNModel {
      try await AIModel.$behaviour.withValue(behaviour) {
        let model = try await ParaRNNModel(
          contentsOf: url, tokenizer: ASCII(), computeUnits: units,
          cache: url.deletingLastPathComponent().appendingPathComponent("cache"))
        await model.prefillLoaded()
        return model
      }
    }

    @Test(arguments: ["float32", "float16"], [true, false])
    func theSameTokensWithEitherState(dtype: String, convolves: Bool) async throws {
      for (chunk, positions, step) in [(4, nil, 1), (nil, nil, 2), (4, 64, 3)] as [(Int?, Int?, Int)] {
        let fake = ascii(HashModel(chunk: chunk, positions: positions))
        let folder = try folder()
        let model = try await load(try fake.coreAI(dtype, convolves: convolves, step: step), at: folder.url)
        #expect(model.settings.stateBytes == (convolves ? 160 : 64) * (dtype == "float16" ? 2 : 4))
        for length in [1, 4, 11] {
          let prompt = (0..<length).map { 65 + $0 }
          let before = fake.calls.all.count
          let ours = try await tokens(model.generate(tokens: prompt, options: .init(maxTokens: 6)))
          #expect(ours == fake.continuation(of: prompt, count: 6))
          let whole = length / (chunk ?? 1)
          let expected =
            [Int](repeating: chunk ?? 1, count: whole) + [Int](repeating: 1, count: length % (chunk ?? 1) + 5)
          #expect(Array(fake.calls.all[before...]) == expected)
        }
      }
    }

    /// Undo, save and restore; two chats that are answered at the same time.
    @Test func chatsOfTheirOwn() async throws {
      let fake = ascii(HashModel(chunk: 4))
      let folder = try folder()
      let model = try await load(try fake.coreAI(convolves: true), at: folder.url)
      let options = GenerationOptions(maxTokens: 40)
      func answer(_ chat: ParaRNNChat, _ question: String) async throws -> [Int] {
        try await tokens(chat.respond(to: question, options: options))
      }
      func expected(_ read: [Int]) -> [Int] { fake.continuation(of: read, count: 40) }
      let chat = model.chat(format: .plain)
      let one = try await answer(chat, "one")
      #expect(one == expected(Array("one".utf8.map(Int.init))))
      let saved = try await chat.save()
      let other = try await model.chat(restoring: saved, format: .plain)
      async let ours = answer(chat, "two")
      async let theirs = answer(other, "three")
      let history = "one".utf8.map(Int.init) + one
      #expect(try await ours == expected(history + "two".utf8.map(Int.init)))
      #expect(try await theirs == expected(history + "three".utf8.map(Int.init)))
      try await chat.undo()
      #expect(try await answer(chat, "four") == expected(history + "four".utf8.map(Int.init)))
    }

    @Test func whereItIsToRun() async throws {
      final class Seen: @unchecked Sendable {
        private let lock = NSLock()
        private var list: [SpecializationOptions] = []
        func add(_ options: SpecializationOptions) { lock.withLock { list.append(options) } }
        var all: [SpecializationOptions] { lock.withLock { list } }
      }
      let gpu = SpecializationOptions(preferredComputeUnitKind: .gpu)
      let engine = SpecializationOptions(preferredComputeUnitKind: .neuralEngine)
      for (asked, refused, tried, used) in [
        (.cpuAndGPU, [], [gpu], .cpuAndGPU), (.all, [], [.default], .all),
        (.cpuAndNeuralEngine, [engine, gpu], [engine, gpu, .cpuOnly], .cpuOnly),
      ] as [(MLComputeUnits, [SpecializationOptions], [SpecializationOptions], MLComputeUnits)] {
        let seen = Seen()
        var behaviour = try HashModel(chunk: nil).coreAI()
        behaviour.whileLoading = { options in
          seen.add(options)
          if refused.contains(options) { throw StandInError("not here") }
        }
        let folder = try folder()
        let model = try await load(
          behaviour, at: folder.url.appendingPathComponent("model.aimodel"), units: asked)
        #expect(model.computeUnits == used)
        #expect(seen.all == tried)
      }
    }

    /// One that was compiled ahead of time keeps its description beside it.
    @Test func aCompiledPackage() async throws {
      let folder = try folder("model.aimodelc")
      let fake = ascii(HashModel())
      let behaviour = try fake.coreAI()
      let url = folder.url.appendingPathComponent("model.aimodelc")
      #expect(await failure { _ = try await load(behaviour, at: folder.url) } == .notAParaRNNPackage(url))
      try folder.write(behaviour.metadata["pararnn"]!, to: "pararnn.json")
      let model = try await load(behaviour, at: folder.url)
      let ours = try await tokens(model.generate(tokens: [65, 66], options: .init(maxTokens: 3)))
      #expect(ours == fake.continuation(of: [65, 66], count: 3))
    }

    @Test func whatCannotBeUsed() async throws {
      let folder = try folder()
      let url = folder.url.appendingPathComponent("model.aimodel")
      var foreign = try HashModel().coreAI()
      foreign.metadata = ["author": "someone"]
      // What stands beside a package of another maker says nothing of it.
      try folder.write(try HashModel().coreAI().metadata["pararnn"]!, to: "pararnn.json")
      #expect(await failure { _ = try await load(foreign, at: url) } == .notAParaRNNPackage(url))
      var empty = try HashModel().coreAI()
      empty.functions = ["main"]
      #expect(
        await failure { _ = try await load(empty, at: url) }
          == .cannotLoad(url, reason: "it has no function decode"))
      let model = try await load(try ascii(HashModel(failsAt: 2)).coreAI(), at: url)
      #expect(
        await failure { _ = try await tokens(model.generate(tokens: [65, 66, 67])) }
          == .predictionFailed(reason: "it failed as asked"))
      let interleaved = try await load(try ascii(HashModel()).coreAI(interleaved: true), at: url)
      #expect(
        await failure { _ = try await tokens(interleaved.generate("ab")) }
          == .predictionFailed(reason: "an array is interleaved"))
      for broken in [Double.nan, .infinity] {
        let model = try await load(try ascii(HashModel(broken: broken)).coreAI(), at: url)
        guard case .predictionFailed = await failure({ _ = try await tokens(model.generate("ab")) }) else {
          Issue.record("\(broken) was taken")
          continue
        }
      }
    }
  }
#endif
