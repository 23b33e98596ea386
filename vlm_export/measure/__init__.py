"""How fast and how large: load time, first token, tokens a second, memory, side by side."""
