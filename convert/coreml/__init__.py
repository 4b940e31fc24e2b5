"""The parts of `to_coreml.py`: what a Core ML package is built from.

values.py makes a MIL variable behave as an array, so that a cell's own `step` runs on it; newton.py is the
prefill's solver, written for such arrays and NumPy's alike; iterations.py asks how many iterations it needs;
weights.py stores matrices in few bits; form.py says what the functions look like, program.py builds
them; package.py writes the .mlpackage. coremltools is imported in values.py, weights.py, program.py,
package.py and tools.py only, when a package is made: it loads slowly, and not everywhere.
"""
