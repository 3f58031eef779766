"""Model files, in and out: what torch saves, safetensors, pickles that are read without being run, and converted directories,
which appear whole or not at all. May import `models` and `layer`.
"""
