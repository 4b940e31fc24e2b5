import Foundation

/// Picks the next token from logits, by the same rules and in the same order as MLX-LM's samplers
/// (`mlx_lm.sample_utils`): penalty, top-p, min-p, top-k, temperature.
struct Sampler: Sendable {
  /// MLX-LM's repetition_context_size.
  static let penalized = 20

  private let options: GenerationOptions
  private var random: SplitMix64

  init(_ options: GenerationOptions) {
    self.options = options
    random = SplitMix64(seed: options.seed ?? .random(in: .min ... .max))
  }

  /// The next token's id.
  ///
  /// - Parameters:
  ///   - logits: one number a token of the vocabulary.
  ///   - recent: what was read and generated last, oldest first.
  mutating func pick(_ logits: [Float], after recent: some Sequence<Int>) -> Int {
    if options.temperature == 0 { return likeliest(penalize(logits, recent)) }
    let probabilities = probabilities(logits, after: recent)
    var left = Double.random(in: 0..<1, using: &random)
    var last = 0
    for (token, p) in probabilities.enumerated() where p > 0 {
      left -= Double(p)
      last = token
      if left < 0 { break }
    }
    return last
  }

  /// What is drawn from: the probabilities of the tokens that the filters leave, summing to 1; others have 0.
  func probabilities(_ logits: [Float], after recent: some Sequence<Int>) -> [Float] {
    let logits = penalize(logits, recent)
    let top = logits.max() ?? 0
    let total = logits.reduce(0.0) { $0 + exp(Double($1 - top)) }
    let logTotal = top + Float(log(total))
    var scores = logits.map { $0 - logTotal }
    if options.topP < 1 { keepTopP(&scores) }
    if options.minP > 0 {
      let least = (scores.max() ?? 0) + log(options.minP)
      for i in scores.indices where scores[i] < least { scores[i] = -.infinity }
    }
    if options.topK > 0 && options.topK < scores.count { keepTopK(&scores) }
    let best = scores.max() ?? 0
    var weights = scores.map {
      exp(Double($0 - best) / Double(max(options.temperature, .leastNormalMagnitude)))
    }
    let sum = weights.reduce(0, +)
    for i in weights.indices { weights[i] /= sum }
    return weights.map(Float.init)
  }

  private func penalize(_ logits: [Float], _ recent: some Sequence<Int>) -> [Float] {
    guard options.repetitionPenalty != 1 else { return logits }
    var logits = logits
    for token in Set(recent.suffix(Self.penalized)) {
      logits[token] =
        logits[token] < 0
        ? logits[token] * options.repetitionPenalty : logits[token] / options.repetitionPenalty
    }
    return logits
  }

  private func keepTopP(_ scores: inout [Float]) {
    let wanted = Double(options.topP) * scores.reduce(0.0) { $0 + exp(Double($1)) }
    // Sorting them all is most of a step's time, and the few likeliest have the mass.
    let best = scores.max() ?? 0
    var distance: Float = 4
    var sorted: [Float] = []
    var masses: [Double] = []
    repeat {
      distance *= 2
      sorted = scores.filter { $0 >= best - distance }
      masses = sorted.map { exp(Double($0)) }
    } while masses.reduce(0, +) < wanted && sorted.count < scores.count && distance < 1000
    sorted.sort(by: >)
    masses = sorted.map { exp(Double($0)) }
    var above = 0.0
    var least = sorted[0]
    for (score, mass) in zip(sorted, masses) {
      if above >= wanted { break }
      least = score
      above += mass
    }
    for i in scores.indices where scores[i] < least { scores[i] = -.infinity }
  }

  private func keepTopK(_ scores: inout [Float]) {
    guard options.topK <= 256 else {
      let order = scores.indices.sorted { (scores[$0], $1) > (scores[$1], $0) }
      for i in order.dropFirst(options.topK) { scores[i] = -.infinity }
      return
    }
    // The best so far, best first; of equal ones the first stay.
    var kept: [(score: Float, token: Int)] = []
    for (token, score) in scores.enumerated() where kept.count < options.topK || score > kept.last!.score {
      if kept.count == options.topK { kept.removeLast() }
      let place = kept.firstIndex { $0.score < score } ?? kept.count
      kept.insert((score, token), at: place)
    }
    var few = [Float](repeating: -.infinity, count: scores.count)
    for (score, token) in kept { few[token] = score }
    scores = few
  }

  /// The first of the largest, as MLX's argmax.
  private func likeliest(_ logits: [Float]) -> Int {
    var best = 0
    for i in logits.indices where logits[i] > logits[best] { best = i }
    return best
  }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and the same everywhere.
struct SplitMix64: RandomNumberGenerator, Sendable {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}
