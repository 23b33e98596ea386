"""A graph in each dtype, a file a method: what is done to weights and activations, and what must stay float32."""
