#if canImport(CoreML)
  import CoreML

  /// Finds a model on disk, compiles it where needed and keeps what was compiled.
  struct CompiledModel {
    /// The .mlmodelc that is to be loaded, or a package of Core AI's, which keeps itself what it makes of one.
    let url: URL
    /// The .mlpackage it was made from; nil if the model came compiled.
    private let source: URL?

    /// The folder whose tokenizer belongs to the model at `url`.
    static func folder(of url: URL) -> URL { url.deletingLastPathComponent() }

    /// The model that `url` is, or that stands in the folder `url`.
    static func find(_ url: URL) throws -> URL {
      let url = url.standardizedFileURL
      let candidates =
        ["mlpackage", "mlmodelc"].contains(url.pathExtension) || CoreAIPackage.isOne(url)
        ? [url]
        : ["model.mlmodelc", "model.aimodelc", "model.aimodel", "model.mlpackage"]
          .map { url.appendingPathComponent($0) }
      guard let found = candidates.first(where: { FileManager.default.fileExists(atPath: $0.path) }) else {
        throw ParaRNNError.notFound(candidates.last!)
      }
      return found
    }

    /// - Parameters:
    ///   - cache: where compiled models are kept.
    ///   - compiling: is called before one is compiled.
    init(_ url: URL, cache: URL, compiling: () -> Void) async throws {
      try SystemRequirement.check(url)
      guard url.pathExtension == "mlpackage" else {
        self.url = url
        source = nil
        return
      }
      source = url
      let key = try Self.key(url)
      let kept = Self.contents(of: cache).first { $0.hasSuffix("-\(key.content).mlmodelc") }
      self.url = cache.appendingPathComponent(kept ?? "\(key.name)-\(key.place)-\(key.content).mlmodelc")
      if kept == nil {
        compiling()
        try await compile()
      }
    }

    /// Compile anew what is in the cache; false for a model that came compiled.
    func recompile() async throws -> Bool {
      guard source != nil else { return false }
      try? FileManager.default.removeItem(at: url)
      try await compile()
      return true
    }

    private func compile() async throws {
      guard let source else { return }
      do {
        let made = try await MLModel.compileModel(at: source)
        defer { try? FileManager.default.removeItem(at: made) }
        try FileManager.default.createDirectory(
          at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
        do {
          try FileManager.default.moveItem(at: made, to: url)
        } catch  where FileManager.default.fileExists(atPath: url.path) {
          // Another process was faster; its result is the same.
        }
        leaveOutOfBackups()
        removeOlder()
      } catch {
        throw ParaRNNError.cannotLoad(source, reason: error.localizedDescription)
      }
    }

    /// Remove what another build of the system compiled, and what was made of the same package before it changed.
    private func removeOlder() {
      let (cache, name) = (url.deletingLastPathComponent(), url.lastPathComponent)
      // A name ends in three groups of 16 digits: place, system, contents.
      let place = name.dropLast(2 * 17 + ".mlmodelc".count)
      let system = "-\(Self.system)-"
      for other in Self.contents(of: cache) where other != name && other.hasSuffix(".mlmodelc") {
        let isOfAnotherSystem = !other.dropLast(16 + ".mlmodelc".count).hasSuffix(system)
        if other.hasPrefix(place) || isOfAnotherSystem {
          try? FileManager.default.removeItem(at: cache.appendingPathComponent(other))
        }
      }
    }

    private func leaveOutOfBackups() {
      #if canImport(Darwin)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true
        var folder = url.deletingLastPathComponent()
        try? folder.setResourceValues(values)
      #endif
    }

    private static func contents(of folder: URL) -> [String] {
      (try? FileManager.default.contentsOfDirectory(atPath: folder.path))?.sorted() ?? []
    }

    /// In the application support folder of the user or the app: the system empties the caches folder when it likes,
    /// and compiling takes long.
    static func defaultCache() throws -> URL {
      try FileManager.default.url(
        for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true
      )
      .appendingPathComponent("mlx-pararnn")
    }

    /// The build of the system: a compiled model belongs to it.
    static let system: String = {
      var hash = Fingerprint()
      hash.add(ProcessInfo.processInfo.operatingSystemVersionString)
      return hash.hexadecimal
    }()

    /// What a compiled package is kept by. Its content is that of its files, wherever they stand: an app's folder is
    /// another one after each update.
    private static func key(_ package: URL) throws -> (name: String, place: String, content: String) {
      var place = Fingerprint()
      place.add(package.path)
      var hash = FileHash()
      for file in try files(in: package) {
        let path = file.path.dropFirst(package.path.count)
        hash.add(Data("\(path) \(try FileHash.hexadecimal(of: file))\n".utf8))
      }
      let name = package.deletingPathExtension().lastPathComponent
      return (name, place.hexadecimal, "\(system)-\(hash.hexadecimal.prefix(16))")
    }

    /// Every regular file under `folder`, in a fixed order.
    static func files(in folder: URL) throws -> [URL] {
      guard
        let names = FileManager.default.enumerator(
          at: folder, includingPropertiesForKeys: [.isRegularFileKey])
      else { throw ParaRNNError.notFound(folder) }
      return names.compactMap { $0 as? URL }
        .filter { (try? $0.resourceValues(forKeys: [.isRegularFileKey]).isRegularFile) == true }
        .sorted { $0.path < $1.path }
    }

    /// Tells models apart by their weights and the form of their memory, whatever else an export says of itself. A
    /// package without a digest of its weights is told by what it says of them and by a sample of the compiled ones.
    static func fingerprint(of compiled: URL, settings: String) -> String {
      var hash = Fingerprint()
      let fields = (try? JSONSerialization.jsonObject(with: Data(settings.utf8))) as? [String: Any] ?? [:]
      let hasDigest = fields["weights_digest"] is String
      let own = ["cell", "states"] + (hasDigest ? ["weights_digest"] : ["parameters", "weights"])
      let told = fields.filter { own.contains($0.key) }
      hash.add((try? JSONSerialization.data(withJSONObject: told, options: .sortedKeys)) ?? Data())
      if hasDigest { return hash.hexadecimal }
      for file in (try? files(in: compiled)) ?? [] where file.lastPathComponent == "weight.bin" {
        guard let handle = try? FileHandle(forReadingFrom: file) else { continue }
        defer { try? handle.close() }
        let size = (try? handle.seekToEnd()) ?? 0
        for part in UInt64(0)..<64 {
          try? handle.seek(toOffset: size / 64 * part)
          hash.add((try? handle.read(upToCount: 256)) ?? Data())
        }
      }
      return hash.hexadecimal
    }
  }
#endif
