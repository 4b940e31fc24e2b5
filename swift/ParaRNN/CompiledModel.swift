#if canImport(CoreML)
  import CoreML

  /// Finds a model on disk, compiles it where needed and keeps what was compiled.
  struct CompiledModel {
    /// The .mlmodelc that is to be loaded.
    let url: URL
    /// The .mlpackage it was made from; nil if the model came compiled.
    private let source: URL?

    /// The folder whose tokenizer belongs to the model at `url`.
    static func folder(of url: URL) -> URL { url.deletingLastPathComponent() }

    /// The .mlpackage or .mlmodelc that `url` is, or that stands in the folder `url`.
    static func find(_ url: URL) throws -> URL {
      let url = url.standardizedFileURL
      let candidates =
        ["mlpackage", "mlmodelc"].contains(url.pathExtension)
        ? [url] : ["model.mlmodelc", "model.mlpackage"].map { url.appendingPathComponent($0) }
      guard let found = candidates.first(where: { FileManager.default.fileExists(atPath: $0.path) }) else {
        throw ParaRNNError.notFound(candidates.last!)
      }
      return found
    }

    /// - Parameter cache: where compiled models are kept.
    init(_ url: URL, cache: URL) async throws {
      try SystemRequirement.check(url)
      guard url.pathExtension == "mlpackage" else {
        self.url = url
        source = nil
        return
      }
      source = url
      self.url = cache.appendingPathComponent(try Self.key(url)).appendingPathExtension("mlmodelc")
      if !FileManager.default.fileExists(atPath: self.url.path) { try await compile() }
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
        removeOlder()
      } catch {
        throw ParaRNNError.cannotLoad(source, reason: error.localizedDescription)
      }
    }

    /// Remove what was made of the same package before it, or the system, changed.
    private func removeOlder() {
      let (cache, name) = (url.deletingLastPathComponent(), url.lastPathComponent)
      let prefix = name.dropLast("0123456789abcdef.mlmodelc".count)
      for other in (try? FileManager.default.contentsOfDirectory(atPath: cache.path)) ?? []
      where other.hasPrefix(prefix) && other != name {
        try? FileManager.default.removeItem(at: cache.appendingPathComponent(other))
      }
    }

    /// The caches folder of the user or the app.
    static func defaultCache() throws -> URL {
      try FileManager.default.url(
        for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true
      )
      .appendingPathComponent("mlx-pararnn")
    }

    /// The package's name and place, then what changes with each file's path, size and date, and with the system: a
    /// compiled model belongs to it.
    private static func key(_ package: URL) throws -> String {
      var place = Fingerprint()
      place.add(package.path)
      var hash = Fingerprint()
      hash.add(ProcessInfo.processInfo.operatingSystemVersionString)
      for file in try files(in: package) {
        let attributes = try FileManager.default.attributesOfItem(atPath: file.path)
        let date = (attributes[.modificationDate] as? Date)?.timeIntervalSince1970 ?? 0
        hash.add("\(file.path) \(attributes[.size] ?? 0) \(date)")
      }
      let name = package.deletingPathExtension().lastPathComponent
      return "\(name)-\(place.hexadecimal)-\(hash.hexadecimal)"
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

    /// Tells models apart: what the package says of itself, and a sample of the compiled weights.
    static func fingerprint(of compiled: URL, settings: String) -> String {
      var hash = Fingerprint()
      hash.add(settings)
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
