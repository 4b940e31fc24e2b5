// A stand-in for the part of Apple's Core AI framework that ParaRNN uses, so that it compiles and is tested on Linux.
// Names and forms are those of Apple's documentation (developer.apple.com/documentation/coreai) and of the code that
// Apple publishes for it (github.com/apple/coreai-models). What Swift 6.0 cannot say is left out: Apple's views do not
// outlive what they show, and its Span is the standard library's. It computes nothing: a test says what a function
// answers.
@_exported import Foundation

public enum ComputeUnitKind: Hashable, Sendable {
  case cpu, gpu, neuralEngine
}

public struct SpecializationOptions: Hashable, Sendable {
  public private(set) var allowedComputeUnitKinds: Set<ComputeUnitKind> = [.cpu, .gpu, .neuralEngine]
  public private(set) var preferredComputeUnitKind: ComputeUnitKind?
  public static let `default` = SpecializationOptions()
  public static let cpuOnly: SpecializationOptions = {
    var options = SpecializationOptions()
    options.allowedComputeUnitKinds = [.cpu]
    return options
  }()
  private init() {}
  public init(preferredComputeUnitKind: ComputeUnitKind) {
    self.preferredComputeUnitKind = preferredComputeUnitKind
  }
}

/// STAND-IN ONLY: how Core AI fails is not documented; any error will do.
public struct StandInError: LocalizedError, Sendable {
  public let errorDescription: String?
  public init(_ text: String) { errorDescription = text }
}

// MARK: - Arrays

public struct Span<Element> {
  private let elements: [Element]
  init(_ elements: [Element]) { self.elements = elements }
  public var count: Int { elements.count }
  public subscript(index: Int) -> Element { elements[index] }
}

public struct NDArray: @unchecked Sendable {  // its storage is copied before it is written to
  public enum ScalarType: Hashable, Sendable {
    case float16, float32, int32

    /// nil for a Swift type that no scalar type stands for.
    init?(_ type: Any.Type) {
      switch type {
      case is Float16.Type: self = .float16
      case is Float.Type: self = .float32
      case is Int32.Type: self = .int32
      default: return nil
      }
    }
  }

  final class Storage {
    let bytes: UnsafeMutableRawBufferPointer
    init(copying given: UnsafeRawBufferPointer) {
      bytes = .allocate(byteCount: given.count, alignment: 64)
      bytes.copyMemory(from: given)
    }
    deinit { bytes.deallocate() }
  }

  public enum InterleaveLayout: Sendable { case standIn }

  public let shape: [Int]
  public let scalarType: ScalarType
  fileprivate let strides: [Int]
  fileprivate let interleaveLayout: InterleaveLayout?
  fileprivate var storage: Storage

  public init<Scalar: BitwiseCopyable>(scalars: some Sequence<Scalar>, shape: [Int]) {
    let scalars = Array(scalars)
    precondition(scalars.count == shape.reduce(1, *), "\(scalars.count) scalars for the shape \(shape)")
    var strides = [Int](repeating: 1, count: shape.count)
    for i in strides.indices.dropLast().reversed() { strides[i] = strides[i + 1] * shape[i + 1] }
    self.init(standInMemory: scalars, shape: shape, strides: strides)
  }

  /// STAND-IN ONLY: an array that lies in memory as it is said to.
  public init<Scalar: BitwiseCopyable>(
    standInMemory memory: [Scalar], shape: [Int], strides: [Int], interleaved: Bool = false
  ) {
    self.shape = shape
    self.strides = strides
    interleaveLayout = interleaved ? .standIn : nil
    scalarType = ScalarType(Scalar.self)!
    storage = memory.withUnsafeBytes(Storage.init)
  }

  public func view<T: BitwiseCopyable>(as type: T.Type = T.self) -> View<T> {
    precondition(scalarType == ScalarType(type), "the array holds \(scalarType), not \(type)")
    return View(array: self)
  }

  public struct View<Element: BitwiseCopyable> {
    fileprivate let array: NDArray
    public var interleaveLayout: InterleaveLayout? { array.interleaveLayout }
    public func withUnsafePointer<R, E: Error>(
      _ body: (UnsafePointer<Element>, Span<Int>, Span<Int>) throws(E) -> R
    ) throws(E) -> R {
      try body(
        array.storage.bytes.bindMemory(to: Element.self).baseAddress!, Span(array.shape), Span(array.strides))
    }
  }

