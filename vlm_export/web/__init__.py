"""Stock transformers.js in Node, driven from Python."""
