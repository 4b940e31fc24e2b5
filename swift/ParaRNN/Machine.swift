import Foundation

/// Runs what an actor does on a queue of its own.
final class QueueExecutor: SerialExecutor {
  private let queue: DispatchQueue

  init(_ label: String) { queue = DispatchQueue(label: label) }

  func enqueue(_ job: consuming ExecutorJob) {
    let job = UnownedJob(job)
    queue.async { [self] in job.runSynchronously(on: asUnownedSerialExecutor()) }
  }
}

enum Hardware {
  /// The model of the device, as the system calls it; "" where it does not say.
  static let model: String = {
    #if canImport(Darwin)
      var bytes = [UInt8](repeating: 0, count: 64)
      var size = bytes.count
      guard sysctlbyname("hw.model", &bytes, &size, nil, 0) == 0 else { return "" }
      return String(decoding: bytes.prefix(size).prefix { $0 != 0 }, as: UTF8.self)
    #else
      return ""
    #endif
  }()
}

/// Calls back whenever the system is short of memory, until it is let go. Apple's systems tell; others never do.
final class MemoryPressure: @unchecked Sendable {  // nothing changes after its making
  #if canImport(Darwin)
    private let source: any DispatchSourceMemoryPressure
  #endif

  init(_ handler: @escaping @Sendable () -> Void) {
    #if canImport(Darwin)
      source = DispatchSource.makeMemoryPressureSource(eventMask: [.warning, .critical], queue: .global())
      source.setEventHandler(handler: handler)
      source.activate()
    #endif
  }

  #if canImport(Darwin)
    deinit { source.cancel() }
  #endif
}
