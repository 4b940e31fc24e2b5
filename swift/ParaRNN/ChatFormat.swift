import Foundation

/// The text that stands around what is said in a chat.
public struct ChatFormat: Sendable, Equatable {
  /// Before the first question where there is no system prompt.
  public var beginning: String
  /// False if the model knows no system prompt.
  public var takesSystemPrompt: Bool
  public var beforeSystem: String
  public var afterSystem: String
  public var beforeUser: String
  /// Ends with what makes the model answer.
  public var afterUser: String
  /// Between that and an earlier answer, where the model begins answers with a space, for instance.
  public var beforeAnswer: String
  /// After each answer, before what the user says next.
  public var afterAnswer: String
  /// True to let the tokenizer put its own special tokens (a beginning of text) before the first turn.
  public var addsSpecialTokens: Bool
  /// Whose messages are read without the white space around them.
  public var trimmed: Set<ChatMessage.Role>

  public init(
    beforeSystem: String, afterSystem: String, beforeUser: String, afterUser: String, afterAnswer: String,
    addsSpecialTokens: Bool = false, beginning: String = "", takesSystemPrompt: Bool = true,
    beforeAnswer: String = "", trimmed: Set<ChatMessage.Role> = []
  ) {
    self.beginning = beginning
    self.takesSystemPrompt = takesSystemPrompt
    self.beforeSystem = beforeSystem
    self.afterSystem = afterSystem
    self.beforeUser = beforeUser
    self.afterUser = afterUser
    self.beforeAnswer = beforeAnswer
    self.afterAnswer = afterAnswer
    self.trimmed = trimmed
    self.addsSpecialTokens = addsSpecialTokens
  }

  /// Text as it is typed, for models that were not trained on chats; a system prompt is read as a first line.
  public static let plain = ChatFormat(
    beforeSystem: "", afterSystem: "\n", beforeUser: "", afterUser: "", afterAnswer: "",
    addsSpecialTokens: true)

  /// `<|im_start|>role ... <|im_end|>`
  public static let chatML = ChatFormat(
    beforeSystem: "<|im_start|>system\n", afterSystem: "<|im_end|>\n", beforeUser: "<|im_start|>user\n",
    afterUser: "<|im_end|>\n<|im_start|>assistant\n", afterAnswer: "<|im_end|>\n")

  /// The messages of a conversation from its beginning, the last of them a question.
  ///
  /// - Throws: ``ParaRNNError/wrongMessages(reason:)`` for a system prompt that the model does not take.
  func text(of messages: [ChatMessage]) throws -> String {
    let hasSystemPrompt = messages.first?.role == .system
    if hasSystemPrompt && !takesSystemPrompt {
      throw ParaRNNError.wrongMessages(reason: "the model's chat template takes no system prompt")
    }
    return (hasSystemPrompt ? "" : beginning) + messages.map { text(of: $0) }.joined()
  }

  /// One message with what stands around it.
  func text(of message: ChatMessage) -> String {
    let isTrimmed = trimmed.contains(message.role)
    let said = isTrimmed ? message.text.trimmingCharacters(in: .whitespacesAndNewlines) : message.text
    return switch message.role {
    case .system: beforeSystem + said + afterSystem
    case .user: beforeUser + said + afterUser
    case .assistant: beforeAnswer + said + afterAnswer
    }
  }

  /// The format of a model folder: ``plain`` without a chat template, ``chatML`` for such a one, else nil.
  static func found(in folder: URL) -> ChatFormat? {
    var template =
      (try? String(contentsOf: folder.appendingPathComponent("chat_template.jinja"), encoding: .utf8))
    if template == nil,
      let data = try? Data(contentsOf: folder.appendingPathComponent("tokenizer_config.json")),
      let config = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
    {
      let named = (config["chat_template"] as? [[String: Any]])?.first { $0["name"] as? String == "default" }
      template = config["chat_template"] as? String ?? named?["template"] as? String
    }
    guard let template else { return .plain }
    return template.contains("<|im_start|>") ? .chatML : nil
  }
}

/// One message of a chat.
public struct ChatMessage: Sendable, Equatable, Codable {
  public enum Role: String, Sendable, Codable { case system, user, assistant }
  public var role: Role
  public var text: String

  public init(_ role: Role, _ text: String) {
    self.role = role
    self.text = text
  }
}
