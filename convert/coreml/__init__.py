"""What a Core ML package is built from; convert/coreai/ builds a Core AI package from the same program.

The program: program.py is its text, in the operations of operations.py; values.py makes a variable behave as
an array, so that a cell's own `step` runs on it; unrolled_newton.py is the prefill's solver, written for such
arrays and NumPy's alike; iterations.py asks how many iterations it needs; constants.py stores matrices in few
bits; form.py says what the functions look like; reference.py keeps what they must give.

Core ML's part: mil.py is those operations in MIL, package.py writes the .mlpackage, package_check.py verifies
one. coremltools is imported in mil.py, package.py and tools.py only, when a package is made: it loads slowly,
and not everywhere.
"""
