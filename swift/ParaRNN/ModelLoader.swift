#if canImport(CoreML)
  import CoreML

  /// A function of a package.
  enum ModelFunction {
    case coreML(MLModel)
    case coreAI(any AwaitedFunction)
  }

  /// What loading a model is at.
  public enum LoadingStage: Sendable, Equatable {
    /// The package's files are read, to find what was compiled of them.
    case checking
    /// Core ML compiles the package, which it does once.
    case compiling
    /// Core ML, or Core AI, loads the model for these processors.
    case loading(MLComputeUnits)
    /// Text can be generated; what reads prompts in chunks may follow.
    case loaded
  }

  /// Loads the functions of a model, on other processors than those asked for where these do not take it.
  struct ModelLoader: @unchecked Sendable {  // its configuration is a copy, which nothing changes
    /// A function that was loaded, for one owner.
    struct Loaded: @unchecked Sendable {
      let function: ModelFunction
      let units: MLComputeUnits
    }

    struct TimedOut: LocalizedError {
      let seconds: Double
      var errorDescription: String? { "loading it took longer than \(String(format: "%g", seconds)) seconds" }
    }

    private let configuration: MLModelConfiguration
    private let timeout: Duration
    let progress: (@Sendable (LoadingStage) -> Void)?
    /// Those asked for, the GPU and the CPU, the CPU.
    private var chain: [MLComputeUnits] {
      let usual: [MLComputeUnits] = [.cpuAndGPU, .cpuOnly]
      let asked = configuration.computeUnits
      return asked == .cpuOnly ? [.cpuOnly] : [asked] + usual.filter { $0 != asked }
    }

    init(
      _ configuration: MLModelConfiguration, timeout: Duration, progress: (@Sendable (LoadingStage) -> Void)?
    ) {
      self.configuration = configuration.copy() as! MLModelConfiguration
      self.timeout = timeout
      self.progress = progress
    }

    /// The decode function on the first of the chain that takes it.
    ///
    /// What was kept of an earlier compiling may be cut off: then it is compiled once more.
    func decode(_ compiled: CompiledModel) async throws -> Loaded {
      var first: (any Error)?
      var mayRecompile = true
      for units in chain {
        progress?(.loading(units))
        do {
          return try await load(compiled.url, "decode", units)
        } catch {
          first = first ?? error
          guard mayRecompile, (error as? MLModelError)?.code == .io else { continue }
          mayRecompile = false
          if try await compiled.recompile(), let loaded = try? await load(compiled.url, "decode", units) {
            return loaded
          }
        }
      }
      throw first!
    }

    /// Load a function, or the model's only one, and give up after the timeout; the system goes on in the background then,
    /// since it cannot be stopped.
    func load(_ url: URL, _ function: String?, _ units: MLComputeUnits? = nil) async throws -> Loaded {
      let (results, found) = AsyncStream.makeStream(of: Result<Loaded, any Error>.self)
      let (loader, seconds) = (self, timeout.seconds)
      let task = Task {
        DispatchQueue.global().asyncAfter(deadline: .now() + seconds) {
          found.yield(.failure(TimedOut(seconds: seconds)))
        }
        do {
          found.yield(.success(try await loader.loadWaiting(url, function, units)))
        } catch {
          found.yield(.failure(error))
        }
      }
      for await result in results { return try result.get() }
      task.cancel()
      throw CancellationError()
    }

    private func loadWaiting(_ url: URL, _ function: String?, _ units: MLComputeUnits?) async throws -> Loaded
    {
      if CoreAIPackage.isOne(url) {
        let used = units ?? configuration.computeUnits
        return Loaded(
          function: .coreAI(try await CoreAIPackage.load(url, function ?? "decode", used)), units: used)
      }
      let configuration = configuration.copy() as! MLModelConfiguration
      configuration.computeUnits = units ?? configuration.computeUnits
      configuration.functionName = function
      let used = configuration.computeUnits
      return Loaded(
        function: .coreML(try await MLModel.load(contentsOf: url, configuration: configuration)), units: used)
    }
  }
#endif
