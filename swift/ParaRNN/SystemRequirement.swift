import Foundation

/// Which system a model needs, by the number of Core ML's file format.
enum SystemRequirement {
  /// Format number -> first major version of macOS, iOS and visionOS that reads it.
  private static let first: [Int: (macOS: Int, iOS: Int, visionOS: Int)] = [
    9: (15, 18, 2),
    10: (26, 26, 26),
  ]

  #if os(iOS)
    static let systemName = "iOS"
  #elseif os(visionOS)
    static let systemName = "visionOS"
  #else
    static let systemName = "macOS"
  #endif

  /// Throw ``ParaRNNError/needsNewerSystem(_:required:)`` for a model that system `major` cannot read.
  static func check(
    _ model: URL, major: Int = ProcessInfo.processInfo.operatingSystemVersion.majorVersion
  ) throws {
    #if os(Linux)
      let major = major < 15 ? 15 : major  // the kernel's version says nothing here
    #endif
    try check(model, formatNumber: formatNumber(of: model), major: major)
  }

  static func check(_ model: URL, formatNumber: Int?, major: Int) throws {
    guard let formatNumber, let needed = first[formatNumber] else { return }
    let version =
      switch systemName {
      case "iOS": needed.iOS
      case "visionOS": needed.visionOS
      default: needed.macOS
      }
    if version > major {
      throw ParaRNNError.needsNewerSystem(model, required: "\(systemName) \(version)")
    }
  }

  /// The format's number, from a package's program or a compiled model's description; nil if it is not there.
  static func formatNumber(of model: URL) -> Int? {
    if model.pathExtension == "mlpackage" {
      let program = model.appendingPathComponent("Data/com.apple.CoreML/model.mlmodel")
      guard let handle = try? FileHandle(forReadingFrom: program) else { return nil }
      defer { try? handle.close() }
      // Protocol buffers: field 1, a variable-length number, stands first.
      guard let head = try? handle.read(upToCount: 4), head.first == 0x08 else { return nil }
      var number = 0
      for (i, byte) in head.dropFirst().enumerated() {
        number |= Int(byte & 0x7F) << (7 * i)
        if byte < 0x80 { return number }
      }
      return nil
    }
    guard let data = try? Data(contentsOf: model.appendingPathComponent("metadata.json")),
      let entries = try? JSONSerialization.jsonObject(with: data) as? [JSON]
    else { return nil }
    return entries.first?["specificationVersion"] as? Int
  }
}

/// FNV-1a, 64 bits: tells things apart, and keeps no secrets.
struct Fingerprint {
  private var value: UInt64 = 0xCBF2_9CE4_8422_2325

  mutating func add(_ bytes: some Sequence<UInt8>) {
    for byte in bytes { value = (value ^ UInt64(byte)) &* 0x0000_0100_0000_01B3 }
  }

  mutating func add(_ text: String) {
    add(text.utf8)
    add(CollectionOfOne(0))
  }

  var hexadecimal: String {
    let digits = String(value, radix: 16)
    return String(repeating: "0", count: 16 - digits.count) + digits
  }
}
