"""Training: the data, the loop, its checkpoints and the folder that a run leaves."""
