"""The judge: whether two models, or a model and an ONNX file, compute the same function, and as precisely as the original does.

`judge.py` explains the rule and has both verbs (`judge` a reference, `compare` a candidate). May import `models` and `layer`.
"""
