"""The functions of `import normswap`: convert, inspect, verify, export, fold, save, load, sensitivity, landscape. Read `convert.py`
first, which has the stages of a conversion in order. May import every room but `cli` and `report`.
"""
