"""Adapters into plain weights, and the proof that they compute the same."""
