import Foundation

#if canImport(CryptoKit)
  import CryptoKit
#endif

/// SHA-256 (FIPS 180-4), by CryptoKit where there is one.
struct FileHash {
  #if canImport(CryptoKit)
    private var hash = SHA256()

    mutating func add(_ data: Data) { hash.update(data: data) }

    /// Of all that was added, in 64 digits.
    var hexadecimal: String { hash.finalize().map { String(format: "%02x", $0) }.joined() }
  #else
    private var state: [UInt32] = [
      0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19,
    ]
    private var held: [UInt8] = []
    private var count = 0

    mutating func add(_ data: Data) {
      count += data.count
      held += data
      let whole = held.count / 64 * 64
      for at in stride(from: 0, to: whole, by: 64) { mix(held[at..<at + 64]) }
      held.removeFirst(whole)
    }

    /// Of all that was added, in 64 digits.
    var hexadecimal: String {
      var last = self
      let padding = [0x80] + [UInt8](repeating: 0, count: (119 - count % 64) % 64)
      let bits = UInt64(count) << 3
      last.add(Data(padding + (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * $0)) }))
      return last.state.map { String(format: "%08x", $0) }.joined()
    }

    private mutating func mix(_ block: ArraySlice<UInt8>) {
      var words = [UInt32](repeating: 0, count: 64)
      for (i, byte) in block.enumerated() { words[i / 4] = words[i / 4] << 8 | UInt32(byte) }
      func turned(_ word: UInt32, _ bits: UInt32) -> UInt32 { word >> bits | word << (32 - bits) }
      for i in 16..<64 {
        let (a, b) = (words[i - 15], words[i - 2])
        let first = turned(a, 7) ^ turned(a, 18) ^ a >> 3
        let second = turned(b, 17) ^ turned(b, 19) ^ b >> 10
        words[i] = words[i - 16] &+ first &+ words[i - 7] &+ second
      }
      var s = state
      for i in 0..<64 {
        let sum1 = turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25)
        let choice = s[4] & s[5] ^ ~s[4] & s[6]
        let first = s[7] &+ sum1 &+ choice &+ Self.constants[i] &+ words[i]
        let sum0 = turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22)
        let majority = s[0] & s[1] ^ s[0] & s[2] ^ s[1] & s[2]
        s = [first &+ sum0 &+ majority, s[0], s[1], s[2], s[3] &+ first, s[4], s[5], s[6]]
      }
      for i in 0..<8 { state[i] &+= s[i] }
    }

    /// The first 32 bits of the fractions of the cube roots of the first 64 primes.
    private static let constants: [UInt32] = {
      let primes = (2..<312).filter { n in (2..<n).allSatisfy { n % $0 != 0 } }
      return primes.map { prime in
        // The largest whole r with r^3 <= prime * 2^96: the root's whole part and 32 bits of its fraction.
        var root = BigInteger(0)
        let wanted = BigInteger(prime) * BigInteger(2).raised(to: 96)
        for bit in (0..<36).reversed() {
          let larger = root + BigInteger(2).raised(to: bit)
          if !(wanted < larger.raised(to: 3)) { root = larger }
        }
        return UInt32(UInt64(root.text)! & 0xFFFF_FFFF)
      }
    }()
  #endif

  static func hexadecimal(of file: URL) throws -> String {
    let handle = try FileHandle(forReadingFrom: file)
    defer { try? handle.close() }
    var hash = FileHash()
    while let data = try handle.read(upToCount: 1 << 20), !data.isEmpty { hash.add(data) }
    return hash.hexadecimal
  }
}
