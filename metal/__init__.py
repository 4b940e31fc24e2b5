"""Kernel sources, read as package data: see README.md here and mlx_pararnn/compute/texts.py."""
