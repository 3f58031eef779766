"""Reads and writes model files: those of torch.save, safetensors, pickles that are read without running them, and converted directories,
which appear whole or not at all. May import `models` and `layer`.
"""
