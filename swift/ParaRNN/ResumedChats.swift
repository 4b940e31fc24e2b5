#if canImport(CoreML)
  /// Chats that are found again by what was said in them, for callers that bring the whole conversation each time.
  ///
  /// A chat that has read a conversation goes on from its state; one that has also read what came after is copied and
  /// taken back to it. Only where there is neither is the conversation read from its beginning.
  package actor ResumedChats {
    private let model: ParaRNNModel
    private let functions: ToolFunctions
    /// The one used last is the last.
    private var kept: [ParaRNNChat] = []
    /// Each has a copy of its state for every answer that can be taken back.
    private static let most = 4

    package init(_ model: ParaRNNModel, functions: ToolFunctions = .init()) {
      self.model = model
      self.functions = functions
    }

    /// A chat after these messages, for one answer; to be given back by ``keep(_:)``.
    ///
    /// - Throws: ``ParaRNNError/wrongMessages(reason:)``, ``ParaRNNError/toolsMismatch(reason:)``
    package func take(after messages: [ChatMessage]) async throws -> ParaRNNChat {
      if messages.isEmpty { return model.chat(functions: functions) }
      let candidates = kept
      var longer: ParaRNNChat?
      for chat in candidates.reversed() {
        let said = await chat.messages
        if said == messages, let at = kept.firstIndex(where: { $0 === chat }) { return kept.remove(at: at) }
        let more = said.count - messages.count  // undone by two, a question and its answer
        if longer == nil, said.starts(with: messages), more.isMultiple(of: 2), await chat.undoable * 2 >= more
        {
          longer = chat
        }
      }
      if let longer, let at = kept.firstIndex(where: { $0 === longer }) {
        kept.remove(at: at)  // while it is copied nobody else may go on with it
        defer { keep(longer) }
        let copy = try await longer.branch()
        while await copy.messages.count > messages.count { try await copy.undo() }
        return copy
      }
      return try model.chat(messages: messages, functions: functions)
    }

    package func keep(_ chat: ParaRNNChat) { kept = kept.suffix(Self.most - 1) + [chat] }
  }
#endif
