"""Goldens of PyTorch, and whether an exported repo says the same in each runtime."""
