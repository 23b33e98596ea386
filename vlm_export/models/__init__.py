"""What is traced: modules around transformers' own, whose attention and rotation become operators of ONNX Runtime."""
