#if canImport(CoreML) && os(Linux)
  import CoreML
  import Foundation
  import Testing

  @testable import ParaRNN

  /// A model folder in which nothing but the metadata's JSON, the tokenizer and some weights stand.
  struct FakeFolder {
    let folder: TemporaryFolder
    var cache: URL { folder.url.appendingPathComponent("cache") }
    var package: URL { folder.url.appendingPathComponent("model.mlpackage") }

    init(tokenizer: String? = nil, specification: [UInt8] = [0x08, 0x09]) throws {
      folder = try TemporaryFolder()
      try folder.write("weights", to: "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
      let program = try folder.write("", to: "model.mlpackage/Data/com.apple.CoreML/model.mlmodel")
      try Data(specification).write(to: program)
      if let tokenizer { try folder.write(tokenizer, to: "tokenizer.json") }
    }
  }

  func description(_ settings: JSON) throws -> MLModelDescription {
    let states = settings["states"] as? [JSON] ?? []
    let text = String(
      decoding: try JSONSerialization.data(withJSONObject: settings, options: .sortedKeys), as: UTF8.self)
    var described: [String: MLFeatureDescription] = [:]
    for state in settings["state"] as? String == "graph" ? states : [] {
      let shape = (state["shape"] as? [Int] ?? []).map { NSNumber(value: $0) }
      let name = state["name"] as? String ?? ""
      described[name] = MLFeatureDescription(
        name: name, type: .state, multiArrayConstraint: .init(shape: shape, dataType: .float16))
    }
    return MLModelDescription(
      states: described,
      metadata: [.creatorDefinedKey: ["pararnn": text, "com.github.apple.coremltools": "9.0"]])
  }

  /// A model without weights whose next token depends on every token before it and on their order, so that a lost,
  /// doubled or swapped one shows. What it remembers, a hash and a count, are bytes in its state's numbers.
  struct HashModel: Sendable {
    var inGraph = true
    var chunk: Int? = 4
    /// How many tokens a second, smaller prefill reads.
    var small: Int?
    /// Into how many functions each prefill is divided.
    var parts = 1
    /// Seconds that a call takes by ``clock``, by how many tokens it reads.
    var cost: @Sendable (Int) -> Double = { Double($0) }
    var vocabulary = 256
    var ends: [Int] = []
    var positions: Int?
    var gives = "logits"
    /// The tokens that it always gives, by position, instead of hashes.
    var script: [Int] = []
    /// All tokens have logits that differ, by hash, instead of one alone.
    var spreads = false
    /// The prediction at this position fails, and leaves nothing sensible in the state.
    var failsAt: Int?
    /// True if that happens once only.
    var failsOnce = false
    /// All its logits are this, or its token, whatever the tokens were.
    var broken: Double?
    var changes: @Sendable (inout JSON) -> Void = { _ in }
    /// How many tokens each prediction read.
    let calls = Calls()

    final class Calls: @unchecked Sendable {
      private let lock = NSLock()
      private var list: [Int] = []
      private var failures = 0
      func add(_ count: Int) { lock.withLock { list.append(count) } }
      /// How many have failed before this one.
      func fail() -> Int {
        lock.withLock {
          failures += 1
          return failures - 1
        }
      }
      var all: [Int] { lock.withLock { list } }
    }

    var settings: JSON {
      var settings: JSON = [
        "format": "pararnn-coreml", "format_version": 1, "package": "model.mlpackage",
        "functions": chunk == nil ? ["decode"] : ["decode", "prefill"], "chunk": chunk as Any? ?? NSNull(),
        "state": inGraph ? "graph" : "io", "output": gives, "weights": "float16", "eos_token_id": ends,
        "states": [["name": "state", "shape": [1, 2, 32], "dtype": inGraph ? "float16" : "float32"]],
        "vocab_size": vocabulary, "cell": "gru", "max_position_embeddings": positions as Any? ?? NSNull(),
        "parameters": 0,
      ]
      if let small {
        settings["functions"] = ["decode", "prefill", "prefill_\(small)"]
        settings["chunks"] = ["prefill": chunk!, "prefill_\(small)": small]
      }
      if parts > 1 {
        settings["parts"] = parts
        settings["format_version"] = 2
        settings["functions"] = (settings["functions"] as! [String]).flatMap { name in
          name == "decode" ? [name] : (1...parts).map { "\(name)_part_\($0)" }
        }
      }
      changes(&settings)
      return settings
    }

    /// A clock that only this model's calls move.
    var clock: ReadingSpeeds.Clock { { calls.all.reduce(0) { $0 + cost($1) } } }

    /// How many tokens a function reads.
    func count(of function: String?) -> Int {
      switch function.map({ $0.split(separator: "_part_")[0] }) {
      case "prefill": chunk!
      case "decode", nil: 1
      default: small!
      }
    }

    /// What a model with this hash after `count` tokens says next.
    private func next(_ hash: UInt32, _ count: Int) -> Int {
      script.isEmpty ? Int(hash >> 7) % vocabulary : script[count % script.count]
    }

    /// The tokens that follow `tokens`, by plain steps.
    func continuation(of tokens: [Int], count: Int) -> [Int] {
      var (hash, read, result) = (UInt32(0), 0, [Int]())
      for token in tokens { (hash, read) = (Self.step(hash, token), read + 1) }
      for _ in 0..<count {
        result.append(next(hash, read))
        (hash, read) = (Self.step(hash, result.last!), read + 1)
      }
      return result
    }

    private static func step(_ hash: UInt32, _ token: Int) -> UInt32 {
      (hash ^ UInt32(token + 1)) &* 0x9E37_79B1 &+ hash >> 15
    }

    /// As swift/make_vectors.py has it; float16 holds it.
    private static func logit(_ hash: UInt32, _ token: Int) -> Double {
      Double(((hash ^ UInt32(token + 1) &* 0x85EB_CA6B) &* 0xC2B2_AE35) >> 21) / 16
    }

    var behaviour: MLModel.Behaviour {
      .init(
        load: { _, function in
          guard function.map((self.settings["functions"] as? [String] ?? []).contains) ?? true else {
            throw MLModelError(.io, "no function \(function ?? "")")
          }
          return try description(self.settings)
        },
        predict: { function, inputs, state in
          let part = function?.contains("_part_") == true ? Int(function!.suffix(1))! : 1
          let ids = try #require(inputs.featureValue(for: part == 1 ? "tokens" : "hidden")?.multiArrayValue)
          let tokens = (0..<ids.count).map { ids[$0].intValue }
          if part == 1 { self.calls.add(tokens.count) }
          try #require(ids.shape == [1, NSNumber(value: self.count(of: function))])
          try #require((state != nil) == self.inGraph)
          let run = { (array: MLMultiArray) in
            let isLast = part == self.parts || self.count(of: function) == 1
            return isLast ? try self.run(tokens, inputs, array) : try self.handOn(tokens, part, array)
          }
          if let state {
            let answer = state.withMultiArray(for: "state") { array in Result { try run(array) } }
            return try MLDictionaryFeatureProvider(dictionary: try answer.get())
          }
          // A copy, since inputs stay as they are; rows lie apart, as Core ML's own arrays may.
          let given = inputs.featureValue(for: "state")!.multiArrayValue!
          let memory = UnsafeMutableRawPointer.allocate(byteCount: 4 * 2 * 48, alignment: 64)
          let copy = try MLMultiArray(
            dataPointer: memory, shape: [1, 2, 32], dataType: .float32, strides: [96, 48, 1],
            deallocator: { $0.deallocate() })
          for i in 0..<64 { copy[[0, NSNumber(value: i / 32), NSNumber(value: i % 32)]] = given[i] }
          var outputs = try run(copy)
          outputs["state_out"] = copy
          return try MLDictionaryFeatureProvider(dictionary: outputs)
        })
    }

    /// What a part that is not the last gives: the tokens, which the last one reads, and the state with its number.
    private func handOn(_ tokens: [Int], _ part: Int, _ state: MLMultiArray) throws -> [String: Any] {
      try #require(state[[0, 1, 30]].intValue == part - 1)
      state[[0, 1, 30]] = NSNumber(value: part)
      let hidden = try MLMultiArray(shape: [1, NSNumber(value: tokens.count)], dataType: .float16)
      for (i, token) in tokens.enumerated() { hidden[i] = NSNumber(value: token) }
      return ["hidden_out": hidden]
    }

    func run(_ tokens: [Int], _ inputs: any MLFeatureProvider, _ state: MLMultiArray) throws -> [String: Any]
    {
      try #require(state[[0, 1, 30]].intValue == (tokens.count > 1 ? parts - 1 : 0))
      state[[0, 1, 30]] = 0
      func at(_ row: Int, _ i: Int) -> [NSNumber] { [0, NSNumber(value: row), NSNumber(value: i)] }
      var hash = (0..<4).reduce(UInt32(0)) { $0 | UInt32(state[at(0, $1)].intValue) << (8 * $1) }
      var count = state[at(1, 31)].intValue
      if failsAt == count, calls.fail() == 0 || !failsOnce {
        state[at(0, 0)] = 77
        throw MLModelError(.generic, "it failed as asked")
      }
      if inputs.featureNames.contains("hidden") {
        try #require(!inputs.featureNames.contains("position"))
      } else {
        try #require(
          positions == nil || inputs.featureValue(for: "position")?.multiArrayValue?[0].intValue == count)
        try #require(inputs.featureNames.contains("position") == (positions != nil))
      }
      for token in tokens {
        hash = Self.step(hash, token)
        count += 1
      }
      for i in 0..<4 { state[at(0, i)] = NSNumber(value: hash >> (8 * i) & 0xFF) }
      state[at(1, 31)] = NSNumber(value: count)
      let token = broken.flatMap { Int(exactly: $0) } ?? next(hash, count)
      if gives == "token" {
        let array = try MLMultiArray(shape: [1, 1], dataType: .int32)
        array[0] = NSNumber(value: token)
        return ["token": array]
      }
      let logits = try MLMultiArray(shape: [1, 1, NSNumber(value: vocabulary)], dataType: .float16)
      if spreads {
        for i in 0..<vocabulary { logits[i] = NSNumber(value: Self.logit(hash, i)) }
        return ["logits": logits]
      }
      logits[broken == nil ? token : 0] = NSNumber(value: broken ?? 9)
      return ["logits": logits]
    }

    /// Load it, bytes being its tokens, and do something with it.
    func load(_ body: @Sendable (ParaRNNModel) async throws -> Void) async throws {
      let fake = try FakeFolder()
      try await MLModel.$behaviour.withValue(behaviour) {
        let model = try await ParaRNNModel(
          contentsOf: fake.package, tokenizer: ByteTokenizer(), cache: fake.cache)
        await model.prefillLoaded()
        withExtendedLifetime(fake) {}
        try await body(model)
      }
    }
  }

  /// Answers as a recorded package did, as long as it is asked the same.
  struct Replay: @unchecked Sendable {
    let transcript: JSON
    private let predictions: [JSON]
    private var settings: JSON { transcript.object("settings")! }
    private var stateNames: [String] {
      (settings["states"] as? [JSON] ?? []).compactMap { $0["name"] as? String }
    }

    init(_ transcript: JSON) throws {
      self.transcript = transcript
      predictions = try #require(transcript["predictions"] as? [JSON])
    }

    var behaviour: MLModel.Behaviour {
      .init(
        load: { _, _ in try description(self.settings) },
        predict: { function, inputs, state in
          let number =
            state?.withMultiArray(for: self.stateNames[0]) { $0[0].intValue } ?? self.number(given: inputs)
          try #require(number < self.predictions.count)
          let prediction = self.predictions[number]
          try #require(prediction["function"] as? String == function)
          let ids = inputs.featureValue(for: "tokens")!.multiArrayValue!
          #expect(
            prediction.object("inputs")?["tokens"] as? [Int] == (0..<ids.count).map { ids[$0].intValue })
          state?.withMultiArray(for: self.stateNames[0]) { $0[0] = NSNumber(value: number + 1) }
          return try MLDictionaryFeatureProvider(
            dictionary: try #require(prediction.object("outputs")).mapValues { try Self.array($0) })
        })
    }

    /// Which prediction follows a state: that after the one which gave it, the first after zeros.
    private func number(given inputs: any MLFeatureProvider) -> Int {
      let names = stateNames
      let bytes = names.map { try? inputs.featureValue(for: $0)!.multiArrayValue!.contiguousBytes() }
      if bytes.allSatisfy({ $0?.allSatisfy { $0 == 0 } == true }) { return 0 }
      let before = predictions.firstIndex { prediction in
        zip(names, bytes).allSatisfy { name, bytes in
          let output = prediction.object("outputs")?.object("\(name)_out")?["base64"] as? String
          return bytes.map { Data($0) } == output.flatMap { Data(base64Encoded: $0) }
        }
      }
      return before.map { $0 + 1 } ?? predictions.count
    }

    private static func array(_ value: Any) throws -> MLMultiArray {
      if let numbers = value as? [NSNumber] {
        let array = try MLMultiArray(shape: [1, 1, NSNumber(value: numbers.count)], dataType: .float16)
        for (i, number) in numbers.enumerated() { array[i] = number }
        return array
      }
      let tensor = try #require(value as? JSON)
      let shape = try #require(tensor["shape"] as? [Int])
      let array = try MLMultiArray(
        shape: shape.map { NSNumber(value: $0) },
        dataType: tensor["dtype"] as? String == "float16" ? .float16 : .float32)
      try array.write(Array(try #require((tensor["base64"] as? String).flatMap { Data(base64Encoded: $0) })))
      return array
    }
  }
#endif