  /// STAND-IN ONLY: the memory, for what a function writes.
  public var standInBytes: UnsafeMutableRawBufferPointer { storage.bytes }

  /// An array of its own storage, as it is before anyone writes to it.
  fileprivate mutating func makeUnique() {
    if !isKnownUniquelyReferenced(&storage) { storage = Storage(copying: .init(storage.bytes)) }
  }
}

public struct InferenceValue {
  public protocol MutableViewRepresentable: ~Copyable {}
  public let ndArray: NDArray?
}

extension NDArray: InferenceValue.MutableViewRepresentable {}

// MARK: - Models

public struct AIModelAsset {
  public struct Metadata: Sendable {
    public enum CreatorDefinedValue: Sendable {
      case string(String)
      case integer(Int)
    }
    public var creatorDefinedMetadata: [String: CreatorDefinedValue] = [:]
  }
  public let metadata: Metadata

  public init(contentsOf url: URL) throws {
    guard url.pathExtension == "aimodel", let behaviour = AIModel.behaviour else {
      throw StandInError("there is no asset at \(url.path)")
    }
    metadata = Metadata(creatorDefinedMetadata: behaviour.metadata.mapValues { .string($0) })
  }
}

public struct AIModel: Sendable {
  /// STAND-IN ONLY: what models are and answer. A test sets it before it loads one.
  public struct Behaviour: Sendable {
    public var metadata: [String: String]
    public var functions: [String]
    /// Waits and throws as loading with these options is to.
    public var whileLoading: @Sendable (SpecializationOptions) async throws -> Void = { _ in }
    /// A function's outputs; it writes to the states' memory.
    public var run: @Sendable (String, [String: NDArray], [String: NDArray]) async throws -> [String: NDArray]
    public init(
      metadata: [String: String], functions: [String],
      run: @escaping @Sendable (String, [String: NDArray], [String: NDArray]) async throws -> [String:
        NDArray]
    ) {
      self.metadata = metadata
      self.functions = functions
      self.run = run
    }
  }
  @TaskLocal public static var behaviour: Behaviour?

  private let behaviour: Behaviour
  public var functionNames: [String] { behaviour.functions }

  public init(contentsOf modelURL: URL, options: SpecializationOptions = .default) async throws {
    guard let behaviour = AIModel.behaviour, FileManager.default.fileExists(atPath: modelURL.path) else {
      throw StandInError("there is no model at \(modelURL.path)")
    }
    try await behaviour.whileLoading(options)
    self.behaviour = behaviour
  }

  public func loadFunction(named functionName: String) throws -> InferenceFunction? {
    behaviour.functions.contains(functionName) ? InferenceFunction(name: functionName, behaviour) : nil
  }
}

public struct InferenceFunction: Sendable {
  private let name: String
  private let behaviour: AIModel.Behaviour
  init(name: String, _ behaviour: AIModel.Behaviour) {
    self.name = name
    self.behaviour = behaviour
  }

  public struct MutableViews: ~Copyable {
    fileprivate var arrays: [String: NDArray] = [:]
    public init() {}
    public mutating func insert(
      _ value: inout some InferenceValue.MutableViewRepresentable & ~Copyable, for name: String
    ) {
      withUnsafeMutablePointer(to: &value) { pointer in
        pointer.withMemoryRebound(to: NDArray.self, capacity: 1) { array in
          array.pointee.makeUnique()
          arrays[name] = array.pointee
        }
      }
    }
  }

  public struct Outputs {
    fileprivate var arrays: [String: NDArray]
    public mutating func remove(_ name: String) -> InferenceValue? {
      arrays.removeValue(forKey: name).map { InferenceValue(ndArray: $0) }
    }
  }

  public func run(
    inputs: [String: NDArray], states: consuming MutableViews = MutableViews(),
    outputViews: consuming MutableViews = MutableViews()
  ) async throws -> Outputs {
    Outputs(arrays: try await behaviour.run(name, inputs, states.arrays))
  }
}
