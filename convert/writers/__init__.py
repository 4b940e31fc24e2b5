"""The MLX model folder: weights in pieces, tokenizer, model card; whole or not at all."""
