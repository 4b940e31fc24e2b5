#if canImport(CoreML)
  import CoreML

  extension MLMultiArray {
    /// The numbers' bytes, rows one after another, however the array lies in memory.
    func contiguousBytes() throws -> [UInt8] {
      let size = try elementSize
      let (shape, strides) = (shape.map(\.intValue), strides.map(\.intValue))
      var bytes = [UInt8](repeating: 0, count: shape.reduce(size, *))
      try withUnsafeBytes { memory in
        try forEachRow(shape, strides) { from, to, count in
          guard (from + count) * size <= memory.count else { throw Self.outOfBounds }
          bytes.withUnsafeMutableBytes { out in
            UnsafeMutableRawBufferPointer(rebasing: out[to * size..<(to + count) * size])
              .copyMemory(from: UnsafeRawBufferPointer(rebasing: memory[from * size..<(from + count) * size]))
          }
        }
      }
      return bytes
    }

    /// Put `bytes`, rows one after another, in the array's place.
    func write(_ bytes: [UInt8]) throws {
      let size = try elementSize
      let shape = shape.map(\.intValue)
      guard bytes.count == shape.reduce(size, *) else { throw Self.outOfBounds }
      try withUnsafeMutableBytes { memory, strides in
        try forEachRow(shape, strides) { to, from, count in
          guard (to + count) * size <= memory.count else { throw Self.outOfBounds }
          bytes.withUnsafeBytes { given in
            UnsafeMutableRawBufferPointer(rebasing: memory[to * size..<(to + count) * size])
              .copyMemory(from: UnsafeRawBufferPointer(rebasing: given[from * size..<(from + count) * size]))
          }
        }
      }
    }

    /// An array that holds what `tensor` does.
    convenience init(_ tensor: StateTensor) throws {
      try self.init(
        shape: tensor.form.shape.map { NSNumber(value: $0) },
        dataType: tensor.form.dtype == .float16 ? .float16 : .float32)
      try write(tensor.bytes)
    }

    /// Token ids, (1, n), or a position, (1,).
    convenience init(_ numbers: [Int], shape: [Int]) throws {
      try self.init(shape: shape.map { NSNumber(value: $0) }, dataType: .int32)
      try write(
        numbers.flatMap { number in Swift.withUnsafeBytes(of: Int32(number).littleEndian) { Array($0) } })
    }

    /// All numbers in order; float16 and float32 only.
    func floats() throws -> [Float] {
      let bytes = try contiguousBytes()
      return try bytes.withUnsafeBytes { raw in
        switch dataType {
        case .float16: raw.bindMemory(to: UInt16.self).map(Half.float)
        case .float32: Array(raw.bindMemory(to: Float.self))
        default: throw ParaRNNError.predictionFailed(reason: "its output has an unexpected type")
        }
      }
    }

    private var elementSize: Int {
      get throws {
        switch dataType {
        case .float16: 2
        case .float32, .int32: 4
        default: throw ParaRNNError.predictionFailed(reason: "an array has an unexpected type")
        }
      }
    }

    private static var outOfBounds: ParaRNNError {
      .predictionFailed(reason: "an array is not as large as its shape says")
    }

  }

  /// Call `body` with the place of each row in memory, its place without gaps, and its length, in elements.
  func forEachRow(
    _ shape: [Int], _ strides: [Int], _ body: (Int, Int, Int) throws -> Void
  ) rethrows {
    let length = strides.last == 1 || shape.last == 1 ? shape.last! : 1
    let count = shape.reduce(1, *)
    for start in stride(from: 0, to: count, by: max(length, 1)) {
      var rest = start
      var place = 0
      for (size, step) in zip(shape, strides).reversed() {
        place += rest % size * step
        rest /= size
      }
      try body(place, start, length)
    }
  }
#endif
