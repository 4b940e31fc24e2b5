// Stands in for the part of Apple's Core ML API that the library uses, so that the library compiles and its loop
// can be tested on Linux. It computes nothing: a test says what a model answers. Sendability is as Apple has it:
// MLModel, MLMultiArray, MLFeatureValue and feature providers are not Sendable, MLState is.
@_exported import Foundation  // as on Apple, `import CoreML` brings Foundation along

public enum MLComputeUnits: Int, Sendable {
  case cpuOnly = 0
  case cpuAndGPU = 1
  case all = 2
  case cpuAndNeuralEngine = 3
}

public enum MLFeatureType: Int, Sendable {
  case invalid = 0
  case int64 = 1
  case double = 2
  case string = 3
  case image = 4
  case multiArray = 5
  case dictionary = 6
  case sequence = 7
  case state = 8
}

public enum MLMultiArrayDataType: Int, Sendable {
  case double = 0x10040
  case float32 = 0x10020
  case float16 = 0x10010
  case int32 = 0x20020
  public static var float64: MLMultiArrayDataType { .double }
  public static var float: MLMultiArrayDataType { .float32 }
  var byteCount: Int { (rawValue & 0xFF) / 8 }
}

public struct MLModelError: LocalizedError, Sendable {
  public var errorDescription: String? { message }
  public enum Code: Int, Sendable {
    case generic = 0
    case featureType = 1
    case io = 3
  }
  public let code: Code
  public let message: String
  public init(_ code: Code, _ message: String) {
    self.code = code
    self.message = message
  }
}

public struct MLModelMetadataKey: RawRepresentable, Hashable, Sendable {
  public let rawValue: String
  public init(rawValue: String) { self.rawValue = rawValue }
  public static let description = MLModelMetadataKey(rawValue: "MLModelDescriptionKey")
  public static let versionString = MLModelMetadataKey(rawValue: "MLModelVersionStringKey")
  public static let author = MLModelMetadataKey(rawValue: "MLModelAuthorKey")
  public static let license = MLModelMetadataKey(rawValue: "MLModelLicenseKey")
  public static let creatorDefinedKey = MLModelMetadataKey(rawValue: "MLModelCreatorDefinedKey")
}

open class MLModelConfiguration: NSObject, NSCopying {
  open var computeUnits: MLComputeUnits = .all
  open var functionName: String?
  public override init() { super.init() }
  open func copy(with zone: NSZone? = nil) -> Any {
    let c = MLModelConfiguration()
    c.computeUnits = computeUnits
    c.functionName = functionName
    return c
  }
}

// MARK: - Arrays

open class MLMultiArray: NSObject {
  public let dataPointer: UnsafeMutableRawPointer
  public let dataType: MLMultiArrayDataType
  public let shape: [NSNumber]
  public let strides: [NSNumber]
  private let release: (UnsafeMutableRawPointer) -> Void
  open var count: Int { shape.reduce(1) { $0 * $1.intValue } }

