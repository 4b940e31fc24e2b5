import Foundation

/// What can go wrong, each with one sentence that says what, where and what to do.
public enum ParaRNNError: Error, Sendable, Equatable {
  /// Nothing stands at this place.
  case notFound(URL)
  /// A model, but not one that mlx-pararnn wrote.
  case notAParaRNNPackage(URL)
  /// A package whose description this version of the library cannot read.
  case unreadableSettings(reason: String)
  /// The package needs a newer operating system than this one.
  case needsNewerSystem(URL, required: String)
  /// A file of a ``ModelDownload`` cannot be had, or is not what it should be.
  case downloadFailed(URL, reason: String)
  /// Core ML or Core AI refused to compile or load the model.
  case cannotLoad(URL, reason: String)
  /// No tokenizer stands beside the package and none was given.
  case missingTokenizer(URL)
  /// A tokenizer.json that is not a byte-level BPE, or not a tokenizer at all.
  case unreadableTokenizer(String, reason: String)
  /// The tokenizer has tokens that the model does not.
  case wrongVocabulary(tokenizer: Int, model: Int)
  /// A generation option outside its range.
  case invalidOption(String)
  /// The package gives only the likeliest token, so nothing can be sampled or held to a schema.
  case samplingNeedsLogits
  /// The package gives only the likeliest token, so it cannot be held to the protocol of tools.
  case toolsNeedLogits
  /// A model that uses tools has been asked in a way that is for others, or the other way round.
  case toolsMismatch(reason: String)
  /// No token can go on in a text that keeps the schema, or the tokenizer does not tell the bytes of its tokens.
  case schemaCannotBeKept
  /// A model, or its tokenizer, that text cannot be completed with.
  case cannotComplete(reason: String)
  /// A function that a model cannot be allowed to call.
  case invalidFunction(name: String, reason: String)
  /// There is nothing to read.
  case emptyPrompt
  /// A token id that the model does not have.
  case unknownToken(Int, vocabularySize: Int)
  /// The model's learned positions are used up.
  case noRoom(taken: Int, positions: Int)
  /// A prediction failed, or gave something else than the package promises.
  case predictionFailed(reason: String)
  /// The model has a chat template that the library has no ``ChatFormat`` for.
  case unknownChatTemplate
  /// Messages that are no conversation up to an answer.
  case wrongMessages(reason: String)
  /// There is no answer to take back.
  case nothingToUndo
  /// A stream was read from two places at once, or a chat was asked, saved or taken back while it was at one of
  /// these.
  case busy
  /// Data that ``ParaRNNChat/save()`` did not write, or that is damaged.
  case notASavedChat(reason: String)
  /// A conversation saved with another model.
  case savedWithAnotherModel
}

extension ParaRNNError: LocalizedError, CustomStringConvertible {
  public var errorDescription: String? { description }

  public var description: String {
    switch self {
    case .notFound(let url):
      "\(url.path) does not exist; give a .mlpackage, .mlmodelc, .aimodel or .aimodelc."
    case .notAParaRNNPackage(let url):
      "\(url.path) is not a model that `mlx-pararnn convert` wrote: its metadata lacks `pararnn`."
    case .unreadableSettings(let reason):
      "The package's description cannot be read: \(reason). Export it with a matching version of mlx-pararnn."
    case .needsNewerSystem(let url, let required):
      "\(url.lastPathComponent) needs \(required) or newer; export it for this system or update the system."
    case .downloadFailed(let url, let reason):
      "\(url.absoluteString) cannot be downloaded: \(reason). What has been received is kept for the next attempt."
    case .cannotLoad(let url, let reason):
      "\(url.path) cannot be loaded: \(reason)"
    case .missingTokenizer(let folder):
      "There is no tokenizer.json in \(folder.path); put it beside the model, or pass `tokenizer:`."
    case .unreadableTokenizer(let name, let reason):
      "\(name) cannot be used: \(reason). Pass another `tokenizer:`."
    case .wrongVocabulary(let tokenizer, let model):
      "The tokenizer has \(tokenizer) tokens and the model \(model); use the one the model was trained with."
    case .invalidOption(let reason):
      "A generation option is out of range: \(reason)."
    case .samplingNeedsLogits:
      "This package gives only the likeliest token; set temperature to 0, no penalty and no schema, or export without --argmax."
    case .toolsNeedLogits:
      "This package gives only the likeliest token, and tools need all logits; export without --argmax."
    case .toolsMismatch(let reason):
      "This model cannot be asked so: \(reason)."
    case .schemaCannotBeKept:
      "No token of the vocabulary can follow where the schema is to be kept; the tokenizer must tell bytes(of:)."
    case .cannotComplete(let reason):
      "Text cannot be completed with this model: \(reason)."
    case .invalidFunction(let name, let reason):
      "The function \(name) cannot be allowed: \(reason)."
    case .emptyPrompt:
      "The prompt is empty; give at least one token."
    case .unknownToken(let token, let size):
      "The prompt holds token id \(token), but the model has ids 0 to \(size - 1); use its own tokenizer."
    case .noRoom(let taken, let positions):
      "The text takes \(taken) of the model's \(positions) learned positions; shorten it or start a new chat."
    case .predictionFailed(let reason):
      "A prediction failed: \(reason)"
    case .unknownChatTemplate:
      "The model's chat template is none that this library knows; pass `format:` to chat(system:format:)."
    case .wrongMessages(let reason):
      "The messages must be of the user and the assistant in turn, a system prompt first if at all: \(reason)."
    case .nothingToUndo:
      "There is no answer to take back."
    case .busy:
      "This chat or stream is being used from elsewhere at this moment; wait for it."
    case .notASavedChat(let reason):
      "This is no chat that can be restored: \(reason)."
    case .savedWithAnotherModel:
      "This chat was saved with another model; load that model to go on with it."
    }
  }
}
