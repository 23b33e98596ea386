"""A caption of a picture, by ONNX Runtime alone: python caption.py model.onnx photo.jpg"""

import sys

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image

session = InferenceSession(sys.argv[1])
photo = np.asarray(Image.open(sys.argv[2]).convert("RGB"))
[texts] = session.run(["texts"], {"image": photo, "options": np.zeros(0, np.float32)})
print(bytes(texts).decode())
