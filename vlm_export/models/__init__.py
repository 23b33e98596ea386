"""What is traced: PyTorch modules around transformers' own, whose attention and rotation become operators of ONNX Runtime."""
