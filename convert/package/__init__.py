"""What a package holds whatever runs it; convert/coreml/ and convert/coreai/ write and check one.

program.py is the model's program, in the operations of operations.py; layouts.py says where channels and time
stand in it; values.py makes a variable behave as an array, so that a cell's own `step` runs on it;
unrolled_newton.py is the prefill's solver, written for such arrays and NumPy's alike; iterations.py asks how
many iterations it needs; constants.py stores matrices in few bits; form.py says what the functions look like.

Beside the program: reference.py keeps what it must give, package_digest.py tells its weights apart,
chat_format.py and swift_tokenizer.py say what a runner without Python can do with its text.
"""
