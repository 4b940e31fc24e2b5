"""Core AI packages: graph_operations.py has the program's operations in Core AI's language.

aimodel.py writes the .aimodel, runtime.py runs one and aimodel_check.py verifies one; require_coreai.py looks
for coreai-core, which is imported in these only, when a package is made or run.
"""
