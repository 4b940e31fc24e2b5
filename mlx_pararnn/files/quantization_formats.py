"""What MLX quantizes to, as the field `quantization` of config.json says it."""

# mode -> its default group size and bits; every mode but affine has these and no others.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
# Of mode "affine".
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