  public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
    let n = shape.reduce(1) { $0 * $1.intValue }
    let bytes = max(n, 1) * dataType.byteCount
    dataPointer = .allocate(byteCount: bytes, alignment: 64)
    dataPointer.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    self.dataType = dataType
    self.shape = shape
    strides = Self.contiguous(shape.map(\.intValue)).map { NSNumber(value: $0) }
    release = { $0.deallocate() }
    super.init()
  }

  public init(
    dataPointer: UnsafeMutableRawPointer, shape: [NSNumber], dataType: MLMultiArrayDataType,
    strides: [NSNumber], deallocator: ((UnsafeMutableRawPointer) -> Void)? = nil
  ) throws {
    self.dataPointer = dataPointer
    self.dataType = dataType
    self.shape = shape
    self.strides = strides
    release = deallocator ?? { _ in }
    super.init()
  }

  deinit { release(dataPointer) }

  static func contiguous(_ s: [Int]) -> [Int] {
    var out = [Int](repeating: 1, count: s.count)
    for i in stride(from: s.count - 2, through: 0, by: -1) { out[i] = out[i + 1] * s[i + 1] }
    return out
  }

  private func load(_ i: Int) -> NSNumber {
    switch dataType {
    case .double: return NSNumber(value: dataPointer.load(fromByteOffset: i * 8, as: Double.self))
    case .float32: return NSNumber(value: dataPointer.load(fromByteOffset: i * 4, as: Float.self))
    case .float16:
      return NSNumber(value: Float(dataPointer.load(fromByteOffset: i * 2, as: Float16.self)))
    case .int32: return NSNumber(value: dataPointer.load(fromByteOffset: i * 4, as: Int32.self))
    }
  }
  private func store(_ v: NSNumber, _ i: Int) {
    switch dataType {
    case .double: dataPointer.storeBytes(of: v.doubleValue, toByteOffset: i * 8, as: Double.self)
    case .float32: dataPointer.storeBytes(of: v.floatValue, toByteOffset: i * 4, as: Float.self)
    case .float16:
      dataPointer.storeBytes(of: Float16(v.floatValue), toByteOffset: i * 2, as: Float16.self)
    case .int32: dataPointer.storeBytes(of: v.int32Value, toByteOffset: i * 4, as: Int32.self)
    }
  }
  open subscript(_ index: Int) -> NSNumber {
    get { load(index) }
    set { store(newValue, index) }
  }
  open subscript(_ key: [NSNumber]) -> NSNumber {
    get { load(zip(key, strides).reduce(0) { $0 + $1.0.intValue * $1.1.intValue }) }
    set { store(newValue, zip(key, strides).reduce(0) { $0 + $1.0.intValue * $1.1.intValue }) }
  }
}

extension MLMultiArray {
  /// Bytes from the first number to the last, gaps included.
  private var extent: Int {
    let last = zip(shape, strides).reduce(0) { $0 + ($1.0.intValue - 1) * $1.1.intValue }
    return count == 0 ? 0 : (last + 1) * dataType.byteCount
  }
  public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
    try body(.init(start: dataPointer, count: extent))
  }
  public func withUnsafeMutableBytes<R>(
    _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
  ) rethrows -> R {
    try body(.init(start: dataPointer, count: extent), strides.map(\.intValue))
  }
}

// MARK: - Features

open class MLFeatureValue: NSObject {
  private enum Box {
    case int(Int64)
    case double(Double)
    case string(String)
    case array(MLMultiArray)
  }
  private let box: Box
  public init(int64 value: Int64) { box = .int(value) }
  public init(double value: Double) { box = .double(value) }
  public init(string value: String) { box = .string(value) }
  public init(multiArray value: MLMultiArray) { box = .array(value) }
  open var type: MLFeatureType {
    switch box {
    case .int: .int64
    case .double: .double
    case .string: .string
    case .array: .multiArray
    }
  }
  open var isUndefined: Bool { false }
  open var int64Value: Int64 { if case .int(let v) = box { v } else { 0 } }
  open var doubleValue: Double { if case .double(let v) = box { v } else { 0 } }
  open var stringValue: String { if case .string(let v) = box { v } else { "" } }
  open var multiArrayValue: MLMultiArray? { if case .array(let v) = box { v } else { nil } }
}

public protocol MLFeatureProvider: AnyObject {
  var featureNames: Set<String> { get }
  func featureValue(for featureName: String) -> MLFeatureValue?
}

open class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
  public let dictionary: [String: MLFeatureValue]
  public init(dictionary: [String: Any]) throws {
    self.dictionary = try dictionary.mapValues { v in
      switch v {
      case let v as MLFeatureValue: return v
      case let v as MLMultiArray: return MLFeatureValue(multiArray: v)
      case let v as String: return MLFeatureValue(string: v)
      case let v as Int: return MLFeatureValue(int64: Int64(v))
      case let v as Double: return MLFeatureValue(double: v)
      default: throw MLModelError(.featureType, "not convertible: \(Swift.type(of: v))")
      }
    }
  }
  open var featureNames: Set<String> { Set(dictionary.keys) }
  open func featureValue(for featureName: String) -> MLFeatureValue? { dictionary[featureName] }
  open subscript(_ featureName: String) -> MLFeatureValue? { dictionary[featureName] }
}

// MARK: - Descriptions

