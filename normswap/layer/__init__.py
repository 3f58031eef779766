"""BatchlessNorm: its formulas, its forward and backward pass in train mode, and how its statistics step with an optimizer.
May import `errors` alone.
"""
