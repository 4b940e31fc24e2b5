#if canImport(CoreML)
  import CoreML

  /// A ParaRNN language model in a package of Core ML's or Core AI's, ready to generate text.
  ///
  /// Any number of streams and chats can share it, each with a memory of its own. Core ML makes one prediction at a time,
  /// Core AI as many as are asked for.
  ///
  /// ```swift
  /// let model = try await ParaRNNModel(contentsOf: url)
  /// for try await piece in model.generate("Once", options: .init(maxTokens: 64, temperature: 0.7)) {
  ///   print(piece, terminator: "")
  /// }
  /// ```
  public actor ParaRNNModel {
    /// What the package says of itself.
    public nonisolated let settings: PackageSettings
    public nonisolated let tokenizer: any ParaRNNTokenizer
    /// How chats are written: as the files beside the model say; nil if their chat template is not a known one.
    public nonisolated let chatFormat: ChatFormat?
    /// The tokens by which the model uses tools; nil if its tokenizer lacks them.
    nonisolated let tools: ToolProtocol?
    /// True if the model was trained to call functions: its chats do, and take ``ToolFunctions``.
    public nonisolated var usesTools: Bool { tools != nil }
    /// Where the model runs: what was asked for, or what took the model where that did not. Core AI takes it for what is
    /// preferred: `.cpuAndGPU` the GPU, `.cpuAndNeuralEngine` the Neural Engine, `.all` whatever is fastest.
    public nonisolated let computeUnits: MLComputeUnits
    /// Tells this model from others.
    nonisolated let fingerprint: String
    private let decode: ModelFunction
    /// What is loaded, by the number of tokens that it reads: functions that are called one after another. Prompts are
    /// read token by token without.
    private var prefills: [Int: [ModelFunction]] = [:]
    private var loadingPrefills: Task<Void, Never>?
    private let loadFunction: @Sendable (String) async -> ModelLoader.Loaded?
    /// So many tokens at once, and more, are not tried on this device: two processes ended while a function that reads them
    /// was loaded or measured for the first time, as a crash inside Core ML ends one. nil if that has not happened.
    ///
    /// It is so until the package, the system's build or the device is another, or ``tryPrefillAgain()`` is called.
    public private(set) var failedPrefill: Int?
    /// Which have been loaded once, and which cannot be.
    private var works: [Int: Bool] = [:]
    private var speeds: ReadingSpeeds
    private let keptSpeeds: KeptSpeeds
    /// nil to measure nothing.
    private let clock: ReadingSpeeds.Clock?
    private var pressure: MemoryPressure?
    private var vocabulary: VocabularyBytes?
    private let executor = QueueExecutor("ParaRNNModel")

    /// A prediction takes its thread for a while: one of a queue's own, not one of the few that all tasks share.
    public nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    /// Load a model; an .mlpackage is compiled at its first use, and the result is kept.
    ///
    /// Where it cannot be loaded for `computeUnits`, it is loaded for the GPU and the CPU, and then for the CPU;
    /// ``computeUnits`` says which. The functions that read prompts in chunks are loaded in the background: prompts are
    /// read token by token until they are there, and when they cannot be loaded. How fast they are here is measured at the
    /// first load and kept; one that is slower than reading token by token is not used, nor one that ended the process
    /// meanwhile (``failedPrefill``). They are given up when the system is short of memory, and loaded again for the next
    /// prompt that is long enough.
    ///
    /// - Parameters:
    ///   - url: the .mlpackage or .mlmodelc, or the folder that `mlx-pararnn convert --to coreml` wrote; from macOS 27, iOS
    ///     27 and visionOS 27 on also the .aimodel or .aimodelc, or the folder that `--to coreai` wrote.
    ///   - tokenizer: nil to read tokenizer.json beside the model.
    ///   - computeUnits: where the model may run.
    ///   - timeout: how long each attempt to load it may take.
    ///   - progress: is told of each stage as it begins.
    /// - Throws: ``ParaRNNError``
    public init(
      contentsOf url: URL, tokenizer: (any ParaRNNTokenizer)? = nil,
      computeUnits: MLComputeUnits = .cpuAndGPU,
      timeout: Duration = .seconds(120), progress: (@Sendable (LoadingStage) -> Void)? = nil
    ) async throws {
      try await self.init(
        contentsOf: url, tokenizer: tokenizer, computeUnits: computeUnits, timeout: timeout,
        cache: CompiledModel.defaultCache(), progress: progress, clock: ReadingSpeeds.clock)
    }

    /// Load a model with a configuration of Core ML's, whose `computeUnits` are those asked for.
    public init(
      contentsOf url: URL, tokenizer: (any ParaRNNTokenizer)? = nil,
      configuration: sending MLModelConfiguration, timeout: Duration = .seconds(120),
      progress: (@Sendable (LoadingStage) -> Void)? = nil
    ) async throws {
      try await self.init(
        url, tokenizer, ModelLoader(configuration, timeout: timeout, progress: progress),
        cache: CompiledModel.defaultCache(), clock: ReadingSpeeds.clock)
    }

    init(
      contentsOf url: URL, tokenizer: (any ParaRNNTokenizer)? = nil,
      computeUnits: MLComputeUnits = .cpuAndGPU,
      timeout: Duration = .seconds(120), cache: URL, progress: (@Sendable (LoadingStage) -> Void)? = nil,
      clock: ReadingSpeeds.Clock? = nil
    ) async throws {
      let configuration = MLModelConfiguration()
      configuration.computeUnits = computeUnits
      try await self.init(
        url, tokenizer, ModelLoader(configuration, timeout: timeout, progress: progress), cache: cache,
        clock: clock)
    }

    private init(
      _ url: URL, _ tokenizer: (any ParaRNNTokenizer)?, _ loader: ModelLoader, cache: URL,
      clock: ReadingSpeeds.Clock?
    ) async throws {
      let url = try CompiledModel.find(url)
      loader.progress?(.checking)
      let compiled = try await CompiledModel(url, cache: cache) { loader.progress?(.compiling) }
      let told = CoreAIPackage.isOne(url) ? try CoreAIPackage.settings(of: url) : nil
      let loaded = try await Self.load(url, compiled, loader)
      decode = loaded.function
      computeUnits = loaded.units
      guard let text = told ?? Self.text(of: decode) else { throw ParaRNNError.notAParaRNNPackage(url) }
      let settings = try PackageSettings(json: text)
      self.settings = settings
      fingerprint = CompiledModel.fingerprint(of: compiled.url, settings: text)
      let folder = CompiledModel.folder(of: url)
      self.tokenizer = try tokenizer ?? Self.tokenizer(in: folder)
      tools = ToolProtocol(self.tokenizer)
      chatFormat = settings.chatFormat ?? ChatFormat.found(in: folder)
      if let size = self.tokenizer.vocabularySize, size > settings.vocabularySize {
        throw ParaRNNError.wrongVocabulary(tokenizer: size, model: settings.vocabularySize)
      }
      loader.progress?(.loaded)
      loadFunction = { function in
        switch loaded.function {
        case .coreML: try? await loader.load(compiled.url, function, loaded.units)
        case .coreAI(let decode):
          (try? decode.another(function)).map { .init(function: .coreAI($0), units: loaded.units) }
        }
      }
      keptSpeeds = KeptSpeeds(
        cache: cache, system: CompiledModel.system, hardware: Hardware.model, settings: text,
        units: loaded.units.rawValue)
      speeds = keptSpeeds.read()
      failedPrefill = clock == nil ? nil : keptSpeeds.failedCount()
      self.clock = clock
      if !settings.prefills.isEmpty {
        pressure = MemoryPressure { [weak self] in Task { await self?.releasePrefill() } }
        beginLoadingPrefills()
      }
    }

    /// What is worth having: neither slow here nor impossible to load, and no danger.
    private var wanted: [PackageSettings.Prefill] {
      settings.prefills.filter {
        works[$0.count] != false && !speeds.areSlow($0.count) && $0.count < failedPrefill ?? .max
      }
    }

    private func beginLoadingPrefills() {
      let missing = wanted.filter { prefills[$0.count] == nil }
      guard !missing.isEmpty, loadingPrefills == nil else { return }
      let untried = clock == nil ? [] : missing.filter { speeds.seconds[$0.count] == nil }
      loadingPrefills = Task { [weak self, loadFunction, keptSpeeds] in
        for prefill in missing {
          if untried.contains(prefill) { keptSpeeds.begin(prefill.count) }
          var parts: [ModelLoader.Loaded] = []
          for function in prefill.functions {
            guard let loaded = await loadFunction(function) else { break }
            parts.append(loaded)
          }
          await self?.take(parts.count == prefill.functions.count ? parts : nil, prefill.count)
        }
        await self?.measure()
        if !untried.isEmpty { keptSpeeds.end() }
        await self?.endLoadingPrefills()
      }
    }

    private func take(_ parts: [ModelLoader.Loaded]?, _ count: Int) {
      prefills[count] = parts?.map(\.function)
      // One that was there is asked for again when there is more memory.
      if works[count] != true { works[count] = parts != nil }
    }

    private func endLoadingPrefills() { loadingPrefills = nil }

    /// Load and measure what ended two processes, as ``failedPrefill`` tells, once more.
    public func tryPrefillAgain() {
      keptSpeeds.forgetFailure()
      failedPrefill = nil
      beginLoadingPrefills()
    }

    /// Find out how fast the functions are here, unless that is known, and let go of the slow ones.
    private func measure() async {
      let counts = [1] + prefills.keys.sorted().filter { $0 <= settings.positions ?? .max }
      guard let clock, counts.count > 1, counts.contains(where: { speeds.seconds[$0] == nil }) else { return }
      var found = speeds
      for round in 0..<4 {
        for count in counts {
          // Given up meanwhile, or of no use.
          guard let parts = count == 1 ? [decode] : prefills[count] else { return }
          if count > 1 { keptSpeeds.begin(count) }
          let tokens = [Int](repeating: 0, count: count)
          let (state, before) = (emptyMemory().state, clock())
          guard (try? await run(parts, tokens, 0, state)) != nil else {
            if count > 1 {  // and decode has run
              prefills[count] = nil
              works[count] = false
            }
            return
          }
          // First calls take longer.
          if round > 0 { found.add(clock() - before, for: count) }
          await Task.yield()
        }
      }
      speeds = found
      keptSpeeds.write(found)
      for count in counts where speeds.areSlow(count) { prefills[count] = nil }
    }

    private static func load(
      _ url: URL, _ compiled: CompiledModel, _ loader: ModelLoader
    ) async throws -> ModelLoader.Loaded {
      do {
        return try await loader.decode(compiled)
      } catch let error as ParaRNNError {
        throw error
      } catch {
        // Core ML does not say that a model lacks the function; a model of another kind loads without its name.
        if !CoreAIPackage.isOne(url), let other = try? await loader.load(compiled.url, nil),
          text(of: other.function) == nil
        {
          throw ParaRNNError.notAParaRNNPackage(url)
        }
        throw ParaRNNError.cannotLoad(url, reason: error.localizedDescription)
      }
    }

    /// Wait until prompts can be read in chunks, or it is known that they cannot.
    func prefillLoaded() async { await loadingPrefills?.value }

    /// Give up the functions that read prompts in chunks, as when the system is short of memory. The next prompt that is
    /// long enough loads them again.
    public func releasePrefill() { prefills = [:] }

    /// Load all that is loaded in the background, and make a prediction with each function: Core ML takes longer for its
    /// first ones. To be called when a question is likely soon; nothing has to wait for it.
    public func prewarm() async {
      await prefillLoaded()
      for count in [1] + prefills.keys.sorted() where count <= settings.positions ?? .max {
        _ = try? await predict([Int](repeating: 0, count: count)[...], at: 0, emptyMemory().state)
      }
    }

    /// The JSON text in a Core ML model's metadata.
    private static func text(of function: ModelFunction) -> String? {
      guard case .coreML(let model) = function else { return nil }
      return (model.modelDescription.metadata[.creatorDefinedKey] as? [String: String])?["pararnn"]
    }

    private static func tokenizer(in folder: URL) throws -> any ParaRNNTokenizer {
      let file = folder.appendingPathComponent("tokenizer.json")
      guard FileManager.default.fileExists(atPath: file.path) else {
        throw ParaRNNError.missingTokenizer(folder)
      }
      return try BPETokenizer(contentsOf: file)
    }

    /// The bytes of all tokens, found at the first use.
    ///
    /// - Throws: ``ParaRNNError/schemaCannotBeKept``
    func vocabularyBytes() throws -> VocabularyBytes {
      if let vocabulary { return vocabulary }
      vocabulary = VocabularyBytes(tokenizer, count: settings.vocabularySize)
      guard let vocabulary else { throw ParaRNNError.schemaCannotBeKept }
      return vocabulary
    }

    // MARK: - Generating

    /// Continue a text. Generation happens as the stream is read: whoever leaves the loop stops it.
    ///
    /// - Throws (while the stream is read): ``ParaRNNError``; `CancellationError` once the task is cancelled.
    public nonisolated func generate(_ prompt: String, options: GenerationOptions = .init()) -> TextStream {
      TextStream {
        let tokens = self.tokenizer.encode(prompt, addingSpecialTokens: true)
        return try Generation(
          model: self, memory: await self.emptyMemory(), tokens: tokens, options: options)
      }
    }

    /// Continue tokens.
    public nonisolated func generate(tokens: [Int], options: GenerationOptions = .init()) -> TextStream {
      TextStream {
        try Generation(model: self, memory: await self.emptyMemory(), tokens: tokens, options: options)
      }
    }

    /// A conversation that remembers what was said.
    ///
    /// - Parameters:
    ///   - system: what stands before the first turn.
    ///   - format: nil for ``chatFormat``.
    ///   - functions: what a model that ``usesTools`` may call; such a model takes no system prompt and no format.
    public nonisolated func chat(
      system: String? = nil, format: ChatFormat? = nil, functions: ToolFunctions = .init()
    ) -> ParaRNNChat {
      ParaRNNChat(
        model: self, format: format ?? chatFormat, functions: functions,
        messages: system.map { [ChatMessage(.system, $0)] } ?? [])
    }

    /// A conversation that goes on after messages from elsewhere; they are read before the first answer.
    ///
    /// - Parameters:
    ///   - messages: user and assistant alternately, a system prompt first if there is one.
    ///   - format: nil for ``chatFormat``.
    ///   - functions: what a model that ``usesTools`` may call; such a model takes no system prompt and no format.
    /// - Throws: ``ParaRNNError/toolsMismatch(reason:)``, ``ParaRNNError/wrongMessages(reason:)``
    public nonisolated func chat(
      messages: [ChatMessage], format: ChatFormat? = nil, functions: ToolFunctions = .init()
    ) throws -> ParaRNNChat {
      if usesTools && messages.first?.role == .system {
        throw ParaRNNError.toolsMismatch(reason: "a model that uses tools takes no system prompt")
      }
      let turns = messages.first?.role == .system ? messages.dropFirst() : messages[...]
      for (i, message) in turns.enumerated() {
        let role: ChatMessage.Role = i.isMultiple(of: 2) ? .user : .assistant
        guard message.role == role else {
          throw ParaRNNError.wrongMessages(
            reason: "message \(messages.count - turns.count + i) is of the \(message.role.rawValue)")
        }
      }
      guard turns.count.isMultiple(of: 2) else {
        throw ParaRNNError.wrongMessages(reason: "the last one has no answer; pass it to respond(to:)")
      }
      return ParaRNNChat(
        model: self, format: format ?? chatFormat, functions: functions, messages: messages,
        unread: usesTools ? messages.count : 0)
    }

    /// The conversation that ``ParaRNNChat/save()`` gave.
    ///
    /// - Throws: ``ParaRNNError/notASavedChat(reason:)``, ``ParaRNNError/savedWithAnotherModel``
    public func chat(
      restoring saved: Data, format: ChatFormat? = nil, functions: ToolFunctions = .init()
    ) throws -> ParaRNNChat {
      let conversation = try SavedChat(data: saved, settings: settings, fingerprint: fingerprint)
      let memory = Memory(
        state: try restore(conversation.tensors), position: conversation.position,
        pending: conversation.pending)
      return ParaRNNChat(
        model: self, format: format ?? chatFormat, functions: functions, messages: conversation.messages,
        unread: conversation.unread, remembering: conversation.remembered, memory: memory)
    }

    // MARK: - Memory

    /// What the model remembers of one sequence.
    enum State: Sendable {
      /// Inside Core ML; predictions change it in place.
      case graph(MLState)
      /// Handed in and out.
      case tensors([StateTensor])
    }

    /// The memory of one sequence at one moment.
    struct Memory: Sendable {
      var state: State
      /// How many tokens were read.
      var position = 0
      /// The token that was generated last, which the model has not read yet.
      var pending: Int?
    }

    /// A copy of a memory that nothing changes any more.
    struct Snapshot: Sendable {
      let tensors: [StateTensor]
      let position: Int
      let pending: Int?
    }

    func emptyMemory() -> Memory {
      Memory(state: emptyGraph().map(State.graph) ?? .tensors(settings.states.map(StateTensor.init(zeros:))))
    }

    /// nil for a model whose memory is handed in and out.
    private func emptyGraph() -> MLState? {
      guard settings.keepsStateInGraph, case .coreML(let model) = decode else { return nil }
      return model.makeState()
    }

    func snapshot(_ memory: Memory) throws -> Snapshot {
      let tensors: [StateTensor] =
        switch memory.state {
        case .tensors(let tensors): tensors
        case .graph(let state):
          try settings.states.map { form in
            try state.withMultiArray(for: form.name) {
              StateTensor(form: form, bytes: try $0.contiguousBytes())
            }
          }
        }
      return Snapshot(tensors: tensors, position: memory.position, pending: memory.pending)
    }

    func memory(of snapshot: Snapshot) throws -> Memory {
      Memory(state: try restore(snapshot.tensors), position: snapshot.position, pending: snapshot.pending)
    }

    private func restore(_ tensors: [StateTensor]) throws -> State {
      guard let state = emptyGraph() else { return .tensors(tensors) }
      for tensor in tensors {
        try state.withMultiArray(for: tensor.form.name) { try $0.write(tensor.bytes) }
      }
      return .graph(state)
    }

    // MARK: - Predicting

    enum Output: Sendable {
      case logits([Float])
      case token(Int)
    }

    struct Prediction: Sendable {
      /// How many tokens it has read.
      let count: Int
      /// What comes next.
      let output: Output
      /// After them; a graph's state is changed in place.
      let state: State
    }

    /// Read a chunk of `tokens`, which follow `position` others, as large as is best, or only the first where there are few.
    func predict(_ tokens: ArraySlice<Int>, at position: Int, _ state: State) async throws -> Prediction {
      do {
        let fitting = wanted.map(\.count).filter { $0 <= tokens.count }
        if fitting.contains(where: { prefills[$0] == nil }) { beginLoadingPrefills() }
        let count = speeds.best(of: fitting.filter { prefills[$0] != nil })
        let read = Array(tokens.prefix(count ?? 1))
        let (output, state) = try await run(count.flatMap { prefills[$0] } ?? [decode], read, position, state)
        return Prediction(count: read.count, output: output, state: state)
      } catch {
        throw error as? ParaRNNError ?? .predictionFailed(reason: error.localizedDescription)
      }
    }

    /// Read tokens by the parts of a function, each of which hands its hidden states on to the next.
    private func run(
      _ parts: [ModelFunction], _ tokens: [Int], _ position: Int, _ state: State
    ) async throws -> (Output, State) {
      if case .coreAI(let function) = parts[0] {
        guard case .tensors(let tensors) = state else {
          throw ParaRNNError.predictionFailed(reason: "its memory is Core ML's")
        }
        let (logits, next) = try await function.predict(
          tokens, at: settings.positions == nil ? nil : position, tensors)
        return (try output(logits), .tensors(next))
      }
      var inputs = ["tokens": MLFeatureValue(multiArray: try MLMultiArray(tokens, shape: [1, tokens.count]))]
      if settings.positions != nil {
        inputs["position"] = MLFeatureValue(multiArray: try MLMultiArray([position], shape: [1]))
      }
      var state = state
      for (number, part) in parts.enumerated() {
        guard case .coreML(let model) = part else { break }
        let outputs: any MLFeatureProvider
        (outputs, state) = try run(model, inputs, state)
        if number == parts.count - 1 { return (try output(of: outputs), state) }
        inputs = ["hidden": MLFeatureValue(multiArray: try array("hidden_out", in: outputs))]
      }
      throw ParaRNNError.predictionFailed(reason: "its functions are not Core ML's")
    }

    private func run(
      _ model: MLModel, _ inputs: [String: MLFeatureValue], _ state: State
    ) throws -> (any MLFeatureProvider, State) {
      switch state {
      case .graph(let graph):
        let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
        return (try model.prediction(from: provider, using: graph), state)
      case .tensors(let tensors):
        var inputs = inputs
        for tensor in tensors {
          inputs[tensor.form.name] = MLFeatureValue(multiArray: try MLMultiArray(tensor))
        }
        let outputs = try model.prediction(from: try MLDictionaryFeatureProvider(dictionary: inputs))
        var next: [StateTensor] = []
        for tensor in tensors {
          let bytes = try array("\(tensor.form.name)_out", in: outputs).contiguousBytes()
          guard bytes.count == tensor.bytes.count else {
            throw ParaRNNError.predictionFailed(
              reason: "\(tensor.form.name)_out has another size than the state")
          }
          next.append(StateTensor(form: tensor.form, bytes: bytes))
        }
        return (outputs, .tensors(next))
      }
    }

    private func output(_ logits: [Float]) throws -> Output {
      guard logits.count == settings.vocabularySize else {
        throw ParaRNNError.predictionFailed(reason: "it gave \(logits.count) logits")
      }
      guard logits.areFinite else {
        throw ParaRNNError.predictionFailed(reason: "its logits are not all finite numbers")
      }
      return .logits(logits)
    }

    private func output(of outputs: any MLFeatureProvider) throws -> Output {
      switch settings.output {
      case .logits:
        return try output(try array("logits", in: outputs).floats())
      case .token:
        let tokens = try array("token", in: outputs)
        guard tokens.count == 1, (0..<settings.vocabularySize).contains(tokens[0].intValue) else {
          throw ParaRNNError.predictionFailed(reason: "it gave no token of its vocabulary")
        }
        return .token(tokens[0].intValue)
      }
    }

    private func array(_ name: String, in outputs: any MLFeatureProvider) throws -> MLMultiArray {
      guard let array = outputs.featureValue(for: name)?.multiArrayValue else {
        throw ParaRNNError.predictionFailed(reason: "it gave no \(name)")
      }
      return array
    }
  }
#endif
