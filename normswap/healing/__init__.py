"""Trains a converted model towards its original, without labels, until their outputs are close: distillation.

May import `files`, `layer`, `models` and `errors`. `run` has the loop: read it first.
"""
