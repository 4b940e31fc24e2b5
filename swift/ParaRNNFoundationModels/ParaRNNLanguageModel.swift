// The framework takes models of others from its version 2 on, which came with macOS 27 and iOS 27.
#if canImport(CoreML) && (PARARNN_FOUNDATION_MODELS_STUB || canImport(FoundationModels, _version: 2))
  import FoundationModels
  import ParaRNN

  /// A ParaRNN model behind Apple's `LanguageModelSession`.
  ///
  /// ```swift
  /// let session = LanguageModelSession(model: ParaRNNLanguageModel(model))
  /// let answer = try await session.respond(to: "Hello")
  /// ```
  ///
  /// A session hands over its whole transcript for each answer. What the model has read of it is not read again: the
  /// conversation goes on from its state. Text alone is taken and given: no tools of the session's, no guided generation.
  /// A model that uses tools has learned what to do, and passes the session's instructions over.
  @available(macOS 27, iOS 27, visionOS 27, *)
  public struct ParaRNNLanguageModel: LanguageModel {
    public typealias Executor = ParaRNNExecutor

    public let executorConfiguration: ParaRNNExecutor.Configuration
    public var capabilities: LanguageModelCapabilities { LanguageModelCapabilities([]) }

    public init(_ model: ParaRNNModel) { executorConfiguration = .init(model: model) }
  }

  /// What a session keeps of a ``ParaRNNLanguageModel``: the states of its conversations.
  @available(macOS 27, iOS 27, visionOS 27, *)
  public struct ParaRNNExecutor: LanguageModelExecutor {
    public typealias Model = ParaRNNLanguageModel

    /// Equal for the same loaded model.
    public struct Configuration: Hashable, Sendable {
      let model: ParaRNNModel

      public static func == (a: Self, b: Self) -> Bool { a.model === b.model }
      public func hash(into hasher: inout Hasher) { hasher.combine(ObjectIdentifier(model)) }
    }

    private let model: ParaRNNModel
    private let chats: ResumedChats

    public init(configuration: Configuration) throws {
      model = configuration.model
      chats = ResumedChats(model)
    }

    public func prewarm(model: ParaRNNLanguageModel, transcript: Transcript) {
      Task { [model = self.model] in await model.prewarm() }
    }

    /// - Throws: ``ParaRNNError``; `CancellationError` once the task is cancelled.
    public func respond(
      to request: LanguageModelExecutorGenerationRequest, model: ParaRNNLanguageModel,
      streamingInto channel: LanguageModelExecutorGenerationChannel
    ) async throws {
      var messages = Self.messages(of: request.transcript)
      // It was trained without, and would take them for a message.
      if self.model.usesTools { messages.removeAll { $0.role == .system } }
      guard let question = messages.popLast(), question.role == .user else {
        throw ParaRNNError.wrongMessages(reason: "the transcript does not end with a prompt")
      }
      let chat = try await chats.take(after: messages)
      do {
        let stream = chat.respond(to: question.text, options: options(request.generationOptions))
        var told = 0
        for try await piece in stream {
          let count = await stream.statistics?.generatedTokens ?? told
          await channel.send(.response(action: .appendText(piece, tokenCount: count - told)))
          told = count
        }
      } catch {
        await chats.keep(chat)
        throw error
      }
      await chats.keep(chat)
    }

    private static func messages(of transcript: Transcript) -> [ChatMessage] {
      transcript.compactMap { entry in
        switch entry {
        case .instructions(let instructions): ChatMessage(.system, text(of: instructions.segments))
        case .prompt(let prompt): ChatMessage(.user, text(of: prompt.segments))
        case .response(let response): ChatMessage(.assistant, text(of: response.segments))
        default: nil
        }
      }
    }

    private static func text(of segments: [Transcript.Segment]) -> String {
      segments.map { segment in
        if case .text(let text) = segment { text.content } else { "" }
      }.joined(separator: "\n")
    }

    private func options(_ options: FoundationModels.GenerationOptions) -> ParaRNN.GenerationOptions {
      let greedy = options.samplingMode == .greedy || model.settings.output == .token
      let temperature = greedy ? 0 : options.temperature ?? 0.7
      return .init(
        maxTokens: options.maximumResponseTokens ?? 1024, temperature: Float(temperature), topP: 0.95)
    }
  }
#endif
