#if canImport(CoreML)
  import Foundation
  import Observation
  import ParaRNN

  /// What the window shows of a conversation, and what its buttons do.
  @MainActor @Observable final class Conversation {
    private(set) var messages: [ChatMessage] = []
    /// What tools were used for, by the message's place in ``messages``.
    private(set) var toolLines: [Int: String] = [:]
    private(set) var isAnswering = false
    private(set) var status = "No model yet"
    private var chat: ParaRNNChat?
    private var answer: Task<Void, Never>?

    var canAsk: Bool { chat != nil && !isAnswering }

    func load(_ url: URL) async {
      status = "Loading \(url.lastPathComponent), the first time takes a while …"
      do {
        let model = try await ParaRNNModel(contentsOf: url)
        chat = model.chat(format: model.chatFormat ?? .plain, functions: try .standard())
        messages = []
        toolLines = [:]
        Task { await model.prewarm() }
        status = "\(model.settings.parameters) parameters, state \(model.settings.stateBytes) bytes"
      } catch {
        status = error.localizedDescription
      }
    }

    func ask(_ text: String) {
      guard let chat, !isAnswering else { return }
      isAnswering = true
      messages += [ChatMessage(.user, text), ChatMessage(.assistant, "")]
      answer = Task {
        var failure: String?
        var statistics: GenerationStatistics?
        do {
          if chat.model.usesTools {
            statistics = try await answerWithTools(chat, text)
          } else {
            let stream = chat.respond(to: text, options: .init(temperature: 0.7, topP: 0.95))
            for try await piece in stream { messages[messages.count - 1].text += piece }
            statistics = await stream.statistics
          }
        } catch is CancellationError {
          // Stopped; what was said stays.
        } catch {
          failure = error.localizedDescription
        }
        messages = await chat.messages
        if let failure {
          status = failure
        } else if let statistics {
          let speed = statistics.tokensPerSecond.formatted(.number.precision(.fractionLength(1)))
          let memory = (ProcessMemory.bytes ?? 0) / 1_000_000
          status = "\(speed) tokens/s, \(memory) MB of memory"
        }
        isAnswering = false
      }
    }

    private func answerWithTools(_ chat: ParaRNNChat, _ text: String) async throws -> GenerationStatistics? {
      let place = messages.count - 1
      var summary = ToolSummary()
      let events = chat.events(respondingTo: text)
      for try await event in events {
        summary.add(event)
        switch event.kind {
        case .text(let piece): messages[place].text += piece
        case .call, .result, .finish: toolLines[place] = summary.line
        default: break
        }
      }
      return await events.statistics
    }

    func stop() { answer?.cancel() }

    /// Take back the last question; returns it.
    func undo() async -> String? {
      guard let chat, !isAnswering else { return nil }
      let question = try? await chat.undo()
      messages = await chat.messages
      toolLines = toolLines.filter { $0.key < messages.count }
      return question
    }
  }
#endif
