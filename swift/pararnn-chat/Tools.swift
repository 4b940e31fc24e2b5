#if canImport(CoreML)
  import Foundation
  import ParaRNN

  /// Questions to a model that uses tools: one, or a chat.
  func runWithTools(_ model: ParaRNNModel, _ arguments: Arguments) async throws {
    let chat = model.chat(system: arguments.system, functions: try .standard())
    if let prompt = arguments.prompt {
      report(try await answer(chat, prompt, arguments), model)
      return
    }
    say("/undo, /stats, /quit; Ctrl-C stops an answer.")
    let bell = isatty(2) == 0 ? "" : "\u{7}"
    let ringing = Task { for await sentence in chat.alarms() { say("\(bell)\(sentence)") } }
    defer { ringing.cancel() }
    var last: GenerationStatistics?
    while let line = await nextLine() {
      do {
        switch line {
        case "": continue
        case "/quit": return
        case "/undo": say("Taken back: \(try await chat.undo())")
        case "/stats": report(last, model)
        case _ where line.hasPrefix("/"): say("\(line) is no command.")
        default: last = try await answer(chat, line, arguments)
        }
      } catch is CancellationError {
        say("\n(stopped)")
      } catch {
        say("error: \(error.localizedDescription)")
      }
    }
  }

  private func answer(
    _ chat: ParaRNNChat, _ question: String, _ arguments: Arguments
  ) async throws -> GenerationStatistics? {
    let events = chat.events(respondingTo: question, options: arguments.options, limits: arguments.limits)
    try await stopping {
      var lines = ToolLines(showsAll: arguments.showsTools)
      for try await event in events {
        lines.show(event)
        if case .text(let piece) = event.kind { put(piece) }
      }
    }
    put("\n")
    return await events.statistics
  }

  /// What a terminal shows of the tools, on stderr: one dim line a turn before the answer, or all of it.
  private struct ToolLines {
    let showsAll: Bool
    private var summary = ToolSummary()
    private var thought = ""
    private var isFolded = false

    init(showsAll: Bool) { self.showsAll = showsAll }

    mutating func show(_ event: ToolEvent) {
      if showsAll { return showAll(event) }
      summary.add(event)
      switch event.kind {
      case .text, .finish:
        if !isFolded, isatty(2) != 0, let line = summary.line { say(dim(line)) }
        isFolded = true
      default: break
      }
    }

    private mutating func showAll(_ event: ToolEvent) {
      if case .thought(let text) = event.kind {
        thought += text
        return
      }
      if !thought.isEmpty { line("thinks", thought) }
      thought = ""
      switch event.kind {
      case .command(let command): line(command.action.rawValue, "pointer \(command.pointer)")
      case .observation(_, let name): line("sees", name)
      case .call(let name, let arguments): line("calls", "\(name) \(arguments)")
      case .result(let text, let failed): line(failed ? "fails" : "result", text)
      case .finish(let finish):
        line("ends", "\(finish.reason.rawValue); \(event.tokens) tokens, \(finish.made) of them made")
      case .text, .thought: break
      }
    }

    private func line(_ kind: String, _ text: String) {
      let spaces = String(repeating: " ", count: max(8 - kind.count, 0))
      say(dim("\(spaces)\(kind)  \(ToolSummary.printable(text))"))
    }

    private func dim(_ text: String) -> String { isatty(2) == 0 ? text : "\u{1B}[2m\(text)\u{1B}[0m" }
  }
#endif
