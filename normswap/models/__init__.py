"""Tools for any nn.Module, which know nothing of norms: copy it, make inputs for it, run it in float64, trace its code.
May import `errors` alone.
"""
