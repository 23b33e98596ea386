"""The first commands of a new user: what a checkpoint is, a recipe for it, all stages at once, and this machine.

Whatever says what something is reads JSON and the headers of weights, and imports no torch.
"""
