"""Writes a verified ONNX file of a model, and folds an ONNX file that another tool wrote. The only package that calls `folding`.
May import that, `detect`, `parity`, `files`, `models` and `layer`.
"""
