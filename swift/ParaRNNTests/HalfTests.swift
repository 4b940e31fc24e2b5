import Testing

@testable import ParaRNN

@Suite struct HalfTests {
  #if !(os(macOS) && arch(x86_64))
    @Test func everyHalf() {
      for bits in UInt16.min ... .max {
        let expected = Float(Float16(bitPattern: bits))
        let ours = Half.float(bits)
        #expect(ours.bitPattern == expected.bitPattern || (ours.isNaN && expected.isNaN), "\(bits)")
        #expect(Half.isFinite(bits) == expected.isFinite)
      }
    }
  #endif
}
