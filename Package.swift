// swift-tools-version: 6.0
import PackageDescription

// Linux has no Core ML: with this variable set, the Core ML half is compiled against a stand-in and tested.
let usesStub = Context.environment["PARARNN_COREML_STUB"] != nil

let package = Package(
  name: "mlx-pararnn",
  platforms: [.macOS(.v15), .iOS(.v18), .visionOS(.v2)],
  products: [
    .library(name: "ParaRNN", targets: ["ParaRNN"]),
    .executable(name: "pararnn-chat", targets: ["pararnn-chat"]),
  ],
  targets: [
    .target(
      name: "ParaRNN", dependencies: usesStub ? ["CoreML"] : [], path: "swift/ParaRNN",
      resources: [.copy("PrivacyInfo.xcprivacy")]),
    .executableTarget(name: "pararnn-chat", dependencies: ["ParaRNN"], path: "swift/pararnn-chat"),
    .testTarget(
      name: "ParaRNNTests", dependencies: ["ParaRNN"], path: "swift/ParaRNNTests", exclude: ["Data"]),
  ] + (usesStub ? [.target(name: "CoreML", path: "swift/CoreMLStub")] : [])
)
