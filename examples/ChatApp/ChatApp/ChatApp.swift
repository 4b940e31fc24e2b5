import ParaRNN
import SwiftUI
import UniformTypeIdentifiers

#if canImport(UIKit)
  import AudioToolbox
#else
  import AppKit
#endif

@main struct ChatApp: App {
  var body: some Scene {
    WindowGroup { ChatView() }
  }
}

/// A chat with the model that was chosen last (a folder that `mlx-pararnn convert --to coreml` wrote), or with the one in
/// the app's bundle.
struct ChatView: View {
  @State private var conversation = Conversation()
  @State private var text = ""
  @State private var isChoosing = false
  @AppStorage("units") private var units = Conversation.Units.gpu
  @Environment(\.scenePhase) private var phase

  var body: some View {
    VStack {
      ScrollView {
        LazyVStack(alignment: .leading, spacing: 12) {
          ForEach(Array(conversation.messages.enumerated()), id: \.offset) { place, message in
            if let line = conversation.toolLines[place] {
              Text(line).font(.caption).foregroundStyle(.secondary).lineLimit(1).truncationMode(.middle)
            }
            MessageView(message: message)
          }
        }
        .padding()
      }
      .defaultScrollAnchor(.bottom)
      ForEach(Array(conversation.due.enumerated()), id: \.offset) { _, sentence in
        Label(sentence, systemImage: "bell.fill").onTapGesture { conversation.dismissDue() }
      }
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
        branches
        Menu("Model", systemImage: "gearshape") {
          Button("Choose a Folder", systemImage: "folder") { isChoosing = true }
          Picker("Runs on", selection: $units) {
            ForEach(Conversation.Units.allCases) { Text($0.rawValue).tag($0) }
          }
        }
        .disabled(conversation.isAnswering || conversation.isLoading)
      }
      .labelStyle(.iconOnly)
      .padding([.horizontal, .bottom])
    }
    .task {
      conversation.take(heat)  // of what was so before the app began nothing tells
      await loadRemembered()
    }
    .task { await conversation.watch(ring: ring) }
    .onChange(of: units) { Task { await loadRemembered() } }
    .onChange(of: phase) {
      if phase == .background { keep() }
    }
    .onReceive(NotificationCenter.default.publisher(for: ProcessInfo.thermalStateDidChangeNotification)) {
      _ in
      Task { @MainActor in conversation.take(heat) }
    }
    .fileImporter(isPresented: $isChoosing, allowedContentTypes: [.folder]) { result in
      guard case .success(let url) = result else { return }
      Task {
        let isOpen = url.startAccessingSecurityScopedResource()
        defer { if isOpen { url.stopAccessingSecurityScopedResource() } }
        if await conversation.load(url, units: units) { RememberedModel.remember(url) }
      }
    }
  }

  private var branches: some View {
    Menu("Branches", systemImage: "arrow.triangle.branch") {
      Button("New Branch") { Task { await conversation.branch() } }
      ForEach(0..<conversation.branchCount, id: \.self) { place in
        Button("Branch \(place + 1)\(place == conversation.shown ? " ✓" : "")") {
          conversation.show(branch: place)
        }
      }
    }
    .disabled(!conversation.canAsk)
  }

  private func ask() {
    guard conversation.canAsk, !text.isEmpty else { return }
    conversation.ask(text)
    text = ""
  }

  /// The model that was chosen last, else the bundle's; with the conversation as it was left.
  private func loadRemembered() async {
    let bundled = Bundle.main.url(forResource: "model", withExtension: "mlmodelc")
    guard let url = RememberedModel.url ?? bundled else { return }
    let isOpen = url.startAccessingSecurityScopedResource()
    defer { if isOpen { url.stopAccessingSecurityScopedResource() } }
    let saved = await conversation.leave() ?? (try? Data(contentsOf: RememberedModel.conversation))
    await conversation.load(url, units: units, saved: saved)
  }

  /// Keep the conversation, in the time that the system gives an app that goes to the background.
  private func keep() {
    let save: @MainActor () async -> Void = {
      if let data = await conversation.leave() {
        try? data.write(to: RememberedModel.conversation, options: .atomic)
      }
    }
    #if os(macOS)
      Task { await save() }
    #else
      ProcessInfo.processInfo.performExpiringActivity(withReason: "The conversation is kept") { expired in
        if expired { return }
        let done = DispatchSemaphore(value: 0)
        Task { @MainActor in
          await save()
          done.signal()
        }
        done.wait()
      }
    #endif
  }

  private var heat: Conversation.Heat {
    switch ProcessInfo.processInfo.thermalState {
    case .serious: .hot
    case .critical: .tooHot
    default: .fine
    }
  }

  private func ring() {
    #if canImport(UIKit)
      AudioServicesPlayAlertSound(1005)
    #else
      NSSound.beep()
    #endif
  }
}

/// One message, with the Markdown within its lines.
private struct MessageView: View {
  let message: ChatMessage

  var body: some View {
    Text(shown)
      .textSelection(.enabled)
      .padding(8)
      .background(message.role == .user ? Color.accentColor.opacity(0.2) : .clear, in: .rect(cornerRadius: 8))
      .frame(maxWidth: .infinity, alignment: message.role == .user ? .trailing : .leading)
  }

  private var shown: AttributedString {
    if message.text.isEmpty { return "…" }
    let plain = AttributedString(message.text)
    if message.role == .user { return plain }
    return
      (try? AttributedString(
        markdown: message.text, options: .init(interpretedSyntax: .inlineOnlyPreservingWhitespace))) ?? plain
  }
}

/// The folder that was chosen last, and the conversation with it.
@MainActor private enum RememberedModel {
  #if os(macOS)
    private static let making: URL.BookmarkCreationOptions = .withSecurityScope
    private static let reading: URL.BookmarkResolutionOptions = .withSecurityScope
  #else
    private static let making: URL.BookmarkCreationOptions = []
    private static let reading: URL.BookmarkResolutionOptions = []
  #endif

  static var conversation: URL { .documentsDirectory.appending(path: "conversation.pararnn") }

  static var url: URL? {
    guard let bookmark = UserDefaults.standard.data(forKey: "model") else { return nil }
    var isStale = false
    let url = try? URL(resolvingBookmarkData: bookmark, options: reading, bookmarkDataIsStale: &isStale)
    if let url, isStale { remember(url) }
    return url
  }

  /// To be called while access to the folder is open.
  static func remember(_ url: URL) {
    let bookmark = try? url.bookmarkData(
      options: making, includingResourceValuesForKeys: nil, relativeTo: nil)
    UserDefaults.standard.set(bookmark, forKey: "model")
  }
}
