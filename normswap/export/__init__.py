"""From a model to a verified ONNX file, and the same for an ONNX file that others wrote. The only room that calls `folding`.
May import that, `detect`, `parity`, `files`, `models` and `layer`.
"""
