"""The judge: measures whether two models, or a model and an ONNX file, compute the same function with the same precision.

`judge.py` explains the rule; its functions are `judge`, for a reference, and `compare`, for a candidate. May import `models` and `layer`.
"""
