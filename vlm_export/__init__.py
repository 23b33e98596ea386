"""Turn a fine-tuned vision-language model into a repo that stock transformers.js loads, and prove it says the same."""

__version__ = "0.1.0"
