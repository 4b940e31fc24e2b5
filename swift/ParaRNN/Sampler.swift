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
    if options.temperature == 0 { return penalize(logits, recent).likeliest }
    let candidates = candidates(logits, after: recent)
    var left = Double.random(in: 0..<1, using: &random)
    var last = 0
    for i in candidates.tokens.indices where candidates.probabilities[i] > 0 {
      left -= Double(candidates.probabilities[i])
      last = candidates.tokens[i]
      if left < 0 { break }
    }
    return last
  }

  /// The logarithm of a token's probability among all, after the penalty and before temperature and filters.
  func logProbability(of token: Int, _ logits: [Float], after recent: some Sequence<Int>) -> Float {
    let logits = penalize(logits, recent)
    let top = logits.top
    return Float(Double(logits[token] - top) - log(logits.mass(below: top)))
  }

  /// What is drawn from: the tokens that the filters leave, lowest id first, and their probabilities, summing to 1.
  ///
  /// Each filter is a bound of the logits or a count, so that only those above the bound are looked at further.
  func candidates(
    _ logits: [Float], after recent: some Sequence<Int>
  ) -> (tokens: [Int], probabilities: [Float]) {
    let logits = penalize(logits, recent)
    let top = logits.top
    var least = -Float.infinity
    if options.topP < 1 { least = leastOfTopP(logits, top) }
    if options.minP > 0 { least = max(least, top + log(options.minP)) }
    var tokens = logits.places(from: least)
    if options.topK > 0 && options.topK < tokens.count { keepTopK(&tokens, logits) }
    let scale = 1 / Double(max(options.temperature, .leastNormalMagnitude))
    var weights = [Double](repeating: 0, count: tokens.count)
    var sum = 0.0
    for i in weights.indices {
      weights[i] = exp(Double(logits[tokens[i]] - top) * scale)
      sum += weights[i]
    }
    return (tokens, weights.map { Float($0 / sum) })
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

  /// The lowest logit that top-p leaves.
  private func leastOfTopP(_ logits: [Float], _ top: Float) -> Float {
    let wanted = Double(options.topP) * logits.mass(below: top)
    // Sorting them all is most of a step's time, and the few likeliest have the mass.
    var distance: Float = 1
    var sorted: [Float] = []
    var mass = 0.0
    repeat {
      distance *= 2
      sorted = logits.places(from: top - distance).map { logits[$0] }
      mass = sorted.mass(below: top)
    } while mass < wanted && sorted.count < logits.count && distance < 1000
    sorted.sort(by: >)
    var above = 0.0
    var least = top
    for logit in sorted {
      if above >= wanted { break }
      least = logit
      above += exp(Double(logit - top))
    }
    return least
  }

  /// Of equal ones the first stay.
  private func keepTopK(_ tokens: inout [Int], _ logits: [Float]) {
    guard options.topK <= 256 else {
      let order = tokens.sorted { (logits[$0], $1) > (logits[$1], $0) }
      tokens = order.prefix(options.topK).sorted()
      return
    }
    // The best so far, best first.
    var kept = tokens.prefix(options.topK).sorted { (logits[$0], $1) > (logits[$1], $0) }
    var least = logits[kept.last!]
    for token in tokens.dropFirst(options.topK) where logits[token] > least {
      kept.removeLast()
      kept.insert(token, at: kept.firstIndex { logits[$0] < logits[token] } ?? kept.count)
      least = logits[kept.last!]
    }
    tokens = kept.sorted()
  }
}

/// Passes over a whole vocabulary, by pointers: without an optimizer, in a Debug build, a closure for each number takes
/// ten times as long.
extension [Float] {
  /// The largest; 0 where there is none.
  fileprivate var top: Float { isEmpty ? 0 : self[likeliest] }

  /// The place of the first of the largest, as MLX's argmax.
  var likeliest: Int {
    withUnsafeBufferPointer { buffer in
      guard let numbers = buffer.baseAddress else { return 0 }
      var best = 0
      var i = 1
      while i < buffer.count {
        if numbers[i] > numbers[best] { best = i }
        i += 1
      }
      return best
    }
  }

  /// The sum of all exp(number - top). Those so small that a million of them change no digit are left out.
  fileprivate func mass(below top: Float) -> Double {
    withUnsafeBufferPointer { buffer in
      guard let numbers = buffer.baseAddress else { return 0 }
      let least = top - 50
      var mass = 0.0
      var i = 0
      while i < buffer.count {
        let number = numbers[i]
        if number > least { mass += exp(Double(number - top)) }
        i += 1
      }
      return mass
    }
  }

  /// The places of the numbers that are `least` or more, the first one first.
  fileprivate func places(from least: Float) -> [Int] {
    withUnsafeBufferPointer { buffer in
      guard let numbers = buffer.baseAddress else { return [] }
      var places: [Int] = []
      var i = 0
      while i < buffer.count {
        if numbers[i] >= least { places.append(i) }
        i += 1
      }
      return places
    }
  }

  /// True if none is infinite or no number.
  var areFinite: Bool {
    withUnsafeBufferPointer { buffer in
      guard let numbers = buffer.baseAddress else { return true }
      // A sum of zeros, unless one of them is not.
      var sum: Float = 0
      var i = 0
      while i < buffer.count {
        sum += numbers[i] * 0
        i += 1
      }
      return sum == 0
    }
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
