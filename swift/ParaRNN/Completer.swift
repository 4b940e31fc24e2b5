#if canImport(CoreML)
  import Foundation

  /// What comes next in a text that is being typed.
  public struct Completion: Sendable, Equatable {
    /// Some characters of a completion: those of one token, or of several that make up a character, or blanks and what
    /// comes after them.
    public struct Piece: Sendable, Equatable {
      public let text: String
      /// That they come, after all before them.
      public let probability: Double
    }

    public let pieces: [Piece]
    /// How many tokens the model has read for it.
    public let read: Int
    /// What comes after the prefix; "" where nothing is likely enough.
    public var text: String { pieces.map(\.text).joined() }
    /// That all of the text comes.
    public var probability: Double { pieces.reduce(1) { $0 * $1.probability } }
  }

  /// Completes a text that is being typed; one for each text.
  ///
  /// It keeps memories after the text's tokens, and after those that it tried or suggested last. Where the text has grown,
  /// shrunk or changed, it goes back to the last that stands, and what is new is read: a token where a character was typed
  /// or taken back, none where a suggestion was accepted.
  ///
  /// A text may end within a token: its last word is taken back, eight tokens of it at most, and all ways to spell it are
  /// followed together with what may come after it.
  ///
  /// ```swift
  /// let completer = try await Completer(model)
  /// let found = try await completer.complete("def main(")
  /// print(found.text, found.probability)
  /// ```
  public actor Completer {
    /// How many tokens are read at the end of a text of which nothing was read.
    public static let window = 2000

    static let bytesOfToken = 4  // of a text whose tokens are not known yet, at most
    static let recent = 32  // last tokens whose memories are all kept
    static let unsettled = 8  // words before a change that are made into tokens again, as it can join them
    static let healed = 8  // tokens at the end of a text that are taken back, at most
    static let expansions = 16  // ways to spell their text that are followed
    static let negligible = 0.01  // the share of all ways that need not be followed
    static let mostPaths = 64  // of what was tried or suggested
    static let blanks: Set<Character> = [" ", "\t", "\r", "\n", "\r\n"]  // with which no completion ends

    /// After some tokens.
    private struct Step {
      let snapshot: ParaRNNModel.Snapshot
      let probabilities: [Double]
    }

    private let model: ParaRNNModel
    private let vocabulary: ByteVocabulary
    private let window: Int
    private let positions: Int
    /// What goes before every text, and before one that is read from its beginning: in training an end goes before each.
    private let always: [Int]
    private let opening: [Int]

    private var text: [UInt8] = []
    /// Where in the text's UTF-8 begins what is read.
    private(set) var begin = 0
    /// Those of it, after the token that goes before a text.
    private(set) var tokens: [Int] = []
    private var words: [ByteVocabulary.Word] = []
    /// Memories after so many of the tokens.
    private var steps: [Int: Step] = [:]
    /// How many tokens come before the last word.
    private var base = 0
    /// Memories after those, and some more.
    private var paths: [[Int]: Step] = [:]
    private var count = 0
    private var isBusy = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

    /// - Parameter window: tokens at the end of a text that are read first. What is typed after them is added to that;
    ///   where most of the text is another, it begins anew.
    /// - Throws: ``ParaRNNError/cannotComplete(reason:)``
    public init(_ model: ParaRNNModel, window: Int = Completer.window) async throws {
      let settings = model.settings
      if settings.output == .token {
        throw ParaRNNError.cannotComplete(
          reason: "its package gives only the likeliest token; export without --argmax")
      }
      if let positions = settings.positions, positions < 8 * Self.expansions {
        throw ParaRNNError.cannotComplete(reason: "it has only \(positions) learned positions")
      }
      if window < 1 { throw ParaRNNError.invalidOption("window is \(window), below 1") }
      guard let vocabulary = ByteVocabulary(model.tokenizer, count: settings.vocabularySize) else {
        throw ParaRNNError.cannotComplete(
          reason: "its tokenizer is not byte-level, or changes what it reads, or does not tell its words")
      }
      self.model = model
      self.vocabulary = vocabulary
      positions = settings.positions ?? .max
      self.window = min(window, positions / 2)
      always = vocabulary.beginning
      opening = always.isEmpty ? Array(settings.endTokens.prefix(1)) : always
    }

    /// What comes after `prefix`, the text before the cursor.
    ///
    /// The likeliest token is added as long as all of them together are likely enough. Blanks and line breaks at the end
    /// are left out, since nobody sees them, and the next token may begin with another blank. Calls are answered one after
    /// the other; one whose task is cancelled ends early.
    ///
    /// - Parameters:
    ///   - maxTokens: after the word that the prefix ends within, at most.
    ///   - maxLines: lines, the prefix's last one among them; the last line's break is left out.
    ///   - minProbability: of all that is added, at least; 0 goes on to the end of the lines.
    /// - Throws: ``ParaRNNError``; `CancellationError`
    public func complete(
      _ prefix: String, maxTokens: Int = 32, maxLines: Int = 1, minProbability: Double = 0.3
    ) async throws -> Completion {
      if maxTokens < 1 { throw ParaRNNError.invalidOption("maxTokens is \(maxTokens), below 1") }
      if maxLines < 1 { throw ParaRNNError.invalidOption("maxLines is \(maxLines), below 1") }
      guard (0...1).contains(minProbability) else {
        throw ParaRNNError.invalidOption("minProbability is \(minProbability), not from 0 to 1")
      }
      while isBusy { await withCheckedContinuation { waiting.append($0) } }
      isBusy = true
      defer {
        isBusy = false
        waiting.forEach { $0.resume() }
        waiting = []
      }
      let before = count
      try follow(Array(prefix.utf8))
      if tokens.isEmpty { return Completion(pieces: [], read: 0) }
      let end = tokens.count
      let pieces = try await pieces(
        from: max(words.last?.token ?? end, end - Self.healed, 1), min(maxTokens, positions / 8), maxLines,
        minProbability)
      return Completion(pieces: pieces, read: count - before)
    }

    // MARK: - The text

    /// Take `new` in place of the text before, with the memories that still stand.
    private func follow(_ new: [UInt8]) throws {
      let common = zip(text, new).prefix { $0 == $1 }.count
      guard !words.isEmpty, common >= begin else { return try beginAnew(new) }
      let settled = max(0, (words.lastIndex { $0.byte <= common } ?? -1) + 1 - Self.unsettled)
      let word = words[settled]
      if new.count - word.byte > Self.bytesOfToken * window { return try beginAnew(new) }
      let (fresh, added) = try encode(new[word.byte...])
      if word.token + fresh.count > positions / 4 * 3 { return try beginAnew(new) }
      let same = word.token + zip(tokens[word.token...], fresh).prefix { $0 == $1 }.count
      tokens[word.token...] = fresh[...]
      words[settled...] =
        added.map { .init(byte: word.byte + $0.byte, token: word.token + $0.token) }[...]
      text = new
      steps = steps.filter { $0.key <= same }
      if base > same { paths = [:] }
    }

    private func beginAnew(_ new: [UInt8]) throws {
      var start = max(0, new.count - Self.bytesOfToken * window)
      if start > 0 {
        start = new[start..<(start + new.count) / 2].firstIndex(of: UInt8(ascii: "\n")) ?? start
        while new[start] & 0xC0 == 0x80 { start += 1 }  // inside a character
      }
      let (fresh, all) = try encode(new[start...])
      var kept = all.filter { $0.token >= fresh.count - window }
      var token = max(0, fresh.count - window)
      if kept.isEmpty || kept[0].token - token > window / 2 {  // the window begins within a long word
        var byte = fresh[..<token].reduce(0) { $0 + vocabulary.bytes[$1].count }
        while token < fresh.count, new[start + byte] & 0xC0 == 0x80 {
          byte += vocabulary.bytes[fresh[token]].count
          token += 1
        }
        kept.insert(.init(byte: byte, token: token), at: 0)
      }
      let first = kept[0]
      let before = start + first.byte > 0 ? always : opening
      (text, begin) = (new, start + first.byte)
      tokens = before + fresh[first.token...]
      words = kept.map { .init(byte: start + $0.byte, token: $0.token - first.token + before.count) }
      (steps, paths, base) = ([:], [:], 0)
    }

    private func encode(_ part: ArraySlice<UInt8>) throws -> (tokens: [Int], words: [ByteVocabulary.Word]) {
      guard let made = vocabulary.encode(part) else {
        throw ParaRNNError.cannotComplete(reason: "its tokenizer changes what it reads")
      }
      return made
    }

    // MARK: - What comes next

    private func pieces(
      from base: Int, _ maxTokens: Int, _ maxLines: Int, _ minProbability: Double
    ) async throws -> [Completion.Piece] {
      try await go(to: base)
      var pieces: [Completion.Piece] = []
      var (whole, probability) = (1.0, 1.0)  // of the pieces, and of what comes after them
      var blanks = ""  // after the pieces
      var lines = maxLines
      var (path, added, likely) = try await heal(Array(tokens[base...]))
      var held: [UInt8] = []
      for number in 0...maxTokens {
        if number > 0 {
          let probabilities = try await after(path).probabilities
          let token = probabilities.firstIndex(of: probabilities.max()!)!
          if vocabulary.bytes[token].isEmpty { break }
          path.append(token)
          (added, likely) = (vocabulary.bytes[token], probabilities[token])
        }
        probability *= likely
        guard whole * probability >= minProbability else { break }
        held += added
        guard let (text, rest) = Self.wholeCharacters(held) else { break }
        held = rest
        blanks += Self.inLines(text, &lines)
        let piece = String(blanks.reversed().drop { Self.blanks.contains($0) }.reversed())
        if !piece.isEmpty {
          pieces.append(.init(text: piece, probability: probability))
          (whole, probability) = (whole * probability, 1)
          blanks.removeFirst(piece.count)
        }
        if lines == 0 { break }
      }
      return pieces
    }

    /// Have the memory after the first `new` tokens.
    private func go(to new: Int) async throws {
      if new < base { paths = [:] }
      var path: [Int] = []
      // What was suggested and has been accepted is known.
      while base < new, let step = paths[path + [tokens[base]]] {
        path.append(tokens[base])
        base += 1
        keep(step, base)
      }
      if !path.isEmpty {
        let known = path.count
        paths = Dictionary(
          uniqueKeysWithValues: paths.filter { $0.key.starts(with: path) }.map {
            (Array($0.key.dropFirst(known)), $0.value)
          })
      }
      if base != new { paths = [:] }
      var read = steps.keys.filter { $0 <= new }.max() ?? 0
      while read < new {
        let (step, more) = try await predict(steps[read], tokens[read..<new])
        read += more
        keep(step, read)
      }
      base = new
    }

    /// Of memories further back than the last ones fewer are kept.
    private func keep(_ step: Step, _ place: Int) {
      steps[place] = step
      var last = 0
      let old = steps.keys.sorted().filter { $0 < place - Self.recent }
      for (this, next) in zip(old, old.dropFirst()) {
        if next - last <= (place - this) / 4 { steps[this] = nil } else { last = this }
      }
    }

    /// The likeliest tokens whose bytes begin with those of `tail`, and their bytes after these.
    ///
    /// Their probability is that among all tokens which begin so. The tail's own are followed first, then whatever is
    /// likeliest, until little is left.
    private func heal(_ tail: [Int]) async throws -> (path: [Int], added: [UInt8], probability: Double) {
      let text = tail.flatMap { vocabulary.bytes[$0] }
      if text.isEmpty { return ([], [], 1) }
      var waiting: [(isOwn: Bool, probability: Double, path: [Int])] = [(true, 1, [])]
      var best: (probability: Double, path: [Int], added: [UInt8]) = (-1, [], [])
      var mass = 0.0
      for _ in 0..<Self.expansions {
        let place = waiting.indices.min { a, b in
          let (a, b) = (waiting[a], waiting[b])
          if a.isOwn != b.isOwn { return a.isOwn }
          if a.probability != b.probability { return a.probability > b.probability }
          return a.path.lexicographicallyPrecedes(b.path)
        }
        guard let place else { break }
        if !waiting[place].isOwn, waiting.reduce(0, { $0 + $1.probability }) < Self.negligible * mass {
          break
        }
        let (_, probability, path) = waiting.remove(at: place)
        let rest = Array(text.dropFirst(path.reduce(0) { $0 + vocabulary.bytes[$1].count }))
        let probabilities = try await after(path).probabilities
        for token in vocabulary.beginning(with: rest) {
          let reached = probability * probabilities[token]
          mass += reached
          if reached > best.probability {
            best = (reached, path + [token], Array(vocabulary.bytes[token].dropFirst(rest.count)))
          }
        }
        for token in vocabulary.within(rest) {
          let longer = path + [token]
          let isOwn = longer.count < tail.count && tail.starts(with: longer)
          waiting.append((isOwn, probability * probabilities[token], longer))
        }
      }
      return (best.path, best.added, mass > 0 ? best.probability / mass : 0)
    }

    /// After the tokens before the last word, and those of `path`.
    private func after(_ path: [Int]) async throws -> Step {
      if path.isEmpty { return steps[base]! }
      if let step = paths[path] { return step }
      let before = try await after(Array(path.dropLast()))
      let (step, _) = try await predict(before, path.suffix(1))
      if paths.count >= Self.mostPaths { paths = [:] }
      paths[path] = step
      return step
    }

    /// Read the first of some tokens; also how many.
    private func predict(_ before: Step?, _ unread: ArraySlice<Int>) async throws -> (Step, Int) {
      try Task.checkCancellation()
      var memory: ParaRNNModel.Memory
      if let before {
        memory = try await model.memory(of: before.snapshot)
      } else {
        memory = await model.emptyMemory()
      }
      let prediction = try await model.predict(unread, at: memory.position, memory.state)
      memory.state = prediction.state
      memory.position += prediction.count
      count += prediction.count
      guard case .logits(let logits) = prediction.output else {
        throw ParaRNNError.predictionFailed(reason: "it gave no logits")
      }
      let most = Double(logits.max() ?? 0)
      let weights = logits.map { exp(Double($0) - most) }
      let sum = weights.reduce(0, +)
      guard sum.isFinite else { throw ParaRNNError.predictionFailed(reason: "its logits are no numbers") }
      let snapshot = try await model.snapshot(memory)
      return (Step(snapshot: snapshot, probabilities: weights.map { $0 / sum }), prediction.count)
    }

    /// The text of some bytes and what of a character follows it; nil if that is no UTF-8.
    static func wholeCharacters(_ bytes: [UInt8]) -> (String, [UInt8])? {
      for count in 0...min(3, bytes.count) {
        let (head, tail) = (bytes.dropLast(count), Array(bytes.suffix(count)))
        if let text = String(validating: head, as: UTF8.self), isBeginning(tail) { return (text, tail) }
      }
      return nil
    }

    /// Whether these bytes, at most three, are none or the beginning of a character.
    private static func isBeginning(_ bytes: [UInt8]) -> Bool {
      guard let lead = bytes.first else { return true }
      let length = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0
      let second: ClosedRange<UInt8> =
        switch lead {
        case 0xE0: 0xA0...0xBF
        case 0xED: 0x80...0x9F
        case 0xF0: 0x90...0xBF
        case 0xF4: 0x80...0x8F
        default: 0x80...0xBF
        }
      return bytes.count < length && bytes.dropFirst().prefix(1).allSatisfy(second.contains)
        && bytes.dropFirst(2).allSatisfy { $0 & 0xC0 == 0x80 }
    }

    /// What of `text` lies in so many lines; `lines` is then how many are left, 0 where the last has ended.
    static func inLines(_ text: String, _ lines: inout Int) -> String {
      var kept = String.UnicodeScalarView()
      for scalar in text.unicodeScalars {
        if lines == 1, scalar == "\r" || scalar == "\n" {
          lines = 0
          break
        }
        if scalar == "\n" { lines -= 1 }
        kept.append(scalar)
      }
      return String(kept)
    }
  }
#endif
