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
  /// being read, the conversation is as if it had not been asked. Where a prediction fails after that, as when an app
  /// goes to the background and loses the GPU, question and text are kept too: the next turn reads them again.
  public actor ParaRNNChat {
    public nonisolated let model: ParaRNNModel
    private let format: ChatFormat?
    private let functions: ToolFunctions
    /// What the standard functions remember.
    private let assistant: Assistant
    private var settled: [ChatMessage]
    /// How many of the last messages are not in the memory, since a prediction failed.
    private var unread = 0
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
      let unread: Int
      let before: ParaRNNModel.Snapshot
      let remembered: AssistantMemory
    }

    init(
      model: ParaRNNModel, format: ChatFormat?, functions: ToolFunctions, messages: [ChatMessage],
      unread: Int = 0, remembering kept: AssistantMemory = .init(), memory: ParaRNNModel.Memory? = nil
    ) {
      self.model = model
      self.format = format
      (self.functions, assistant) = functions.forChat(remembering: kept)
      self.memory = memory
      self.unread = unread
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
        guard let (question, generation) = current, await generation.standing != .unread else {
          return settled
        }
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
      unread = turn.unread
      await assistant.recall(turn.remembered)
      return question
    }

    /// Another conversation that goes on from here; what happens in either is unknown to the other.
    ///
    /// - Throws: ``ParaRNNError/busy``
    public func branch() async throws -> ParaRNNChat {
      if isBusy { throw ParaRNNError.busy }
      isBusy = true
      defer { isBusy = false }
      try await settle()
      let snapshot = try await model.snapshot(try await currentMemory())
      let other = ParaRNNChat(
        model: model, format: format, functions: functions, messages: settled, unread: unread,
        remembering: await assistant.kept, memory: try await model.memory(of: snapshot))
      await other.take(turns)
      return other
    }

    private func take(_ turns: [Turn]) { self.turns = turns }

    /// Sentences for the timers, alarms and reminders of ``ToolFunctions/standard(now:zone:seconds:)`` whose time has
    /// come since it was last asked for. Who shows them asks from time to time: nothing rings by itself.
    public func due() async -> [String] { await assistant.due() }

    /// The sentences of ``due()`` as their time comes; it ends with the task that reads it, or with the conversation.
    public nonisolated func alarms(every interval: Duration = .milliseconds(500)) -> AsyncStream<String> {
      AsyncStream { continuation in
        let task = Task { [weak self] in
          while (try? await Task.sleep(for: interval)) != nil, let sentences = await self?.due() {
            for sentence in sentences { continuation.yield(sentence) }
          }
          continuation.finish()
        }
        continuation.onTermination = { _ in task.cancel() }
      }
    }

    /// The whole memory of the conversation, and of the standard functions in it, for ``ParaRNNModel/chat(restoring:format:)``. What was said before cannot
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
        messages: settled, unread: unread, remembered: await assistant.kept, position: snapshot.position,
        pending: snapshot.pending, tensors: snapshot.tensors
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
          text, after: settled.suffix(unread), model: model, memory: memory, tools: tools,
          functions: functions, limits: limits,
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
      let turn = Turn(
        messages: settled, unread: unread, before: before, remembered: await assistant.kept)
      turns = turns.suffix(Self.undoLimit - 1) + [turn]
      current = (text, generation)
      return generation
    }

    /// End the answer in the making: keep what it said, or go back if its question was not even read.
    private func settle() async throws {
      guard let (question, generation) = current else { return }
      await generation.stop()
      current = nil
      switch await generation.standing {
      case .sound:
        memory = await generation.memory
        unread = 0
      case .textAlone:
        memory = try await model.memory(of: turns.last!.before)
        unread += 2
      case .unread:
        if let turn = turns.popLast() { memory = try await model.memory(of: turn.before) }
        return
      }
      settled += [ChatMessage(.user, question), ChatMessage(.assistant, await generation.text)]
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
      let next = format.afterAnswer + (settled.suffix(unread) + [question]).map(format.text(of:)).joined()
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
    /// How many of the last messages are not in the memory.
    let unread: Int
    /// What the standard functions remember.
    let remembered: AssistantMemory
    let position: Int
    let pending: Int?
    let tensors: [StateTensor]

    private static let magic = Data("ParaRNN chat 1\n".utf8)

    private struct Description: Codable {
      let model: String
      let messages: [ChatMessage]
      let unread: Int?
      let memory: String?
      let position: Int
      let pending: Int?
    }

    init(
      messages: [ChatMessage], unread: Int = 0, remembered: AssistantMemory = .init(), position: Int,
      pending: Int?, tensors: [StateTensor]
    ) {
      self.messages = messages
      self.unread = unread
      self.remembered = remembered
      self.position = position
      self.pending = pending
      self.tensors = tensors
    }

    func data(fingerprint: String) -> Data {
      let description = Description(
        model: fingerprint, messages: messages, unread: unread == 0 ? nil : unread,
        memory: remembered.text.isEmpty ? nil : remembered.text, position: position, pending: pending)
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
        (0..<settings.vocabularySize).contains(description.pending ?? 0),
        (0...description.messages.count).contains(description.unread ?? 0)
      else { throw Self.refuse("its memory is damaged") }
      var tensors: [StateTensor] = []
      for form in settings.states {
        tensors.append(StateTensor(form: form, bytes: Array(rest.prefix(form.byteCount))))
        rest = rest.dropFirst(form.byteCount)
      }
      guard tensors.allSatisfy(\.isFinite) else {
        throw Self.refuse("its memory holds numbers that are none")
      }
      do {
        remembered = try AssistantMemory(description.memory ?? "")
      } catch {
        throw Self.refuse("what its functions remember is damaged")
      }
      messages = description.messages
      unread = description.unread ?? 0
      position = description.position
      pending = description.pending
      self.tensors = tensors
    }
  }
#endif
