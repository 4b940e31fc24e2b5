"""Measuring and checking: `benchmark`, `verification`, `doctor`."""
