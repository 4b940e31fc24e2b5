#if canImport(CoreML)
  import CoreML

  /// A function of a Core AI package: reads tokens, gives the logits after them and what the states become.
  ///
  /// Core AI is in the SDKs of macOS 27, iOS 27 and visionOS 27, but not in all of their simulators: the rest of the
  /// library knows it by this protocol alone.
  protocol AwaitedFunction: Sendable {
    func predict(
      _ tokens: [Int], at position: Int?, _ states: [StateTensor]
    ) async throws -> (logits: [Float], states: [StateTensor])

    /// Another function of the model, as it was loaded.
    func another(_ name: String) throws -> any AwaitedFunction
  }

  /// A Core AI package, .aimodel, or one that was compiled ahead of time, .aimodelc.
  enum CoreAIPackage {
    static func isOne(_ url: URL) -> Bool { ["aimodel", "aimodelc"].contains(url.pathExtension) }
  }

  // Intel Macs lack Float16, and a system with Core AI.
  #if canImport(CoreAI) && (arch(arm64) || os(Linux))
    import CoreAI

    extension CoreAIPackage {
      /// What the package says of itself: in its metadata, or beside it where that cannot be read, as in a compiled one.
      ///
      /// - Throws: ``ParaRNNError``
      static func settings(of url: URL) throws -> String {
        guard #available(macOS 27, iOS 27, visionOS 27, *) else { throw needsNewerSystem(url) }
        let asset = try? AIModelAsset(contentsOf: url)
        if case .string(let text)? = asset?.metadata.creatorDefinedMetadata["pararnn"] { return text }
        let file = CompiledModel.folder(of: url).appendingPathComponent("pararnn.json")
        guard asset == nil, let text = try? String(contentsOf: file, encoding: .utf8) else {
          throw ParaRNNError.notAParaRNNPackage(url)
        }
        return text
      }

      private static func needsNewerSystem(_ url: URL) -> ParaRNNError {
        .needsNewerSystem(url, required: "\(SystemRequirement.systemName) 27")
      }

      /// Load a function; Core AI makes the model ready for this device at its first use, and keeps the result.
      ///
      /// - Throws: ``ParaRNNError``, or what Core AI throws.
      static func load(_ url: URL, _ name: String, _ units: MLComputeUnits) async throws
        -> any AwaitedFunction
      {
        guard #available(macOS 27, iOS 27, visionOS 27, *) else { throw needsNewerSystem(url) }
        let options: SpecializationOptions =
          switch units {
          case .cpuOnly: .cpuOnly
          case .cpuAndGPU: SpecializationOptions(preferredComputeUnitKind: .gpu)
          case .cpuAndNeuralEngine: SpecializationOptions(preferredComputeUnitKind: .neuralEngine)
          default: .default
          }
        return try CoreAIFunction(name, of: try await AIModel(contentsOf: url, options: options), at: url)
      }
    }

    @available(macOS 27, iOS 27, visionOS 27, *)
    private struct CoreAIFunction: AwaitedFunction {
      private let model: AIModel
      private let url: URL
      private let function: InferenceFunction

      init(_ name: String, of model: AIModel, at url: URL) throws {
        guard let function = try model.loadFunction(named: name) else {
          throw ParaRNNError.cannotLoad(url, reason: "it has no function \(name)")
        }
        self.model = model
        self.url = url
        self.function = function
      }

      func another(_ name: String) throws -> any AwaitedFunction {
        try CoreAIFunction(name, of: model, at: url)
      }

      func predict(
        _ tokens: [Int], at position: Int?, _ states: [StateTensor]
      ) async throws -> (logits: [Float], states: [StateTensor]) {
        var inputs = ["tokens": NDArray(scalars: tokens.map(Int32.init), shape: [1, tokens.count])]
        if let position { inputs["position"] = NDArray(scalars: [Int32(position)], shape: [1]) }
        // A view of an array holds it for as long as the call takes. Each is a variable of its own, made before the views
        // are, so that the compiler sees that none is held twice or too long.
        var cellState = NDArray(states[0])
        if states.count == 1 {
          var views = InferenceFunction.MutableViews()
          views.insert(&cellState, for: states[0].form.name)
          var outputs = try await function.run(inputs: inputs, states: consume views)
          return (
            try Self.logits(outputs.remove("logits")?.ndArray), [try states[0].replaced(by: cellState)]
          )
        }
        var conv = NDArray(states[1])
        var views = InferenceFunction.MutableViews()
        views.insert(&cellState, for: states[0].form.name)
        views.insert(&conv, for: states[1].form.name)
        var outputs = try await function.run(inputs: inputs, states: consume views)
        return (
          try Self.logits(outputs.remove("logits")?.ndArray),
          [try states[0].replaced(by: cellState), try states[1].replaced(by: conv)]
        )
      }

      private static func logits(_ array: NDArray?) throws -> [Float] {
        switch array?.scalarType {
        case .float16?: try array!.scalars(Float16.self).map(Float.init)
        case .float32?: try array!.scalars(Float.self)
        default: throw ParaRNNError.predictionFailed(reason: "it gave no logits, or of an unexpected type")
        }
      }
    }

    @available(macOS 27, iOS 27, visionOS 27, *)
    extension NDArray {
      /// An array that holds what `tensor` does, rows one after another.
      fileprivate init(_ tensor: StateTensor) {
        self = tensor.bytes.withUnsafeBytes { bytes in
          switch tensor.form.dtype {
          case .float16: NDArray(scalars: bytes.bindMemory(to: Float16.self), shape: tensor.form.shape)
          case .float32: NDArray(scalars: bytes.bindMemory(to: Float.self), shape: tensor.form.shape)
          }
        }
      }

      /// All numbers in order, however they lie in memory.
      fileprivate func scalars<Scalar: BitwiseCopyable>(_ type: Scalar.Type) throws -> [Scalar] {
        let (shape, seen) = (shape, view(as: type))
        guard seen.interleaveLayout == nil else {
          throw ParaRNNError.predictionFailed(reason: "an array is interleaved")
        }
        return seen.withUnsafePointer { first, _, strides in
          var all: [Scalar] = []
          all.reserveCapacity(shape.reduce(1, *))
          forEachRow(shape, shape.indices.map { strides[$0] }) { from, _, count in
            all.append(contentsOf: UnsafeBufferPointer(start: first + from, count: count))
          }
          return all
        }
      }
    }

    @available(macOS 27, iOS 27, visionOS 27, *)
    extension StateTensor {
      fileprivate func replaced(by array: NDArray) throws -> StateTensor {
        let bytes =
          switch form.dtype {
          case .float16: try array.scalars(Float16.self).withUnsafeBytes { Array($0) }
          case .float32: try array.scalars(Float.self).withUnsafeBytes { Array($0) }
          }
        return StateTensor(form: form, bytes: bytes)
      }
    }
  #else
    extension CoreAIPackage {
      static func settings(of url: URL) throws -> String {
        throw ParaRNNError.cannotLoad(url, reason: "this app was built without Core AI, which Xcode 27 has")
      }

      static func load(_ url: URL, _ name: String, _ units: MLComputeUnits) async throws
        -> any AwaitedFunction
      {
        throw ParaRNNError.cannotLoad(url, reason: "this app was built without Core AI, which Xcode 27 has")
      }
    }
  #endif
#endif
