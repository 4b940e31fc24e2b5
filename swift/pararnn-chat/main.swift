// pararnn-chat MODEL: chat with a package in the terminal, or continue one text and measure the speed.

import Foundation
import ParaRNN

let usage = """
  usage: pararnn-chat MODEL [options]

  MODEL is a .mlpackage, .mlmodelc or .aimodel, or the folder that `mlx-pararnn convert --to coreml` or `--to coreai`
  wrote.

    -p, --prompt TEXT          continue TEXT and stop; without it, a chat
    -m, --max-tokens N         at most so many tokens an answer (256)
    --temp T --top-k N --top-p P --min-p P --repetition-penalty R --seed N
    --system TEXT              what stands before the first turn
    --show-tools               show everything that a model with tools thinks, reads and calls
    --units all|cpu|gpu|ne     where the model may run (gpu); gpu and ne each with the CPU
    -h, --help

  In a chat: /undo, /save FILE, /load FILE, /stats, /quit; Ctrl-C stops an answer.
  """

/// What the command line says.
struct Arguments {
  var model = ""
  var prompt: String?
  var system: String?
  var limits = ToolLimits()
  var showsTools = false
  var units = "gpu"
  var options = GenerationOptions()

  init(_ words: [String]) throws {
    var words = words[...]
    while let word = words.popFirst() {
      func value() throws -> String {
        guard let next = words.popFirst() else { throw Wrong("\(word) needs a value") }
        return next
      }
      func number<T: LosslessStringConvertible>() throws -> T {
        let text = try value()
        guard let number = T(text) else { throw Wrong("\(word) \(text): not a number of that kind") }
        return number
      }
      switch word {
      case "-p", "--prompt": prompt = try value()
      case "-m", "--max-tokens":
        options.maxTokens = try number()
        limits.answer = options.maxTokens
      case "--temp": options.temperature = try number()
      case "--top-k": options.topK = try number()
      case "--top-p": options.topP = try number()
      case "--min-p": options.minP = try number()
      case "--repetition-penalty": options.repetitionPenalty = try number()
      case "--seed": options.seed = try number() as UInt64
      case "--system": system = try value()
      case "--show-tools": showsTools = true
      case "--units":
        units = try value()
        guard ["all", "cpu", "gpu", "ne"].contains(units) else {
          throw Wrong("--units \(units): all, cpu, gpu or ne")
        }
      case _ where word.hasPrefix("-") || !model.isEmpty:
        throw Wrong("\(word): not understood; --help lists the options")
      default: model = word
      }
    }
    if model.isEmpty { throw Wrong("which model? --help tells how to say it") }
  }
}

struct Wrong: Error {
  let text: String
  init(_ text: String) { self.text = text }
}

func say(_ text: String) { FileHandle.standardError.write(Data((text + "\n").utf8)) }

func put(_ text: String) { FileHandle.standardOutput.write(Data(text.utf8)) }

if CommandLine.arguments.contains(where: { ["-h", "--help"].contains($0) }) {
  print(usage)
  exit(0)
}
do {
  let arguments = try Arguments(Array(CommandLine.arguments.dropFirst()))
  #if canImport(CoreML)
    try await run(arguments)
  #else
    say("error: this system has no Core ML, so \(arguments.model) cannot be run; use a Mac")
    exit(1)
  #endif
} catch let wrong as Wrong {
  say("error: \(wrong.text)")
  exit(2)
} catch {
  say("error: \(error.localizedDescription)")
  exit(1)
}
