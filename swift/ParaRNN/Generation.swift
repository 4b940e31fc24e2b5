#if canImport(CoreML)
  import Foundation

  /// What a chat knows of an answer in the making, and a stream reads.
  protocol Answering: Actor {
    /// The next piece of text; nil at the end.
    func next() async throws -> String?
    /// Give nothing more.
    func stop() async
    /// True once the whole prompt has been read and no prediction has failed.
    var isSound: Bool { get async }
    /// False once it has ended, was stopped or has failed.
    var isGoingOn: Bool { get }
    /// The memory after what has been read and said.
    var memory: ParaRNNModel.Memory { get async }
    /// All text given so far.
    var text: String { get }
    var statistics: GenerationStatistics { get }
  }

  /// One answer in the making: reads the prompt in chunks, then gives a piece of text at each call.
  actor Generation: Answering {
    private let model: ParaRNNModel
    private let options: GenerationOptions
    private var sampler: Sampler
    private var detokenizer: Detokenizer
    private var stopTexts: StopTexts
    private var unread: ArraySlice<Int>
    private var recent: [Int]
    private var output: ParaRNNModel.Output?
    private var isBusy = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

    /// The memory, the token generated last included (as pending).
    private(set) var memory: ParaRNNModel.Memory
    private(set) var statistics = GenerationStatistics()
    /// All text given so far.
    private(set) var text = ""
    /// True once the whole prompt has been read and no prediction has failed.
    private(set) var isSound = false
    private var hasEnded = false
    var isGoingOn: Bool { !hasEnded }

    /// - Parameter tokens: what is to be read first, the memory's pending token not included.
    /// - Throws: ``ParaRNNError`` for options or tokens that cannot be.
    init(
      model: ParaRNNModel, memory: ParaRNNModel.Memory, tokens: [Int], options: GenerationOptions
    ) throws {
      try options.check()
      let settings = model.settings
      if settings.output == .token && !options.isGreedy { throw ParaRNNError.samplingNeedsLogits }
      let all = [memory.pending].compactMap { $0 } + tokens
      guard !tokens.isEmpty else { throw ParaRNNError.emptyPrompt }
      if let bad = all.first(where: { !(0..<settings.vocabularySize).contains($0) }) {
        throw ParaRNNError.unknownToken(bad, vocabularySize: settings.vocabularySize)
      }
      if let positions = settings.positions, memory.position + all.count >= positions {
        throw ParaRNNError.noRoom(taken: memory.position + all.count, positions: positions)
      }
      self.model = model
      self.options = options
      self.memory = memory
      self.memory.pending = nil
      unread = all[...]
      recent = all.suffix(Sampler.penalized)
      sampler = Sampler(options)
      detokenizer = Detokenizer(model.tokenizer)
      stopTexts = StopTexts(options.stop)
      statistics.promptTokens = all.count
    }

    /// The next piece of text; nil at the end.
    func next() async throws -> String? {
      if isBusy { throw ParaRNNError.busy }
      if hasEnded { return nil }
      isBusy = true
      defer {
        isBusy = false
        waiting.forEach { $0.resume() }
        waiting = []
      }
      do {
        let start = ContinuousClock.now
        try await read()
        let read = ContinuousClock.now
        statistics.promptSeconds += (read - start).seconds
        defer { statistics.generationSeconds += (ContinuousClock.now - read).seconds }
        return try await generate()
      } catch {
        hasEnded = true
        throw error
      }
    }

    /// Give nothing more.
    func stop() async {
      hasEnded = true
      await idle()
    }

    /// Wait for the call of `next` that is under way, if one is.
    func idle() async {
      if isBusy { await withCheckedContinuation { waiting.append($0) } }
    }

    /// Whole chunks by prefill, what is left by decode.
    private func read() async throws {
      while !unread.isEmpty {
        try Task.checkCancellation()
        let chunk = await model.chunk.flatMap { unread.count >= $0 ? $0 : nil } ?? 1
        try await predict(Array(unread.prefix(chunk)))
        unread = unread.dropFirst(chunk)
        if hasEnded { throw CancellationError() }
      }
      isSound = true
    }

    private func generate() async throws -> String? {
      while !hasEnded {
        try Task.checkCancellation()
        if statistics.generatedTokens == options.maxTokens { return end(.maxTokens) }
        if let token = memory.pending {
          if let positions = model.settings.positions, memory.position >= positions { return end(.positions) }
          try await predict([token])
          memory.pending = nil
          if hasEnded { break }
        }
        guard let output else { return nil }
        let token =
          switch output {
          case .logits(let logits): sampler.pick(logits, after: recent)
          case .token(let token): token
          }
        memory.pending = token
        statistics.generatedTokens += 1
        recent = recent.suffix(Sampler.penalized - 1) + [token]
        if model.settings.endTokens.contains(token) { return end(.endOfText) }
        let piece = stopTexts.append(detokenizer.append(token))
        if stopTexts.isFound {
          hasEnded = true
          statistics.stopReason = .stopText
          text += piece
          return piece.isEmpty ? nil : piece
        }
        if !piece.isEmpty {
          text += piece
          return piece
        }
      }
      return nil
    }

    private func predict(_ tokens: [Int]) async throws {
      let (output, state): (ParaRNNModel.Output, ParaRNNModel.State)
      do {
        (output, state) = try await model.predict(tokens, at: memory.position, memory.state)
      } catch {
        isSound = false
        throw error
      }
      self.output = output
      memory.state = state
      memory.position += tokens.count
      // Otherwise a long answer keeps a thread of the few that all tasks share to itself.
      await Task.yield()
    }

    /// The last piece, with what was held back of an incomplete character.
    private func end(_ reason: GenerationStatistics.StopReason) -> String? {
      hasEnded = true
      statistics.stopReason = reason
      var piece = stopTexts.append(detokenizer.finish())
      if !stopTexts.isFound { piece += stopTexts.finish() }
      text += piece
      return piece.isEmpty ? nil : piece
    }
  }

  /// Text as it is generated, piece by piece; pieces hold whole Unicode scalars.
  ///
  /// Nothing runs ahead of the reader: each piece is computed when it is asked for, and leaving the loop stops
  /// the generation at once. A stream can be read once.
  public struct TextStream: AsyncSequence, Sendable {
    public typealias Element = String
    public typealias Failure = any Error

    private let source: LazyAnswer<any Answering>

    init(start: @escaping @Sendable () async throws -> any Answering) { source = LazyAnswer(start) }

    public func makeAsyncIterator() -> AsyncIterator { AsyncIterator(source: source) }

    /// Counts and speeds so far; nil before the first piece.
    public var statistics: GenerationStatistics? {
      get async { await source.answer?.statistics }
    }

    public struct AsyncIterator: AsyncIteratorProtocol {
      fileprivate let source: LazyAnswer<any Answering>

      public mutating func next() async throws -> String? { try await source.started()?.next() }

      public mutating func next(isolation actor: isolated (any Actor)?) async throws -> String? {
        try await source.started()?.next()
      }
    }
  }

  /// Starts an answer when the first piece of it is asked for.
  actor LazyAnswer<Answer: Sendable> {
    private var start: (@Sendable () async throws -> Answer)?
    /// Nil until it was started.
    private(set) var answer: Answer?

    init(_ start: @escaping @Sendable () async throws -> Answer) { self.start = start }

    /// The answer, started; nil if that failed earlier.
    func started() async throws -> Answer? {
      if let start {
        self.start = nil
        answer = try await start()
      }
      return answer
    }
  }
#endif
