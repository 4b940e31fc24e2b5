"""Models that see and draw: MANZANO (arXiv 2509.16197) on a recurrent backbone.

A vision encoder feeds two adapters: continuous embeddings, which the language model reads, and discrete
tokens, which it writes. A flow-matching decoder turns the discrete tokens into pixels.
"""
