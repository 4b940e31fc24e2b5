"""Models that use tools: the protocol they speak, the pointer memory, the loop, and functions to call."""
