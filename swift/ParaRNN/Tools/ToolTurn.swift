import Foundation

/// What makes a turn's tokens: a model, or a record of one.
protocol TokenSource: Sendable {
  var vocabularySize: Int { get }

  /// Take the next tokens of the turn: fed ones, and those that were just chosen.
  func read(_ tokens: [Int]) async throws

  /// The next token; `allowed` is true where the protocol has a place for it.
  func choose(_ allowed: [Bool]) async throws -> Int
}

/// One turn of a model that uses tools: it makes tokens, and what they ask for is done and fed to it.
///
/// The events are computed as they are asked for, one token of the model after another.
actor ToolTurn {
  private let message: String
  private let tools: ToolProtocol
  private let source: any TokenSource
  private let functions: ToolFunctions
  private let limits: ToolLimits
  private let masks: Masks

  private var place = Place.thought
  private var unread: [Int]
  private var memory: PointerMemory
  private var decoder = UTF8Decoder()
  private var events: [ToolEvent] = []
  private var begin = ContinuousClock.now
  private var tokens = 0
  private var steps = 0
  private var made = 0
  private var calls = 0
  private var answered = 0
  private var edges = 0
  private var wordless = 0
  private var entries = 0
  private var result: String?
  private var said = ""
  private let check: ToolFunctions.AnswerCheck

  /// So often in a row may nothing be read where the message has ended, and so many commands for each entry of
  /// the memory may go by without a word: a model that goes on has lost its way.
  private static let mostEdges = 8
  private static let mostCommands = 30
  /// Bytes of a call, and six for each byte of the message, which may be escaped there.
  private static let mostWritten = 256
  static let lost = "I lost my place in that message and cannot answer it."

  /// Where in the turn the next token stands.
  private enum Place {
    case thought
    case answer
    /// The JSON of a call up to its arguments.
    case callName(Writing)
    case callArguments(name: String, Writing)
    /// After the JSON of a call.
    case callEnd(name: String, arguments: String)
    case over
  }

  private struct Writing {
    var matcher: GrammarMatcher
    var bytes: [UInt8] = []

    init(_ grammar: JSONGrammar) { matcher = GrammarMatcher(grammar) }
  }

  /// - Parameter message: what the user says.
  /// - Throws: ``ParaRNNError/wrongVocabulary(tokenizer:model:)``
  init(
    _ message: String, tools: ToolProtocol, source: any TokenSource, functions: ToolFunctions,
    limits: ToolLimits
  ) throws {
    self.message = ToolProtocol.plain(message)
    check = functions.checkAnswer(self.message)
    self.tools = tools
    self.source = source
    self.functions = functions
    self.limits = limits
    masks = try Masks(tools, vocabularySize: source.vocabularySize)
    unread = tools.render(message: message)
    memory = PointerMemory(unread, edge: tools[.edge])
  }

  /// The next event; nil after the last.
  func next() async throws -> ToolEvent? {
    if !unread.isEmpty {
      begin = .now
      try await source.read(unread)
      tokens = unread.count
      unread = []
    }
    while events.isEmpty {
      if case .over = place { return nil }
      try await step()
    }
    return events.removeFirst()
  }

  /// Whether the message has been read.
  var isRead: Bool { unread.isEmpty }

  // MARK: - Tokens

  /// One token of the model's, and what it asks for.
  private func step() async throws {
    if steps >= limits.steps { return finish(.steps) }
    if (ContinuousClock.now - begin).seconds > limits.seconds { return finish(.time) }
    let allowed = allowed
    let token = try await source.choose(allowed)
    guard allowed.indices.contains(token), allowed[token] else {
      throw ParaRNNError.predictionFailed(reason: "\(tools.name(token)) was chosen, which cannot stand here")
    }
    steps += 1
    made += 1
    tokens += 1
    if token != tools[.end] { try await source.read([token]) }
    if let command = tools.commands[token] { return try await obey(command) }
    switch place {
    case .thought where token == tools[.call]:
      memory.append(token)
      place = .callName(Writing(Self.callName))
    case .thought where token == tools[.answer]:
      emitRest()
      memory.append(token)
      place = .answer
    case .answer where token == tools[.end]:
      if hold(said, isAll: true) { return }
      if answered == 0 { finish(saying: Self.lost) } else { finish(.stop) }
    case .thought, .answer: takeText(token)
    case .callName(let writing): takeName(token, writing)
    case .callArguments(_, let writing)
    where writing.bytes.count > Self.mostWritten + 6 * message.utf8.count:
      finish(saying: Self.lost)
    case .callArguments(let name, let writing): takeArguments(token, name, writing)
    case .callEnd(let name, let arguments):
      memory.append(token)
      emit(.call(name: name, arguments: arguments))
      try await call(name, arguments)
      place = .thought
    case .over: break
    }
  }

  private var allowed: [Bool] {
    switch place {
    case .thought: masks.thinking
    case .answer: masks.answering
    case .callName(let writing), .callArguments(_, let writing):
      masks.writing(writing.matcher.allowed, tools.byteIDs)
    case .callEnd, .over: masks.onlyResult
    }
  }

  /// A byte of a thought or of the answer.
  private func takeText(_ token: Int) {
    memory.append(token)
    let piece = decoder.append(tools.bytes[token]!)
    guard case .answer = place else { return emitText(piece) }
    if !piece.isEmpty && hold(said + piece, isAll: false) { return }
    emitText(piece)
    answered += 1
    if answered >= limits.answer { finish(.length) }
  }

  /// End an answer that is not what it has to be.
  private func hold(_ said: String, isAll: Bool) -> Bool {
    guard result == nil, let sentence = check(said, isAll) else { return false }
    _ = decoder.finish()
    finish(saying: sentence)
    return true
  }

  private func takeName(_ token: Int, _ writing: Writing) {
    let writing = written(token, writing)
    guard writing.matcher.isStopped else {
      place = .callName(writing)
      return
    }
    let name = String(
      decoding: writing.bytes.dropFirst(Self.beforeName.utf8.count).dropLast(Self.afterName.utf8.count),
      as: UTF8.self)
    let arguments = functions[name]?.schema.grammar ?? .anyObject
    place = .callArguments(name: name, Writing(.sequence([arguments, .text("}")])))
  }

  private func takeArguments(_ token: Int, _ name: String, _ writing: Writing) {
    let writing = written(token, writing)
    place =
      writing.matcher.isStopped
      ? .callEnd(name: name, arguments: String(decoding: writing.bytes.dropLast(), as: UTF8.self))
      : .callArguments(name: name, writing)
  }

  private func written(_ token: Int, _ writing: Writing) -> Writing {
    memory.append(token)
    var writing = writing
    writing.bytes.append(tools.bytes[token]!)
    writing.matcher.take(tools.bytes[token]!)
    return writing
  }

  private func obey(_ command: PointerCommand) async throws {
    emit(.command(command))
    wordless = entries == memory.entries.count ? wordless + 1 : 0
    entries = memory.entries.count
    if wordless > Self.mostCommands * entries { return finish(saying: Self.lost) }
    switch command.action {
    case .right: memory.move(command.pointer, 1)
    case .left: memory.move(command.pointer, -1)
    case .last: memory.jumpToLast(command.pointer)
    case .read:
      let token = memory.read(command.pointer)
      try await feed([token])
      emit(.observation(token: token, name: tools.name(token)))
      edges = token == tools[.edge] ? edges + 1 : 0
      if edges == Self.mostEdges { finish(saying: Self.lost) }
    }
  }

  /// Run a function, and feed what comes of it.
  private func call(_ name: String, _ arguments: String) async throws {
    var outcome = ToolFunctions.error("no more than \(limits.calls) calls in a turn")
    if calls < limits.calls {
      calls += 1
      var sentence = functions.instead(message, name, arguments)
      if sentence == nil { sentence = await functions.assistant?.instead(message, name, arguments) }
      if let sentence {
        outcome = .init(text: sentence, failed: true)
      } else {
        outcome = await functions.call(name, arguments)
      }
    }
    let fed = tools.render(result: outcome.text)
    for token in fed { memory.append(token) }
    try await feed(fed)
    result = outcome.text
    emit(.result(outcome.text, failed: outcome.failed))
  }

  private func feed(_ fed: [Int]) async throws {
    try await source.read(fed)
    steps += fed.count
    tokens += fed.count
  }

  // MARK: - Events

  private func emit(_ kind: ToolEvent.Kind) { events.append(ToolEvent(tokens: tokens, kind: kind)) }

  private func emitText(_ text: String) {
    if text.isEmpty { return }
    guard case .answer = place else { return emit(.thought(text)) }
    said += text
    emit(.text(text))
  }

  /// A character that has not been completed.
  private func emitRest() { emitText(decoder.finish()) }

  private func finish(saying sentence: String) {
    emitRest()
    var (sentence, reason) = (sentence, ToolEvent.Finish.Reason.stop)
    if let result, answered == 0 {
      sentence = result  // what was done is told
    } else if sentence == Self.lost {
      sentence = (result == nil ? check("", true) : nil) ?? Self.lost
      if sentence == Self.lost { reason = .lost }
    }
    let goesOn = sentence.unicodeScalars.starts(with: said.unicodeScalars)
    let rest = String(String.UnicodeScalarView(sentence.unicodeScalars.dropFirst(said.unicodeScalars.count)))
    emit(.text(goesOn ? rest : "\n\(sentence)"))
    finish(reason)
  }

  private func finish(_ reason: ToolEvent.Finish.Reason) {
    emitRest()
    emit(.finish(.init(reason: reason, made: made, calls: calls)))
    place = .over
  }

  // MARK: - What may stand where

  private static let beforeName = #"{"name":""#
  private static let afterName = #"","arguments":"#

  private static let callName: JSONGrammar = {
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"
    return .sequence([
      .text(beforeName), .repeated(.bytes(ByteSet(letters.utf8)), least: 1, most: 64), .text(afterName),
    ])
  }()

  private struct Masks {
    let thinking: [Bool]
    let answering: [Bool]
    let commands: [Bool]
    let onlyResult: [Bool]

    init(_ tools: ToolProtocol, vocabularySize: Int) throws {
      let free = tools.byteIDs + tools.commands.keys
      let highest = max(free.max()!, tools.marks.values.max()!)
      if highest >= vocabularySize {
        throw ParaRNNError.wrongVocabulary(tokenizer: highest + 1, model: vocabularySize)
      }
      func mask(_ tokens: [Int]) -> [Bool] {
        var mask = [Bool](repeating: false, count: vocabularySize)
        for token in tokens { mask[token] = true }
        return mask
      }
      thinking = mask(free + [tools[.call], tools[.answer]])
      answering = mask(free + [tools[.end]])
      commands = mask(Array(tools.commands.keys))
      onlyResult = mask([tools[.result]])
    }

    func writing(_ bytes: ByteSet, _ byteIDs: [Int]) -> [Bool] {
      var mask = commands
      for byte in UInt8.min...UInt8.max where bytes.contains(byte) { mask[byteIDs[Int(byte)]] = true }
      return mask
    }
  }
}
