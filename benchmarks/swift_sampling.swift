// Milliseconds that Swift takes to choose a token of 50,432, by kind of sampling. Compiled by swift_sampling.sh.

@main struct SwiftSampling {
  static func main() {
    let count = 50_432
    var random = SplitMix64(seed: 1)
    // Sums of twelve uniform numbers: as good as normal ones, with a spread of 3, in float16's steps.
    let logits = (0..<count).map { _ -> Float in
      let sum = (0..<12).reduce(Float(-6)) { total, _ in total + Float.random(in: 0..<1, using: &random) }
      return (sum * 3 * 256).rounded() / 256
    }
    for (name, options) in [
      ("greedy", GenerationOptions()), ("temperature", .init(temperature: 0.7, seed: 1)),
      ("top-p 0.95", .init(temperature: 0.7, topP: 0.95, seed: 1)),
      ("top-k 64", .init(temperature: 0.7, topK: 64, seed: 1)),
      ("min-p 0.05", .init(temperature: 0.7, minP: 0.05, seed: 1)),
    ] {
      var sampler = Sampler(options)
      var best = Duration.seconds(3600)
      for _ in 0..<20 {
        best = min(best, ContinuousClock().measure { _ = sampler.pick(logits, after: [1, 2, 3]) })
      }
      print(name, Double(best.components.attoseconds) / 1e15)
    }
  }
}
