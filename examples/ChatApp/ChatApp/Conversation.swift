#if canImport(CoreML)
  import CoreML
  import Foundation
  import Observation
  import ParaRNN

  /// What the window shows of a conversation and its branches, and what its buttons do.
  @MainActor @Observable final class Conversation {
    /// Where a model may run, as the window offers it.
    enum Units: String, CaseIterable, Identifiable {
      case gpu = "GPU and CPU"
      case all = "All"
      case neuralEngine = "Neural Engine and CPU"
      case cpu = "CPU"
      var id: Self { self }
      fileprivate var forCoreML: MLComputeUnits {
        switch self {
        case .gpu: .cpuAndGPU
        case .all: .all
        case .neuralEngine: .cpuAndNeuralEngine
        case .cpu: .cpuOnly
        }
      }
    }

    /// How hot the device is, as far as it matters here.
    enum Heat { case fine, hot, tooHot }

    private struct Branch {
      let chat: ParaRNNChat
      var messages: [ChatMessage]
      /// As what it was kept last.
      var kept: Kept?

      struct Kept {
        let chat: Data
        let toolLines: [Int: String]
      }

      /// What tools were used for, by the message's place.
      var toolLines: [Int: String] = [:]
    }

    /// All branches as bytes.
    private struct Kept: Codable {
      var chats: [Data] = []
      var toolLines: [[Int: String]] = []
      var shown = 0
    }

    private(set) var isAnswering = false
    private(set) var isLoading = false
    private(set) var status = "No model yet"
    /// What came due of timers, alarms and reminders, until it is dismissed.
    private(set) var due: [String] = []
    private var branches: [Branch] = []
    /// The place of the branch that is shown.
    private(set) var shown = 0
    private var heat = Heat.fine
    private var answer: Task<Void, Never>?
    /// A sentence for each branch that the last ``leave()`` could not keep.
    private var lost: [String] = []

    var branchCount: Int { branches.count }
    var messages: [ChatMessage] { branches.isEmpty ? [] : branches[shown].messages }
    var toolLines: [Int: String] { branches.isEmpty ? [:] : branches[shown].toolLines }
    var canAsk: Bool { !branches.isEmpty && !isAnswering && !isLoading && heat != .tooHot }

    /// Load a model, and go on with what ``leave()`` gave if that was with this model.
    ///
    /// - Returns: whether the model is there.
    @discardableResult
    func load(_ url: URL, units: Units = .gpu, saved: Data? = nil) async -> Bool {
      guard !isLoading, !isAnswering else { return false }
      isLoading = true
      defer { isLoading = false }
      do {
        let model = try await ParaRNNModel(contentsOf: url, computeUnits: units.forCoreML) { stage in
          Task { @MainActor in self.tell(stage, url.lastPathComponent) }
        }
        let functions = try ToolFunctions.standard()
        let format = model.chatFormat ?? .plain
        let kept = saved.flatMap { try? PropertyListDecoder().decode(Kept.self, from: $0) } ?? Kept()
        var restored: [Branch] = []
        for (data, lines) in zip(kept.chats, kept.toolLines) {
          guard let chat = try? await model.chat(restoring: data, format: format, functions: functions) else {
            restored = []  // of another model, as the others
            break
          }
          restored.append(
            Branch(
              chat: chat, messages: await chat.messages, kept: .init(chat: data, toolLines: lines),
              toolLines: lines))
        }
        if restored.isEmpty {
          restored = [Branch(chat: model.chat(format: format, functions: functions), messages: [])]
        }
        branches = restored
        shown = restored.indices.contains(kept.shown) ? kept.shown : 0
        Task { await model.prewarm() }
        let used = Units.allCases.first { $0.forCoreML == model.computeUnits } ?? .cpu
        var told = lost
        lost = []
        told.append(
          "\(model.settings.parameters) parameters on \(used.rawValue), state \(model.settings.stateBytes) bytes"
        )
        if let count = await model.failedPrefill { told.append("reads fewer than \(count) tokens at once") }
        status = told.joined(separator: ", ")
        return true
      } catch {
        status = error.localizedDescription
        return false
      }
    }

    private func tell(_ stage: LoadingStage, _ name: String) {
      guard isLoading else { return }
      switch stage {
      case .checking: status = "Loading \(name) …"
      case .compiling: status = "Core ML compiles \(name), which it does once …"
      case .loading: status = "Loading \(name) for this device …"
      case .loaded: break
      }
    }

    func ask(_ text: String) {
      guard canAsk else { return }
      isAnswering = true
      let chat = branches[shown].chat
      branches[shown].messages += [ChatMessage(.user, text), ChatMessage(.assistant, "")]
      answer = Task {
        var failure: String?
        var statistics: GenerationStatistics?
        do {
          if chat.model.usesTools {
            statistics = try await answerWithTools(chat, text)
          } else {
            let stream = chat.respond(to: text, options: .init(temperature: 0.7, topP: 0.95))
            for try await piece in stream { try await show(piece) }
            statistics = await stream.statistics
          }
        } catch is CancellationError {
          // Stopped; what was said stays.
        } catch {
          failure = error.localizedDescription
        }
        branches[shown].messages = await chat.messages
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
        case .text(let piece): try await show(piece)
        case .call, .result, .finish: branches[shown].toolLines[place] = summary.line
        default: break
        }
      }
      return await events.statistics
    }

    /// Nothing runs ahead of the reader: who waits between two pieces lets a hot device cool.
    private func show(_ piece: String) async throws {
      branches[shown].messages[messages.count - 1].text += piece
      if heat == .hot { try await Task.sleep(for: .milliseconds(200)) }
    }

    func stop() { answer?.cancel() }

    /// Wait for the answer that is being made.
    func answered() async { await answer?.value }

    /// Take back the last question; returns it.
    func undo() async -> String? {
      guard canAsk else { return nil }
      let chat = branches[shown].chat
      let question = try? await chat.undo()
      branches[shown].messages = await chat.messages
      branches[shown].toolLines = toolLines.filter { $0.key < messages.count }
      return question
    }

    /// Go on in a copy of the conversation; the other stays as it is.
    func branch() async {
      guard canAsk else { return }
      do {
        var copy = branches[shown]
        copy = Branch(chat: try await copy.chat.branch(), messages: copy.messages, toolLines: copy.toolLines)
        branches.append(copy)
        shown = branches.count - 1
      } catch {
        status = error.localizedDescription
      }
    }

    /// Show another branch, by its place.
    func show(branch place: Int) {
      if !isAnswering, branches.indices.contains(place) { shown = place }
    }

    /// Stop an answer, since an app in the background has no GPU, and give all branches as bytes. Of one that cannot be
    /// saved ``status`` tells, and it is given as it was kept last, if it was; the others are given in any case.
    ///
    /// - Parameter saving: in the place of `save()`, for tests.
    func leave(saving: ((ParaRNNChat) async throws -> Data)? = nil) async -> Data? {
      stop()
      await answered()
      var kept = Kept()
      lost = []
      // As they are now: meanwhile another model may be loaded.
      for (place, branch) in branches.enumerated() {
        var last = branch.kept
        do {
          let data: Data
          if let saving { data = try await saving(branch.chat) } else { data = try await branch.chat.save() }
          last = Branch.Kept(chat: data, toolLines: branch.toolLines)
          if branches.indices.contains(place), branches[place].chat === branch.chat {
            branches[place].kept = last
          }
        } catch {
          lost.append("Branch \(place + 1) could not be kept: \(error.localizedDescription)")
        }
        guard let last else { continue }
        if place == shown { kept.shown = kept.chats.count }
        kept.chats.append(last.chat)
        kept.toolLines.append(last.toolLines)
      }
      if !lost.isEmpty { status = lost.joined(separator: ", ") }
      return kept.chats.isEmpty ? nil : try? PropertyListEncoder().encode(kept)
    }

    /// A hot device gets pauses between pieces of text; one that is too hot is asked nothing.
    func take(_ heat: Heat) {
      guard heat != self.heat else { return }
      self.heat = heat
      switch heat {
      case .fine: status = "Ready"
      case .hot: status = "The device is hot: answers come more slowly"
      case .tooHot:
        stop()
        status = "The device is too hot to answer; let it cool"
      }
    }

    /// Ask for what has come due until the task is cancelled; `ring` is called for each time that something has.
    func watch(every interval: Duration = .milliseconds(500), ring: () -> Void) async {
      while (try? await Task.sleep(for: interval)) != nil {
        var found: [String] = []
        for branch in branches {  // which have the same timers from before they parted
          let told = due + found
          found += await branch.chat.due().filter { !told.contains($0) }
        }
        if !found.isEmpty {
          due += found
          ring()
        }
      }
    }

    func dismissDue() { due = [] }
  }
#endif
