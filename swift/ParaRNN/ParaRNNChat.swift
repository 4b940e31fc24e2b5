#if canImport(CoreML)
  import Foundation

  /// A conversation with a model. Its whole memory is the recurrent state: what was said is never read again.
  ///
  /// ```swift
  /// let chat = model.chat(system: "Be brief.")
  /// for try await piece in chat.respond(to: "Hello") { print(piece, terminator: "") }
  /// let saved = try await chat.save()
  /// ```
  ///
  /// Leaving the loop early, or cancelling its task, keeps what has been said so far; while the question is still
  /// being read, the conversation is as if it had not been asked.
  public actor ParaRNNChat {
    public nonisolated let model: ParaRNNModel
    private let format: ChatFormat?
    private let functions: ToolFunctions
    private var settled: [ChatMessage]
    private var memory: ParaRNNModel.Memory?
    private var turns: [Turn] = []
    private var current: (question: String, generation: any Answering)?
    /// True while a question is begun, taken back or the conversation saved: the memory belongs to that alone.
    private var isBusy = false

    /// So many answers can be taken back; each costs a copy of the memory.
    public static let undoLimit = 64

    /// A question, and the conversation before it.
    private struct Turn {
      let messages: [ChatMessage]
      let before: ParaRNNModel.Snapshot
    }

    init(model: ParaRNNModel, system: String?, format: ChatFormat?, functions: ToolFunctions) {
      self.model = model
      self.format = format
      self.functions = functions
      settled = system.map { [ChatMessage(.system, $0)] } ?? []
    }

    init(
      model: ParaRNNModel, format: ChatFormat?, functions: ToolFunctions, messages: [ChatMessage],
      memory: ParaRNNModel.Memory?
    ) {
      self.model = model
      self.format = format
      self.functions = functions
      self.memory = memory
      settled = messages
    }

    /// Stream the answer to `text`.
    ///
    /// An answer that is still being read from elsewhere ends here, as if its reader had left.
    ///
    /// - Throws (while the stream is read): ``ParaRNNError``; `CancellationError` once the task is cancelled.
    public nonisolated func respond(to text: String, options: GenerationOptions = .init()) -> TextStream {
      TextStream {
        if self.model.usesTools { return try await self.beginWithTools(text, options, .init()) }
        return try await self.beginText(text, options)
      }
    }

    /// Stream all that happens while a model that ``ParaRNNModel/usesTools`` answers: calls, results, pieces of text.
    ///
    /// ``GenerationOptions/maxTokens`` is not read: ``ToolLimits`` say where a turn ends.
    ///
    /// - Throws (while the stream is read): ``ParaRNNError``; `CancellationError` once the task is cancelled.
    public nonisolated func events(
      respondingTo text: String, options: GenerationOptions = .init(), limits: ToolLimits = .init()
    ) -> ToolEvents {
      ToolEvents { try await self.beginWithTools(text, options, limits) }
    }

    /// What was said, an answer in the making included.
    public var messages: [ChatMessage] {
      get async {
        let settled = settled  // before the first await, that what is settled meanwhile is not there twice
        guard let (question, generation) = current, await generation.isSound else { return settled }
        return settled + [ChatMessage(.user, question), ChatMessage(.assistant, await generation.text)]
      }
    }

    /// True while an answer is being made: its stream has been begun, and neither ended nor was left for another.
    public var isResponding: Bool {
      get async {
        guard let (_, generation) = current else { return isBusy }
        return await generation.isGoingOn
      }
    }

    /// How many questions can be taken back.
    public var undoable: Int { turns.count }

    /// Take back the last question and its answer; returns the question.
    ///
    /// - Throws: ``ParaRNNError/nothingToUndo``, ``ParaRNNError/busy``
    @discardableResult
    public func undo() async throws -> String {
      if isBusy { throw ParaRNNError.busy }
      isBusy = true
      defer { isBusy = false }
      try await settle()
      guard let turn = turns.last else { throw ParaRNNError.nothingToUndo }
      memory = try await model.memory(of: turn.before)
      turns.removeLast()
      let question = settled.dropFirst(turn.messages.count).first?.text ?? ""
      settled = turn.messages
      return question
    }

    /// The whole memory of the conversation, for ``ParaRNNModel/chat(restoring:format:)``. What was said before cannot
    /// be taken back after it.
    ///
    /// - Throws: ``ParaRNNError/busy``
    public func save() async throws -> Data {
      if isBusy { throw ParaRNNError.busy }
      isBusy = true
      defer { isBusy = false }
      try await settle()
      let snapshot = try await model.snapshot(try await currentMemory())
      return SavedChat(
        messages: settled, position: snapshot.position, pending: snapshot.pending, tensors: snapshot.tensors
      ).data(fingerprint: model.fingerprint)
    }

    // MARK: - Turns

    private func currentMemory() async throws -> ParaRNNModel.Memory {
      if let memory { return memory }
      let empty = await model.emptyMemory()
      memory = empty
      return empty
    }

    private func beginText(_ text: String, _ options: GenerationOptions) async throws -> Generation {
      try await begin(text) { memory in
        let tokens = try tokens(of: text, memory)
        return try Generation(model: model, memory: memory, tokens: tokens, options: options)
      }
    }

    private func beginWithTools(
      _ text: String, _ options: GenerationOptions, _ limits: ToolLimits
    ) async throws -> ToolAnswer {
      guard let tools = model.tools else {
        throw ParaRNNError.toolsMismatch(reason: "it does not use tools; call respond(to:)")
      }
      if settled.first?.role == .system {
        throw ParaRNNError.toolsMismatch(reason: "a model that uses tools takes no system prompt")
      }
      return try await begin(text) { memory in
        try ToolAnswer(
          text, model: model, memory: memory, tools: tools, functions: functions, limits: limits,
          options: options)
      }
    }

    private func begin<A: Answering>(
      _ text: String, _ make: (ParaRNNModel.Memory) throws -> A
    ) async throws -> A {
      if isBusy { throw ParaRNNError.busy }
      isBusy = true
      defer { isBusy = false }
      try await settle()
      let memory = try await currentMemory()
      let before = try await model.snapshot(memory)
      let generation = try make(memory)
      turns = turns.suffix(Self.undoLimit - 1) + [Turn(messages: settled, before: before)]
      current = (text, generation)
      return generation
    }

    /// End the answer in the making: keep what it said, or go back if its question was not even read.
    private func settle() async throws {
      guard let (question, generation) = current else { return }
      await generation.stop()
      current = nil
      if await generation.isSound {
        memory = await generation.memory
        settled += [ChatMessage(.user, question), ChatMessage(.assistant, await generation.text)]
      } else if let turn = turns.popLast() {
        memory = try await model.memory(of: turn.before)
      }
    }

    /// What the model has to read before it answers `text`: this turn alone.
    private func tokens(of text: String, _ memory: ParaRNNModel.Memory) throws -> [Int] {
      guard let format else { throw ParaRNNError.unknownChatTemplate }
      let tokenizer = model.tokenizer
      let question = ChatMessage(.user, text)
      guard memory.position > 0 else {
        let text = try format.text(of: settled + [question])
        return tokenizer.encode(text, addingSpecialTokens: format.addsSpecialTokens)
      }
      let next = format.afterAnswer + format.text(of: question)
      var tokens = tokenizer.encode(next, addingSpecialTokens: false)
      // The model ended its answer itself, with the token that the format puts there.
      if let pending = memory.pending, model.settings.endTokens.contains(pending), tokens.first == pending {
        tokens.removeFirst()
      }
      return tokens
    }
  }

  extension ParaRNNChat {
    /// What was said in a conversation that ``save()`` gave, whichever model said it. Another model goes on from there
    /// by ``ParaRNNModel/chat(messages:format:)``, which reads it all again.
    ///
    /// - Throws: ``ParaRNNError/notASavedChat(reason:)``
    public static func messages(in saved: Data) throws -> [ChatMessage] { try SavedChat.messages(in: saved) }
  }

  /// A conversation as bytes: a line that names the format, the fingerprint of all that follows in hexadecimal digits,
  /// the length of a JSON description (eight bytes, little-endian), the description, each tensor of the memory.
  struct SavedChat {
    let messages: [ChatMessage]
    let position: Int
    let pending: Int?
    let tensors: [StateTensor]

    private static let magic = Data("ParaRNN chat 1\n".utf8)

    private struct Description: Codable {
      let model: String
      let messages: [ChatMessage]
      let position: Int
      let pending: Int?
    }

    init(messages: [ChatMessage], position: Int, pending: Int?, tensors: [StateTensor]) {
      self.messages = messages
      self.position = position
      self.pending = pending
      self.tensors = tensors
    }

    func data(fingerprint: String) -> Data {
      let description = Description(
        model: fingerprint, messages: messages, position: position, pending: pending)
      let encoder = JSONEncoder()
      encoder.outputFormatting = .sortedKeys
      // Strings and whole numbers always encode.
      let json = try! encoder.encode(description)
      var data = Data()
      withUnsafeBytes(of: UInt64(json.count).littleEndian) { data.append(contentsOf: $0) }
      data.append(json)
      for tensor in tensors { data.append(contentsOf: tensor.bytes) }
      return Self.magic + Self.sum(data) + data
    }

    private static func sum(_ data: Data) -> Data {
      var sum = Fingerprint()
      sum.add(data)
      return Data(sum.hexadecimal.utf8)
    }

    /// What any save says, whichever model wrote it.
    static func messages(in data: Data) throws -> [ChatMessage] { try parts(of: data).description.messages }

    private static func refuse(_ reason: String) -> ParaRNNError { .notASavedChat(reason: reason) }

    private static func parts(of data: Data) throws -> (description: Description, memory: Data) {
      guard data.starts(with: magic) else { throw refuse("save() did not write it") }
      var rest = data.dropFirst(magic.count)
      guard rest.count >= 16 + 8 else { throw refuse("it is cut off") }
      let sum = Data(rest.prefix(16))
      rest = rest.dropFirst(16)
      guard sum == Self.sum(rest) else { throw refuse("it is damaged or cut off") }
      let length = rest.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
      rest = rest.dropFirst(8)
      guard length <= UInt64(rest.count) else { throw refuse("it is cut off") }
      let json = Data(rest.prefix(Int(length)))
      // First read as JSON at all: JSONDecoder stops the process at some texts that are none.
      guard (try? JSONSerialization.jsonObject(with: json)) != nil,
        let description = try? JSONDecoder().decode(Description.self, from: json)
      else { throw refuse("its description is damaged") }
      return (description, rest.dropFirst(Int(length)))
    }

    init(data: Data, settings: PackageSettings, fingerprint: String) throws {
      let (description, memory) = try Self.parts(of: data)
      guard description.model == fingerprint else { throw ParaRNNError.savedWithAnotherModel }
      var rest = memory
      guard rest.count == settings.stateBytes, (0...Int(Int32.max)).contains(description.position),
        (0..<settings.vocabularySize).contains(description.pending ?? 0)
      else { throw Self.refuse("its memory is damaged") }
      var tensors: [StateTensor] = []
      for form in settings.states {
        tensors.append(StateTensor(form: form, bytes: Array(rest.prefix(form.byteCount))))
        rest = rest.dropFirst(form.byteCount)
      }
      guard tensors.allSatisfy(\.isFinite) else {
        throw Self.refuse("its memory holds numbers that are none")
      }
      messages = description.messages
      position = description.position
      pending = description.pending
      self.tensors = tensors
    }
  }
#endif
