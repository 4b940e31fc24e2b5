import Foundation
import Testing

@testable import ParaRNN

extension Sampler {
  /// The probability of every token.
  fileprivate func probabilities(_ logits: [Float], after recent: [Int]) -> [Float] {
    var all = [Float](repeating: 0, count: logits.count)
    let (tokens, probabilities) = candidates(logits, after: recent)
    for (token, probability) in zip(tokens, probabilities) { all[token] = probability }
    return all
  }
}

@Suite struct SamplerTests {
  struct Case: Decodable {
    struct Options: Decodable {
      var temperature: Float
      var topK: Int?
      var topP: Float?
      var minP: Float?
      var repetitionPenalty: Float?
    }
    let options: Options
    let logits: [Float]
    let recent: [Int]
    let probabilities: [Float]

    func generationOptions(seed: UInt64? = nil) -> GenerationOptions {
      .init(
        temperature: options.temperature, topK: options.topK ?? 0, topP: options.topP ?? 1,
        minP: options.minP ?? 0, repetitionPenalty: options.repetitionPenalty ?? 1, seed: seed)
    }
  }

  /// What swift/make_vectors.py had MLX-LM compute.
  @Test func sameProbabilitiesAsMLXLM() throws {
    let cases = try TestData.decode([Case].self, "sampling.json")
    #expect(cases.count >= 30)
    for (number, test) in cases.enumerated() {
      if test.options.temperature == 0 {
        var sampler = Sampler(test.generationOptions())
        #expect(test.probabilities[sampler.pick(test.logits, after: test.recent)] == 1, "case \(number)")
        continue
      }
      let ours = Sampler(test.generationOptions()).probabilities(test.logits, after: test.recent)
      #expect(ours.count == test.probabilities.count)
      for (p, q) in zip(ours, test.probabilities) {
        #expect(abs(p - q) <= 1e-5 && (p == 0) == (q == 0), "case \(number): \(p) instead of \(q)")
      }
    }
  }

  /// Neither temperature nor filters change what a token's probability is said to be.
  @Test func logProbabilities() throws {
    for test in try TestData.decode([Case].self, "sampling.json") {
      let sampler = Sampler(test.generationOptions())
      var penalized = test.logits.map(Double.init)
      if let penalty = test.options.repetitionPenalty {
        for token in Set(test.recent.suffix(20)) {
          penalized[token] *= penalized[token] < 0 ? Double(penalty) : 1 / Double(penalty)
        }
      }
      let total = log(penalized.reduce(0) { $0 + exp($1) })
      for token in stride(from: 0, to: test.logits.count, by: 17) {
        let ours = Double(sampler.logProbability(of: token, test.logits, after: test.recent))
        #expect(abs(ours - (penalized[token] - total)) < 1e-4)
      }
    }
  }

  @Test func whetherAllAreFinite() {
    let numbers: [Float] = [0, 3e38, -3e38, .leastNonzeroMagnitude, 3e38]
    #expect(numbers.areFinite && [Float]().areFinite)
    for bad: Float in [.nan, .infinity, -.infinity] {
      for place in numbers.indices {
        var numbers = numbers
        numbers[place] = bad
        #expect(!numbers.areFinite)
      }
    }
  }

  @Test func drawsFollowTheProbabilities() throws {
    let test = try TestData.decode([Case].self, "sampling.json")[0]
    var sampler = Sampler(test.generationOptions(seed: 3))
    let draws = 20_000
    var counts = [Int](repeating: 0, count: test.logits.count)
    for _ in 0..<draws { counts[sampler.pick(test.logits, after: test.recent)] += 1 }
    for (count, p) in zip(counts, test.probabilities) {
      let deviation = (p * (1 - p) / Float(draws)).squareRoot()
      #expect(abs(Float(count) / Float(draws) - p) <= 5 * deviation + 1e-4)
    }
  }

  /// The filters look at the likeliest tokens alone; which are left must be what sorting all of them says.
  @Test(arguments: [0.5, 3, 30] as [Float]) func filtersOfLargeVocabularies(spread: Float) {
    var random = SplitMix64(seed: 11)
    var logits = (0..<3000).map { _ in Float.random(in: -1...1, using: &random) * spread }
    for i in stride(from: 0, to: 3000, by: 7) { logits[i] = -.infinity }  // not allowed
    for i in 0..<40 { logits[5 * i + 1] = logits[1] }  // equal ones
    func left(_ options: GenerationOptions) -> [Int] {
      let probabilities = Sampler(options).probabilities(logits, after: [])
      return probabilities.indices.filter { probabilities[$0] > 0 }
    }
    let order = logits.indices.sorted { (logits[$0], $1) > (logits[$1], $0) }
    for k in [1, 5, 64, 256, 257, 1000] {
      #expect(left(.init(temperature: 50, topK: k)) == order.prefix(k).sorted())
    }
    let total = logits.reduce(0.0) { $0 + exp(Double($1)) }
    for p in [0.01, 0.5, 0.9, 0.999] as [Float] {
      var (mass, count) = (0.0, 0)
      while mass < Double(p) * total * (1 - 1e-6) {
        mass += exp(Double(logits[order[count]]))
        count += 1
      }
      let found = left(.init(temperature: 50, topP: p))
      // Rounding, and those that are as likely as the last.
      let same = order.filter { logits[$0] == logits[order[count - 1]] }.count
      #expect(found.count >= count && found.count <= count + same + 1, "\(p)")
      #expect(Set(order.prefix(count)).isSubset(of: found))
    }
  }

  @Test func aSeedDrawsTheSameAgain() {
    let logits = (0..<50).map { Float($0 % 7) }
    func draws(_ seed: UInt64?) -> [Int] {
      var sampler = Sampler(.init(temperature: 1, seed: seed))
      return (0..<40).map { _ in sampler.pick(logits, after: []) }
    }
    #expect(draws(1) == draws(1))
    #expect(draws(1) != draws(2))
    #expect(draws(nil) != draws(nil))
  }

  /// Published test vector of SplitMix64, seed 1234567.
  @Test func splitMix64() {
    var random = SplitMix64(seed: 1_234_567)
    #expect(random.next() == 6_457_827_717_110_365_317)
    #expect(random.next() == 3_203_168_211_198_807_973)
  }

  @Test func ofEqualLogitsTheFirst() {
    var sampler = Sampler(.init())
    #expect(sampler.pick([1, 3, 3, 2], after: []) == 1)
  }

  @Test func optionsOutOfRangeAreRefused() async throws {
    try GenerationOptions().check()
    try GenerationOptions(maxTokens: 0, temperature: 2, topK: 3, topP: 0.1, minP: 1, repetitionPenalty: 0.5)
      .check()
    for bad: GenerationOptions in [
      .init(maxTokens: -1), .init(temperature: -0.1), .init(temperature: .nan), .init(topK: -1),
      .init(topP: 0),
      .init(topP: 1.1), .init(topP: .nan), .init(minP: -0.1), .init(minP: 2), .init(repetitionPenalty: 0),
      .init(repetitionPenalty: .infinity),
    ] {
      guard case .invalidOption = await failure({ try bad.check() }) else {
        Issue.record("\(bad)")
        continue
      }
    }
  }
}
