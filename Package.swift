// swift-tools-version: 6.0
import PackageDescription

// Linux has neither Core ML nor Core AI: with this variable set, what uses them is compiled against stand-ins and tested.
let usesStub = Context.environment["PARARNN_COREML_STUB"] != nil

let package = Package(
  name: "mlx-pararnn",
  platforms: [.macOS(.v15), .iOS(.v18), .visionOS(.v2)],
  products: [
    .library(name: "ParaRNN", targets: ["ParaRNN"]),
    .library(name: "ParaRNNFoundationModels", targets: ["ParaRNNFoundationModels"]),
    .executable(name: "pararnn-chat", targets: ["pararnn-chat"]),
  ],
  targets: [
    .target(
      name: "ParaRNN", dependencies: usesStub ? ["CoreML", "CoreAI"] : [], path: "swift/ParaRNN",
      resources: [.copy("PrivacyInfo.xcprivacy")]),
    .target(
      name: "ParaRNNFoundationModels", dependencies: ["ParaRNN"] + (usesStub ? ["FoundationModels"] : []),
      path: "swift/ParaRNNFoundationModels",
      swiftSettings: usesStub ? [.define("PARARNN_FOUNDATION_MODELS_STUB")] : []),
    .executableTarget(name: "pararnn-chat", dependencies: ["ParaRNN"], path: "swift/pararnn-chat"),
    .testTarget(
      name: "ParaRNNTests", dependencies: ["ParaRNN", "ParaRNNFoundationModels"], path: "swift/ParaRNNTests",
      exclude: ["Data"]),
  ]
    + (usesStub
      ? [
        .target(name: "CoreML", path: "swift/CoreMLStub"),
        .target(name: "CoreAI", path: "swift/CoreAIStub"),
        .target(name: "FoundationModels", path: "swift/FoundationModelsStub"),
      ] : [])
)
