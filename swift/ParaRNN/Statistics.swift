import Foundation

#if canImport(Darwin)
  @preconcurrency import Darwin  // for mach_task_self_, a constant that C declares as a variable
#endif

/// Counts and speeds of one answer. Time that the consumer of the stream took between two pieces is not in it.
public struct GenerationStatistics: Sendable, Equatable {
  public enum StopReason: Sendable, Equatable {
    /// The model ended the text, or the value that ``GenerationOptions/schema`` describes is complete.
    case endOfText
    /// One of ``GenerationOptions/stop`` was said.
    case stopText
    /// ``GenerationOptions/maxTokens`` were generated.
    case maxTokens
    /// The model's learned positions are used up.
    case positions
    /// ``ToolLimits/steps`` of a model that uses tools, or its learned positions.
    case steps
    /// ``ToolLimits/seconds``
    case time
  }
  public internal(set) var promptTokens = 0
  public internal(set) var promptSeconds = 0.0
  public internal(set) var generatedTokens = 0
  public internal(set) var generationSeconds = 0.0
  /// nil while more may follow, and where the stream was left early.
  public internal(set) var stopReason: StopReason?

  public var promptTokensPerSecond: Double { promptSeconds > 0 ? Double(promptTokens) / promptSeconds : 0 }
  public var tokensPerSecond: Double {
    generationSeconds > 0 ? Double(generatedTokens) / generationSeconds : 0
  }
}

/// What this process takes of the machine.
public enum ProcessMemory {
  /// Bytes that count against the process's limit (Apple: its footprint; Linux: resident pages); nil if unknown.
  public static var bytes: Int? {
    #if canImport(Darwin)
      var info = task_vm_info_data_t()
      var count = mach_msg_type_number_t(
        MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
      let result = withUnsafeMutablePointer(to: &info) { pointer in
        pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
          task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
        }
      }
      return result == KERN_SUCCESS ? Int(info.phys_footprint) : nil
    #else
      guard let text = try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8) else { return nil }
      let fields = text.split(separator: " ")
      return fields.count > 1 ? Int(fields[1]).map { $0 * sysconf(Int32(_SC_PAGESIZE)) } : nil
    #endif
  }
}

extension Duration {
  var seconds: Double { Double(components.seconds) + Double(components.attoseconds) / 1e18 }
}
