"""What is converted: a recipe's model and adapters as folders; their config, tensors, tokenizer, generation rules."""
