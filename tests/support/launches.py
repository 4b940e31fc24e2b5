"""How many kernels a layer launches: held by tests/compute/test_layer_ops.py, for benchmarks too."""

# kind: matrix products; beside them on a GPU for one token, for a prompt; in plain ops on a CPU for one token
# (there MLX unrolls each RMSNorm into 7 primitives)
COUNTS = {
    "gru": (6, 5, 11, 36),
    "lstm": (6, 5, 11, 40),
    "ml-pararnn": (6, 5, 11, 36),
    "plain": (4, 4, 8, 25),
    "plain, several heads and biases": (4, 4, 8, 29),
}