open class MLMultiArrayConstraint: NSObject {
  public let shape: [NSNumber]
  public let dataType: MLMultiArrayDataType
  public init(shape: [NSNumber], dataType: MLMultiArrayDataType) {
    self.shape = shape
    self.dataType = dataType
  }
}
open class MLFeatureDescription: NSObject {
  public let name: String
  public let type: MLFeatureType
  public let isOptional: Bool
  public let multiArrayConstraint: MLMultiArrayConstraint?
  public init(name: String, type: MLFeatureType, multiArrayConstraint: MLMultiArrayConstraint?) {
    self.name = name
    self.type = type
    isOptional = false
    self.multiArrayConstraint = multiArrayConstraint
  }
}
open class MLModelDescription: NSObject {
  public let inputDescriptionsByName: [String: MLFeatureDescription]
  public let outputDescriptionsByName: [String: MLFeatureDescription]
  public let stateDescriptionsByName: [String: MLFeatureDescription]
  public let metadata: [MLModelMetadataKey: Any]
  public init(
    inputs: [String: MLFeatureDescription] = [:], outputs: [String: MLFeatureDescription] = [:],
    states: [String: MLFeatureDescription] = [:], metadata: [MLModelMetadataKey: Any] = [:]
  ) {
    inputDescriptionsByName = inputs
    outputDescriptionsByName = outputs
    stateDescriptionsByName = states
    self.metadata = metadata
  }
}

// MARK: - Model

public final class MLState: NSObject, @unchecked Sendable {
  private let buffers: [String: MLMultiArray]
  init(buffers: [String: MLMultiArray]) { self.buffers = buffers }
  public func withMultiArray<R>(
    for stateName: String, _ body: (MLMultiArray) throws -> R
  ) rethrows -> R { try body(buffers[stateName]!) }
}

open class MLModel: NSObject {
  /// STAND-IN ONLY: what models are and answer. A test sets it before it loads one.
  public struct Behaviour: Sendable {
    /// The description of the model at a URL, for a function's name; throws what loading is to throw.
    public var load: @Sendable (URL, String?) throws -> MLModelDescription
    /// A function's outputs.
    public var predict: @Sendable (String?, any MLFeatureProvider, MLState?) throws -> any MLFeatureProvider
    public init(
      load: @escaping @Sendable (URL, String?) throws -> MLModelDescription,
      predict:
        @escaping @Sendable (String?, any MLFeatureProvider, MLState?) throws -> any MLFeatureProvider
    ) {
      self.load = load
      self.predict = predict
    }
  }
  @TaskLocal public static var behaviour: Behaviour?
  /// STAND-IN ONLY: waits and throws as loading for these units, of this function, is to.
  @TaskLocal public static var whileLoading: (@Sendable (MLComputeUnits, String?) async throws -> Void)?

  public let modelDescription: MLModelDescription
  public let configuration: MLModelConfiguration
  private let behaviour: Behaviour

  public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
    guard let behaviour = MLModel.behaviour, FileManager.default.fileExists(atPath: url.path) else {
      throw MLModelError(.io, "there is no model at \(url.path)")
    }
    self.behaviour = behaviour
    self.configuration = configuration
    modelDescription = try behaviour.load(url, configuration.functionName)
    super.init()
  }
  public class func load(
    contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()
  ) async throws -> MLModel {
    try await whileLoading?(configuration.computeUnits, configuration.functionName)
    return try MLModel(contentsOf: url, configuration: configuration)
  }

  /// STAND-IN ONLY: a copy of the package, as if it were compiled.
  public class func compileModel(at url: URL) async throws -> URL {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    let compiled = folder.appendingPathComponent("model.mlmodelc")
    try FileManager.default.copyItem(at: url, to: compiled)
    return compiled
  }

  public func makeState() -> MLState {
    MLState(
      buffers: modelDescription.stateDescriptionsByName.compactMapValues { d in
        d.multiArrayConstraint.flatMap { try? MLMultiArray(shape: $0.shape, dataType: $0.dataType) }
      })
  }

  open func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
    try behaviour.predict(configuration.functionName, input, nil)
  }
  open func prediction(
    from inputFeatures: any MLFeatureProvider, using state: MLState
  ) throws -> any MLFeatureProvider {
    try behaviour.predict(configuration.functionName, inputFeatures, state)
  }
}
