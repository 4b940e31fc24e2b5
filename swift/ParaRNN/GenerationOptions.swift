/// How a text is continued. The defaults are greedy: the likeliest token each time.
public struct GenerationOptions: Sendable, Equatable {
  /// At most so many tokens.
  public var maxTokens: Int
  /// 0 takes the likeliest token; larger is livelier.
  public var temperature: Float
  /// Only the so many likeliest tokens; 0 for all.
  public var topK: Int
  /// Only the likeliest tokens that together have this probability; 1 for all.
  public var topP: Float
  /// Only tokens with at least this share of the likeliest one's probability; 0 for all.
  public var minP: Float
  /// Divides the positive logits of the last 20 tokens, multiplies the negative ones; 1 for none.
  public var repetitionPenalty: Float
  /// The same seed draws the same tokens again, in this library; nil draws anew each time.
  public var seed: UInt64?
  /// Texts before which an answer ends; they are not part of it.
  public var stop: [String]

  public init(
    maxTokens: Int = 256, temperature: Float = 0, topK: Int = 0, topP: Float = 1, minP: Float = 0,
    repetitionPenalty: Float = 1, seed: UInt64? = nil, stop: [String] = []
  ) {
    self.maxTokens = maxTokens
    self.temperature = temperature
    self.topK = topK
    self.topP = topP
    self.minP = minP
    self.repetitionPenalty = repetitionPenalty
    self.seed = seed
    self.stop = stop
  }

  func check() throws {
    func require(_ holds: Bool, _ what: String) throws {
      if !holds { throw ParaRNNError.invalidOption(what) }
    }
    try require(maxTokens >= 0, "maxTokens is \(maxTokens), below 0")
    try require(temperature >= 0 && temperature.isFinite, "temperature is \(temperature), not from 0 up")
    try require(!stop.contains(""), "a text in stop is empty")
    try require(topK >= 0, "topK is \(topK), below 0")
    try require(topP > 0 && topP <= 1, "topP is \(topP), not above 0 and up to 1")
    try require(minP >= 0 && minP <= 1, "minP is \(minP), not from 0 to 1")
    try require(
      repetitionPenalty > 0 && repetitionPenalty.isFinite,
      "repetitionPenalty is \(repetitionPenalty), not above 0")
  }

  /// True if the likeliest token is all that is wanted.
  var isGreedy: Bool { temperature == 0 && repetitionPenalty == 1 }
}
