"""Graph passes, one a file. Each returns how often it applied; `trace`, `simplify` and `quantize` put them in order."""
