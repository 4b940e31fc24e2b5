"""From files to named tensors, read by offset; nothing in a file is executed."""
