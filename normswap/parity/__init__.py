"""The judge: whether two models, or a model and an ONNX file, compute the same, in float64 and as precisely as the original does.
May import `models` and `layer`.
"""
