import ParaRNN
import SwiftUI
import UniformTypeIdentifiers

@main struct ChatApp: App {
  var body: some Scene {
    WindowGroup { ChatView() }
  }
}

/// A chat with the model in the app's bundle (model.mlpackage or model.mlmodelc, tokenizer.json beside it), or with
/// one from a folder that `mlx-pararnn convert --to coreml` wrote.
struct ChatView: View {
  @State private var conversation = Conversation()
  @State private var text = ""
  @State private var isChoosing = false

  var body: some View {
    VStack {
      ScrollView {
        LazyVStack(alignment: .leading, spacing: 12) {
          ForEach(Array(conversation.messages.enumerated()), id: \.offset) { place, message in
            if let line = conversation.toolLines[place] {
              Text(line).font(.caption).foregroundStyle(.secondary).lineLimit(1).truncationMode(.middle)
            }
            Text(message.text.isEmpty ? "…" : message.text)
              .textSelection(.enabled)
              .padding(8)
              .background(
                message.role == .user ? Color.accentColor.opacity(0.2) : .clear, in: .rect(cornerRadius: 8)
              )
              .frame(maxWidth: .infinity, alignment: message.role == .user ? .trailing : .leading)
          }
        }
        .padding()
      }
      .defaultScrollAnchor(.bottom)
      Text(conversation.status).font(.caption).foregroundStyle(.secondary)
      HStack {
        TextField("Say something", text: $text, axis: .vertical)
          .textFieldStyle(.roundedBorder)
          .onSubmit(ask)
        if conversation.isAnswering {
          Button("Stop", systemImage: "stop.fill", action: conversation.stop)
        } else {
          Button("Send", systemImage: "arrow.up", action: ask).disabled(!conversation.canAsk || text.isEmpty)
        }
        Button("Undo", systemImage: "arrow.uturn.backward") {
          Task { text = await conversation.undo() ?? text }
        }
        .disabled(!conversation.canAsk || conversation.messages.isEmpty)
        Button("Model", systemImage: "folder") { isChoosing = true }.disabled(conversation.isAnswering)
      }
      .labelStyle(.iconOnly)
      .padding([.horizontal, .bottom])
    }
    .task {
      if let url = Bundle.main.url(forResource: "model", withExtension: "mlmodelc") {
        await conversation.load(url)
      }
    }
    .fileImporter(isPresented: $isChoosing, allowedContentTypes: [.folder]) { result in
      guard case .success(let url) = result else { return }
      Task {
        let isOpen = url.startAccessingSecurityScopedResource()
        await conversation.load(url)
        if isOpen { url.stopAccessingSecurityScopedResource() }
      }
    }
  }

  private func ask() {
    guard conversation.canAsk, !text.isEmpty else { return }
    conversation.ask(text)
    text = ""
  }
}
