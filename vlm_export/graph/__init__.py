"""A component's graph: traced without weights, rewritten, simplified, kept, and written with a checkpoint's."""
