"""The verbs of `import normswap`: convert, inspect, verify, export, fold, save, load, sensitivity, landscape. `convert.py` has the
stages in their order and is the file to read first. May import every room but `cli` and `report`.
"""
