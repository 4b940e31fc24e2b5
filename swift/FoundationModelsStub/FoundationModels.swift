// A stand-in for the part of Apple's FoundationModels (version 2) that ParaRNNFoundationModels uses, so that it compiles
// and is tested on Linux. Names and forms are those of Apple's public documentation; nothing of it ships.

public protocol LanguageModel: Sendable {
  associatedtype Executor: LanguageModelExecutor
  var capabilities: LanguageModelCapabilities { get }
  var executorConfiguration: Executor.Configuration { get }
}

public protocol LanguageModelExecutor: Sendable {
  associatedtype Configuration: Hashable, Sendable
  associatedtype Model: LanguageModel

  init(configuration: Configuration) throws
  func prewarm(model: Model, transcript: Transcript)
  func respond(
    to request: LanguageModelExecutorGenerationRequest, model: Model,
    streamingInto channel: LanguageModelExecutorGenerationChannel
  ) async throws
}

public struct LanguageModelCapabilities: Sendable {
  public struct Capability: Hashable, Sendable {}
  public init(_ capabilities: [Capability]) {}
}

public struct Transcript: RandomAccessCollection, Sendable {
  public struct TextSegment: Sendable {
    public var content: String
    public init(content: String) { self.content = content }
  }
  public enum Segment: Sendable {
    case text(TextSegment)
    case structure(String)
  }
  public struct Instructions: Sendable {
    public var segments: [Segment]
    public init(segments: [Segment]) { self.segments = segments }
  }
  public struct Prompt: Sendable {
    public var segments: [Segment]
    public init(segments: [Segment]) { self.segments = segments }
  }
  public struct Response: Sendable {
    public var segments: [Segment]
    public init(segments: [Segment]) { self.segments = segments }
  }
  public struct Reasoning: Sendable {
    public init() {}
  }
  public enum Entry: Sendable {
    case instructions(Instructions)
    case prompt(Prompt)
    case response(Response)
    case reasoning(Reasoning)
  }

  private var entries: [Entry]
  public init(entries: [Entry]) { self.entries = entries }
  public var startIndex: Int { 0 }
  public var endIndex: Int { entries.count }
  public subscript(index: Int) -> Entry { entries[index] }
}

public struct GenerationOptions: Sendable {
  public struct SamplingMode: Sendable, Equatable {
    private let isGreedy: Bool
    public static let greedy = SamplingMode(isGreedy: true)
  }
  public var samplingMode: SamplingMode?
  public var temperature: Double?
  public var maximumResponseTokens: Int?
  public init(
    samplingMode: SamplingMode? = nil, temperature: Double? = nil, maximumResponseTokens: Int? = nil
  ) {
    self.samplingMode = samplingMode
    self.temperature = temperature
    self.maximumResponseTokens = maximumResponseTokens
  }
}

public struct LanguageModelExecutorGenerationRequest: Sendable {
  public var transcript: Transcript
  public var generationOptions: GenerationOptions
  public init(transcript: Transcript, generationOptions: GenerationOptions) {
    self.transcript = transcript
    self.generationOptions = generationOptions
  }
}

public struct LanguageModelExecutorGenerationChannel: Sendable {
  public enum Event: Sendable {
    public enum ResponseAction: Sendable {
      case appendText(String, tokenCount: Int)
    }
    case response(action: ResponseAction)
  }

  /// STAND-IN ONLY: what is sent.
  public let events: AsyncStream<Event>
  private let continuation: AsyncStream<Event>.Continuation
  public init() { (events, continuation) = AsyncStream.makeStream() }
  public func send(_ event: Event) async { continuation.yield(event) }
  /// STAND-IN ONLY: nothing more is sent.
  public func finish() { continuation.finish() }
}
