"""Graph passes, one a file. Each returns how often it applied; `trace` and `simplify` put them in order."""
