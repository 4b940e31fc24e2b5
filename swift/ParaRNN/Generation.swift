#if canImport(CoreML)
  import Foundation

  /// What a chat knows of an answer in the making, and a stream reads.
  protocol Answering: Actor {
    /// The next piece of text; nil at the end.
    func next() async throws -> String?
    /// The next token; nil at the end.
    func nextToken() async throws -> GeneratedToken?
    /// Give nothing more.
    func stop() async
    var standing: Standing { get async }
    /// False once it has ended, was stopped or has failed.
    var isGoingOn: Bool { get }
    /// The memory after what has been read and said.
    var memory: ParaRNNModel.Memory { get async }
    /// All text given so far.
    var text: String { get }
    var statistics: GenerationStatistics { get }
  }

  /// What is left of an answer, wherever it ends.
  enum Standing: Sendable {
    /// Nothing: its prompt has not been read.
    case unread
    /// Its text and the memory after it.
    case sound
    /// Its text: a prediction failed after the prompt was read, and what it did to the memory is unknown.
    case textAlone
  }

  /// One answer in the making: reads the prompt in chunks, then gives a piece of text at each call.
  actor Generation: Answering {
    private let model: ParaRNNModel
    private let options: GenerationOptions
    private var sampler: Sampler
    private var detokenizer: Detokenizer
    private var stopTexts: StopTexts
    /// What ``GenerationOptions/schema`` allows, and which tokens that means.
    private let grammar: JSONGrammar?
    private var guided: GuidedTokens?
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
    private(set) var standing = Standing.unread
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
      grammar = try options.grammar()
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

    func next() async throws -> String? {
      while let token = try await token(withProbability: false) {
        if !token.text.isEmpty { return token.text }
      }
      return nil
    }

    func nextToken() async throws -> GeneratedToken? { try await token(withProbability: true) }

    private func token(withProbability: Bool) async throws -> GeneratedToken? {
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
        return try await generate(withProbability)
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

    private func read() async throws {
      while !unread.isEmpty {
        try Task.checkCancellation()
        unread = unread.dropFirst(try await predict(unread))
        if hasEnded { throw CancellationError() }
      }
      if standing == .unread { standing = .sound }
    }

    private func generate(_ withProbability: Bool) async throws -> GeneratedToken? {
      try Task.checkCancellation()
      if options.maxTokens == 0 {
        end(.maxTokens)
        return nil
      }
      if let token = memory.pending {
        _ = try await predict([token])
        memory.pending = nil
        if hasEnded { return nil }
      }
      guard let output else { return nil }
      let id: Int
      var logProbability: Float?
      switch output {
      case .logits(let logits):
        id = sampler.pick(try await allowed(logits), after: recent)
        if withProbability { logProbability = sampler.logProbability(of: id, logits, after: recent) }
      case .token(let token): id = token
      }
      memory.pending = id
      statistics.generatedTokens += 1
      recent = recent.suffix(Sampler.penalized - 1) + [id]
      let isEnd = model.settings.endTokens.contains(id)
      if !isEnd { guided?.take(id) }
      var piece = isEnd ? "" : stopTexts.append(detokenizer.append(id))
      if isEnd || guided?.isStopped == true {
        end(.endOfText)
      } else if stopTexts.isFound {
        end(.stopText)
      } else if statistics.generatedTokens == options.maxTokens {
        end(.maxTokens)
      } else if let positions = model.settings.positions, memory.position >= positions {
        end(.positions)
      }
      if hasEnded, !stopTexts.isFound {
        // What was held back of an incomplete character, or of what might have become a stop text.
        piece += stopTexts.append(detokenizer.finish())
        if !stopTexts.isFound { piece += stopTexts.finish() }
      }
      text += piece
      return GeneratedToken(id: id, text: piece, logProbability: logProbability)
    }

    /// The logits of the tokens that the schema allows here; all where there is none.
    private func allowed(_ logits: [Float]) async throws -> [Float] {
      guard let grammar else { return logits }
      if guided == nil { guided = GuidedTokens(grammar, try await model.vocabularyBytes()) }
      var mask = guided!.allowed()
      if guided!.isComplete {
        for token in model.settings.endTokens where token < mask.count { mask[token] = true }
      }
      var logits = logits
      var isAnyAllowed = false
      for token in logits.indices {
        if mask[token] { isAnyAllowed = true } else { logits[token] = -.infinity }
      }
      if !isAnyAllowed { throw ParaRNNError.schemaCannotBeKept }
      return logits
    }

    /// Read the first of `tokens`; returns how many.
    private func predict(_ tokens: ArraySlice<Int>) async throws -> Int {
      let prediction: ParaRNNModel.Prediction
      do {
        prediction = try await model.predict(tokens, at: memory.position, memory.state)
      } catch {
        if standing == .sound { standing = .textAlone }
        throw error
      }
      output = prediction.output
      memory.state = prediction.state
      memory.position += prediction.count
      // Otherwise a long answer keeps a thread of the few that all tasks share to itself.
      await Task.yield()
      return prediction.count
    }

    private func end(_ reason: GenerationStatistics.StopReason) {
      hasEnded = true
      statistics.stopReason = reason
    }
  }

  /// A token that a model has said.
  public struct GeneratedToken: Sendable, Equatable {
    public let id: Int
    /// What it adds to the text; "" for an end of text, and while a character or a text in
    /// ``GenerationOptions/stop`` may still be completed.
    public let text: String
    /// The logarithm of its probability among all tokens, after the repetition penalty and before temperature and
    /// filters; nil for a package that gives only the likeliest token.
    public let logProbability: Float?
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

    /// The same stream token by token, with ids and probabilities; a stream is read once, in either way.
    ///
    /// - Throws (while it is read): as this stream; ``ParaRNNError/toolsMismatch(reason:)`` for a model that uses tools,
    ///   whose ``ParaRNNChat/events(respondingTo:options:limits:)`` tell more.
    public var tokens: TokenStream { TokenStream(source: source) }

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

  /// The tokens of a ``TextStream`` as they are generated.
  public struct TokenStream: AsyncSequence, Sendable {
    public typealias Element = GeneratedToken
    public typealias Failure = any Error

    fileprivate let source: LazyAnswer<any Answering>

    public func makeAsyncIterator() -> AsyncIterator { AsyncIterator(source: source) }

    public struct AsyncIterator: AsyncIteratorProtocol {
      fileprivate let source: LazyAnswer<any Answering>

      public mutating func next() async throws -> GeneratedToken? { try await source.started()?.nextToken() }

      public mutating func next(isolation actor: isolated (any Actor)?) async throws -> GeneratedToken? {
        try await source.started()?.nextToken()
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
