"""Weights in eight bits: how they are made of a checkpoint's, and how a graph holds and unpacks them, a file a form."""
