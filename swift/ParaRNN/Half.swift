/// Float16 by its bits: Swift's own type does not exist on Intel Macs.
enum Half {
  /// The number that `bits` stand for, exactly.
  static func float(_ bits: UInt16) -> Float {
    let magnitude = UInt32(bits & 0x7FFF)
    // Where the exponent goes in a Float; the product moves its bias, also for subnormal numbers.
    let moved = Float(bitPattern: magnitude << 13) * 0x1p112
    let result = magnitude >= 0x7C00 ? moved.bitPattern | 0x7F80_0000 : moved.bitPattern
    return Float(bitPattern: result | UInt32(bits & 0x8000) << 16)
  }

  static func isFinite(_ bits: UInt16) -> Bool { bits & 0x7C00 != 0x7C00 }
}

/// A tensor of the model's memory: its numbers as little-endian bytes, rows one after another.
struct StateTensor: Sendable, Equatable {
  let form: PackageSettings.State
  var bytes: [UInt8]

  init(zeros form: PackageSettings.State) {
    self.init(form: form, bytes: [UInt8](repeating: 0, count: form.byteCount))
  }

  init(form: PackageSettings.State, bytes: [UInt8]) {
    self.form = form
    self.bytes = bytes
  }

  var isFinite: Bool {
    bytes.withUnsafeBytes { raw in
      switch form.dtype {
      case .float16:
        (0..<raw.count / 2).allSatisfy {
          Half.isFinite(UInt16(littleEndian: raw.loadUnaligned(fromByteOffset: 2 * $0, as: UInt16.self)))
        }
      case .float32:
        (0..<raw.count / 4).allSatisfy {
          Float(bitPattern: UInt32(littleEndian: raw.loadUnaligned(fromByteOffset: 4 * $0, as: UInt32.self)))
            .isFinite
        }
      }
    }
  }
}
