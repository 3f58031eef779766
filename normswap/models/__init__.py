"""Any nn.Module, and nothing about norms: to copy it, to feed it, to run it in float64, to read the graph of its code.
May import `errors` alone.
"""
