"""What a Core AI package is built from and run by; the model's program is convert/coreml/program.py's.

operations.py is the program's operations in Core AI's language; package.py writes the .aimodel, runtime.py
runs one and package_check.py verifies one; tools.py looks for coreai-core, which is imported in these only,
when a package is made or run.
"""
