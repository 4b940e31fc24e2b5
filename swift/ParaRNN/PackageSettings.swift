import Foundation

/// What a package says of itself: `pararnn.json`, which also stands in its metadata.
public struct PackageSettings: Sendable, Equatable {
  /// One of the tensors that make up the model's memory.
  public struct State: Sendable, Equatable, Decodable {
    public enum Kind: String, Sendable, Decodable {
      case float16, float32
      var size: Int { self == .float16 ? 2 : 4 }
    }
    public let name: String
    /// (layers, slots or steps, channels)
    public let shape: [Int]
    public let dtype: Kind

    var byteCount: Int { shape.reduce(dtype.size, *) }

    /// True for a shape whose ``byteCount`` can be taken, and held in memory.
    var hasSize: Bool {
      let bytes = shape.reduce(dtype.size) { bytes, length in
        let (product, overflows) = bytes.multipliedReportingOverflow(by: length)
        return overflows ? .max : product
      }
      return !shape.isEmpty && shape.allSatisfy { $0 > 0 } && bytes <= Int(Int32.max)
    }
  }

  public enum Output: String, Sendable, Decodable {
    /// `logits`, (1, 1, ``PackageSettings/vocabularySize``)
    case logits
    /// The likeliest next token alone.
    case token
  }

  public enum Layout: String, Sendable {
    case plain
    /// The Neural Engine's (`--layout ane`): inputs and outputs are as with `--state io`.
    case ane
  }

  /// What reads several tokens at once: a function, or several that are called one after another.
  struct Prefill: Sendable, Equatable {
    let functions: [String]
    let count: Int

    fileprivate init(_ name: String, _ count: Int, parts: Int) {
      functions = parts == 1 ? [name] : (1...parts).map { "\(name)_part_\($0)" }
      self.count = count
    }
  }

  public let vocabularySize: Int
  /// How many tokens `prefill` reads at once; nil for a package that has `decode` only.
  public let chunk: Int?
  /// All that reads several tokens, the largest first.
  let prefills: [Prefill]
  /// True if the memory lives in Core ML states (`--state graph`), false if it is passed in and out, as always with
  /// Core AI.
  public let keepsStateInGraph: Bool
  public let states: [State]
  /// How the tensors inside the program are laid out.
  public let layout: Layout
  public let output: Output
  /// Tokens that end a text.
  public let endTokens: [Int]
  /// What the chat template puts around messages, as the export has found by rendering it; nil if there was no
  /// template, or one that is not made of fixed texts.
  public let chatFormat: ChatFormat?
  /// How many tokens a sequence may have; nil for no limit.
  public let positions: Int?
  public let cell: String
  public let parameters: Int
  /// How the matrices are stored: float16, int8, int4 or palette4.
  public let weights: String

  /// Size of the memory of one sequence, however long it is.
  public var stateBytes: Int { states.reduce(0) { $0 + $1.byteCount } }

  /// Read the JSON text.
  ///
  /// - Throws: ``ParaRNNError/unreadableSettings(reason:)``
  init(json: String) throws {
    let raw: Raw
    do {
      // First read as JSON at all: JSONDecoder stops the process at some texts that are none.
      _ = try JSONSerialization.jsonObject(with: Data(json.utf8))
      raw = try JSONDecoder().decode(Raw.self, from: Data(json.utf8))
    } catch {
      throw ParaRNNError.unreadableSettings(reason: "it is not the JSON that mlx-pararnn writes")
    }
    func require(_ holds: Bool, _ what: String) throws {
      if !holds { throw ParaRNNError.unreadableSettings(reason: what) }
    }
    try require(
      ["pararnn-coreml", "pararnn-coreai"].contains(raw.format) && (1...2).contains(raw.format_version),
      "its format is \(raw.format) \(raw.format_version), this library reads pararnn-coreml 1 and 2 and pararnn-coreai 1"
    )
    let isCoreML = raw.format == "pararnn-coreml"
    try require(["graph", "io"].contains(raw.state), "its state is \(raw.state)")
    let named = raw.layout ?? Layout.plain.rawValue
    guard let layout = Layout(rawValue: named), layout == .plain || raw.state == "io" else {
      throw ParaRNNError.unreadableSettings(reason: "its layout is \(named), its state \(raw.state)")
    }
    try require(isCoreML || raw.output == .logits && raw.states.count <= 2, "Core AI packages give logits")
    try require(raw.functions.contains("decode"), "it has no function decode")
    let parts = raw.parts ?? 1
    try require(
      isCoreML ? (1...raw.functions.count).contains(parts) : parts == 1, "its parts do not fit its functions")
    try require(raw.format_version == (raw.parts == nil ? 1 : 2), "its parts do not fit its format_version")
    try require(
      (raw.functions.count > 1) == (raw.chunk != nil) && raw.chunk ?? 1 > 0,
      "its chunk does not fit its functions")
    // Packages of earlier versions have one at most, and no list.
    let chunks = raw.chunks ?? raw.chunk.map { ["prefill": $0] } ?? [:]
    let all = chunks.map { Prefill($0, $1, parts: parts) }
    try require(
      chunks["prefill"] == raw.chunk
        && all.allSatisfy { $0.count > 0 && $0.functions.allSatisfy(raw.functions.contains) },
      "its chunks do not fit its functions")
    // Token ids and positions are handed over as int32.
    let int32 = 1...Int(Int32.max)
    try require(int32.contains(raw.vocab_size), "its vocabulary has \(raw.vocab_size) tokens")
    try require(int32.contains(raw.max_position_embeddings ?? 1), "it has no positions, or too many")
    try require(!raw.states.isEmpty && raw.states.allSatisfy(\.hasSize), "its states have no possible shape")
    vocabularySize = raw.vocab_size
    chunk = raw.chunk
    prefills = all.filter { $0.count > 1 }.sorted { $0.count > $1.count }
    keepsStateInGraph = isCoreML && raw.state == "graph"
    states = raw.states
    self.layout = layout
    output = raw.output
    endTokens = raw.eos_token_id
    chatFormat = raw.chat_format?.format
    positions = raw.max_position_embeddings
    cell = raw.cell
    parameters = raw.parameters
    weights = raw.weights
  }

  /// The keys of docs/coreml.md that a runner needs.
  private struct Raw: Decodable {
    let format: String
    let format_version: Int
    let functions: [String]
    let chunk: Int?
    let chunks: [String: Int]?
    let parts: Int?
    let state: String
    let states: [State]
    let layout: String?
    let output: Output
    let weights: String
    let eos_token_id: [Int]
    let vocab_size: Int
    let cell: String
    let max_position_embeddings: Int?
    let parameters: Int
    let chat_format: ChatTexts?
  }

  /// pararnn.json's `chat_format`.
  struct ChatTexts: Decodable {
    let beginning: String
    let before_system: String?
    let after_system: String?
    let after_user: String
    let before_answer: String
    let after_answer: String
    let trimmed: [ChatMessage.Role]

    var format: ChatFormat {
      ChatFormat(
        beforeSystem: before_system ?? "", afterSystem: after_system ?? "", beforeUser: "",
        afterUser: after_user, afterAnswer: after_answer, beginning: beginning,
        takesSystemPrompt: before_system != nil, beforeAnswer: before_answer, trimmed: Set(trimmed))
    }
  }
}
