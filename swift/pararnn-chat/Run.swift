#if canImport(CoreML)
  import CoreML
  import Foundation
  import ParaRNN

  /// The whole command, once its arguments are known.
  func run(_ arguments: Arguments) async throws {
    let units: [String: MLComputeUnits] = [
      "all": .all, "cpu": .cpuOnly, "gpu": .cpuAndGPU, "ne": .cpuAndNeuralEngine,
    ]
    let model = try await ParaRNNModel(
      contentsOf: URL(fileURLWithPath: arguments.model), computeUnits: units[arguments.units]!)
    if model.computeUnits != units[arguments.units]! {
      let used = units.first { $0.value == model.computeUnits }?.key ?? "cpu"
      say("The model cannot be loaded for --units \(arguments.units): it runs on \(used).")
    }
    if let count = await model.failedPrefill {
      say(
        "Reading \(count) tokens at once has ended two processes on this device: prompts are read by fewer.")
    }
    if model.usesTools { return try await runWithTools(model, arguments) }
    if let prompt = arguments.prompt {
      let stream = model.generate(prompt, options: arguments.options)
      for try await piece in stream { put(piece) }
      put("\n")
      await report(stream, model)
      return
    }
    if model.chatFormat == nil {
      say("The model's chat template is none that is known here: what you type is continued as plain text.")
    }
    let format = model.chatFormat ?? .plain
    var chat = model.chat(system: arguments.system, format: format)
    var last: TextStream?
    say("/undo, /save FILE, /load FILE, /stats, /quit; Ctrl-C stops an answer.")
    while let line = await nextLine() {
      let words = line.split(separator: " ", maxSplits: 1).map(String.init)
      let file = words.count > 1 ? URL(fileURLWithPath: words[1]) : nil
      do {
        switch (words.first, file) {
        case (nil, _): continue
        case ("/quit", _): return
        case ("/undo", _): say("Taken back: \(try await chat.undo())")
        case ("/save", let file?):
          try await chat.save().write(to: file)
          say("Saved to \(file.path).")
        case ("/load", let file?):
          chat = try await model.chat(restoring: Data(contentsOf: file), format: format)
          say("Going on after \(await chat.messages.count) messages.")
        case ("/stats", _): await report(last, model)
        case (let word?, _) where word.hasPrefix("/"): say("\(word) is no command, or needs a file name.")
        default:
          let stream = chat.respond(to: line, options: arguments.options)
          last = stream
          try await stopping { for try await piece in stream { put(piece) } }
          put("\n")
        }
      } catch is CancellationError {
        say("\n(stopped)")
      } catch {
        say("error: \(error.localizedDescription)")
      }
    }
  }

  /// The next line; waiting for it keeps none of the threads that all tasks share.
  func nextLine() async -> String? {
    if isatty(0) != 0 { put("> ") }
    return await withCheckedContinuation { line in
      DispatchQueue.global().async { line.resume(returning: readLine()) }
    }
  }

  /// Run `body` in a task that Ctrl-C cancels.
  func stopping(_ body: @escaping @Sendable () async throws -> Void) async throws {
    let task = Task { try await body() }
    signal(SIGINT, SIG_IGN)
    let source = DispatchSource.makeSignalSource(signal: SIGINT)
    source.setEventHandler { task.cancel() }
    source.resume()
    defer {
      source.cancel()
      signal(SIGINT, SIG_DFL)
    }
    try await task.value
  }

  private func report(_ stream: TextStream?, _ model: ParaRNNModel) async {
    report(await stream?.statistics, model)
  }

  func report(_ statistics: GenerationStatistics?, _ model: ParaRNNModel) {
    if let s = statistics {
      say(
        String(
          format: "prompt %d tokens, %.1f/s; answer %d tokens, %.1f/s", s.promptTokens,
          s.promptTokensPerSecond,
          s.generatedTokens, s.tokensPerSecond))
    }
    let memory = ProcessMemory.bytes.map { "\($0 / 1_000_000) MB" } ?? "unknown"
    say("state \(model.settings.stateBytes) bytes; process memory \(memory)")
  }
#endif
