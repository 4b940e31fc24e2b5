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
  /// A JSON schema, as text, that the answer keeps: it is one JSON value without spaces between its parts, members of an
  /// object in the order of the schema; nil for free text. The schema may have `type`, `properties`, `required`, `items`,
  /// `enum`, `const`, `anyOf` and bounds; bounds of numbers are not kept. Where `maxTokens` ends it, the value is cut off.
  public var schema: String?

  public init(
    maxTokens: Int = 256, temperature: Float = 0, topK: Int = 0, topP: Float = 1, minP: Float = 0,
    repetitionPenalty: Float = 1, seed: UInt64? = nil, stop: [String] = [], schema: String? = nil
  ) {
    self.maxTokens = maxTokens
    self.temperature = temperature
    self.topK = topK
    self.topP = topP
    self.minP = minP
    self.repetitionPenalty = repetitionPenalty
    self.seed = seed
    self.stop = stop
    self.schema = schema
  }

  func check() throws {
    func require(_ holds: Bool, _ what: String) throws {
      if !holds { throw ParaRNNError.invalidOption(what) }
    }
    try require(maxTokens >= 0, "maxTokens is \(maxTokens), below 0")
    try require(temperature >= 0 && temperature.isFinite, "temperature is \(temperature), not from 0 up")
    try require(!stop.contains(""), "a text in stop is empty")
    _ = try grammar()
    try require(topK >= 0, "topK is \(topK), below 0")
    try require(topP > 0 && topP <= 1, "topP is \(topP), not above 0 and up to 1")
    try require(minP >= 0 && minP <= 1, "minP is \(minP), not from 0 to 1")
    try require(
      repetitionPenalty > 0 && repetitionPenalty.isFinite,
      "repetitionPenalty is \(repetitionPenalty), not above 0")
  }

  /// What ``schema`` allows.
  func grammar() throws -> JSONGrammar? {
    do {
      return try schema.map { try JSONSchema($0).grammar }
    } catch let refused as JSONSchema.Refused {
      throw ParaRNNError.invalidOption(refused.reason)
    }
  }

  /// True if the likeliest token is all that is wanted.
  var isGreedy: Bool { temperature == 0 && repetitionPenalty == 1 && schema == nil }
}
