"""Weights in eight bits, arithmetic in float32: what a graph of a dtype is made of, and how it unpacks them."""
