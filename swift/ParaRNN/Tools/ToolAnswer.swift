#if canImport(CoreML)
  import Foundation

  /// An answer in the making by a model that uses tools.
  actor ToolAnswer: Answering {
    private let turn: ToolTurn
    private let source: ModelTokens
    private let promptTokens: Int
    private var isBusy = false
    private var waiting: [CheckedContinuation<Void, Never>] = []
    private var hasEnded = false
    private var hasFailed = false
    var isGoingOn: Bool { !hasEnded }

    private(set) var statistics = GenerationStatistics()
    private(set) var text = ""

    /// - Parameter earlier: turns that the model has yet to read.
    /// - Throws: ``ParaRNNError`` for options or a message that cannot be.
    init(
      _ message: String, after earlier: [ChatMessage], model: ParaRNNModel, memory: ParaRNNModel.Memory,
      tools: ToolProtocol,
      functions: ToolFunctions, limits: ToolLimits, options: GenerationOptions
    ) throws {
      try options.check()
      if model.settings.output == .token { throw ParaRNNError.toolsNeedLogits }
      if options.schema != nil {
        throw ParaRNNError.toolsMismatch(
          reason: "a model that uses tools answers in words, and takes no schema")
      }
      if message.isEmpty { throw ParaRNNError.emptyPrompt }
      var limits = limits
      let before = [memory.pending].compactMap { $0 } + tools.render(turns: earlier)
      promptTokens = before.count + tools.render(message: message).count
      if let positions = model.settings.positions {
        let taken = memory.position + promptTokens
        if taken >= positions { throw ParaRNNError.noRoom(taken: taken, positions: positions) }
        limits.steps = min(limits.steps, positions - taken)
      }
      source = ModelTokens(model: model, memory: memory, before: before, end: tools[.end], options: options)
      turn = try ToolTurn(message, tools: tools, source: source, functions: functions, limits: limits)
      statistics.promptTokens = promptTokens
    }

    var memory: ParaRNNModel.Memory { get async { await source.memory } }

    var standing: Standing { get async { await turn.isRead ? hasFailed ? .textAlone : .sound : .unread } }

    /// The next event; nil at the end.
    func nextEvent() async throws -> ToolEvent? {
      if isBusy { throw ParaRNNError.busy }
      if hasEnded { return nil }
      isBusy = true
      let start = ContinuousClock.now
      let wasRead = await turn.isRead
      defer {
        let seconds = (ContinuousClock.now - start).seconds
        if wasRead { statistics.generationSeconds += seconds } else { statistics.promptSeconds += seconds }
        isBusy = false
        waiting.forEach { $0.resume() }
        waiting = []
      }
      do {
        let event = try await turn.next()
        if let event { take(event) }
        return event
      } catch {
        hasFailed = !(error is CancellationError)
        hasEnded = true
        throw error
      }
    }

    /// The next piece of the answer's text; nil at the end.
    func next() async throws -> String? {
      while let event = try await nextEvent() {
        if case .text(let piece) = event.kind { return piece }
      }
      return nil
    }

    func nextToken() async throws -> GeneratedToken? {
      throw ParaRNNError.toolsMismatch(reason: "it uses tools; read its events")
    }

    /// Give nothing more.
    func stop() async {
      hasEnded = true
      await source.stop()
      if isBusy { await withCheckedContinuation { waiting.append($0) } }
    }

    private func take(_ event: ToolEvent) {
      switch event.kind {
      case .text(let piece): text += piece
      case .finish(let finish):
        hasEnded = true
        statistics.generatedTokens = finish.made
        statistics.stopReason =
          switch finish.reason {
          case .stop, .lost: .endOfText
          case .length: .maxTokens
          case .steps: .steps
          case .time: .time
          }
      default: statistics.generatedTokens = max(event.tokens - promptTokens, 0)
      }
    }
  }

  /// A model as a source of tokens.
  private actor ModelTokens: TokenSource {
    nonisolated let vocabularySize: Int
    private let model: ParaRNNModel
    private let end: Int
    private var state: ParaRNNModel.Memory
    private var sampler: Sampler
    private var recent: [Int] = []
    private var output: ParaRNNModel.Output?
    private var isStopped = false
    /// To be read before the turn.
    private var before: [Int]

    init(
      model: ParaRNNModel, memory: ParaRNNModel.Memory, before: [Int], end: Int, options: GenerationOptions
    ) {
      self.model = model
      self.before = before
      self.end = end
      state = memory
      sampler = Sampler(options)
      vocabularySize = model.settings.vocabularySize
    }

    /// The end of the turn has not been read: the next one reads it first.
    var memory: ParaRNNModel.Memory {
      var memory = state
      memory.pending = end
      return memory
    }

    func stop() { isStopped = true }

    func read(_ tokens: [Int]) async throws {
      var unread = (before + tokens)[...]
      before = []
      recent = (recent + unread).suffix(Sampler.penalized)
      while !unread.isEmpty {
        try Task.checkCancellation()
        if isStopped { throw CancellationError() }
        let prediction = try await model.predict(unread, at: state.position, state.state)
        output = prediction.output
        state.state = prediction.state
        state.position += prediction.count
        unread = unread.dropFirst(prediction.count)
        await Task.yield()
      }
    }

    func choose(_ allowed: [Bool]) async throws -> Int {
      try Task.checkCancellation()
      if isStopped { throw CancellationError() }
      guard case .logits(var logits) = output else { throw ParaRNNError.toolsNeedLogits }
      for i in logits.indices where !allowed[i] { logits[i] = -.infinity }
      return sampler.pick(logits, after: recent)
    }
  }

  /// What happens while a model that uses tools answers, event by event; can be read once.
  ///
  /// Nothing runs ahead of the reader, and leaving the loop stops the model.
  public struct ToolEvents: AsyncSequence, Sendable {
    public typealias Element = ToolEvent
    public typealias Failure = any Error

    private let source: LazyAnswer<ToolAnswer>

    init(start: @escaping @Sendable () async throws -> ToolAnswer) { source = LazyAnswer(start) }

    public func makeAsyncIterator() -> AsyncIterator { AsyncIterator(source: source) }

    /// Counts and speeds so far; nil before the first event.
    public var statistics: GenerationStatistics? {
      get async { await source.answer?.statistics }
    }

    public struct AsyncIterator: AsyncIteratorProtocol {
      fileprivate let source: LazyAnswer<ToolAnswer>

      public mutating func next() async throws -> ToolEvent? { try await source.started()?.nextEvent() }

      public mutating func next(isolation actor: isolated (any Actor)?) async throws -> ToolEvent? {
        try await source.started()?.nextEvent()
      }
    }
  }
#endif
