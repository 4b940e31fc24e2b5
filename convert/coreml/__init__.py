"""Core ML packages: mil.py has the program's operations in MIL, mlpackage.py writes the .mlpackage.

mlpackage_check.py verifies one, compute_unit.py runs it on one kind of processor; require_coremltools.py
looks for coremltools, which is imported in these only, when a package is made: it loads slowly, and not
everywhere.
"""
