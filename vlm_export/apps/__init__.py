"""What uses an exported repo: `run`, `serve`, the demo page, and PyTorch where the graphs cannot."""
