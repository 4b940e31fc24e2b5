"""From a PyTorch checkpoint to a model folder: reader -> family -> writer.

checkpoint.py reads tensors without torch and without executing what a file says, families/ knows one
source of checkpoints a file and maps it to the names in `mlx_pararnn.model`, to_mlx.py writes the folder.
"""
