"""BatchlessNorm: the layer, its formulas, its forward and backward pass in train mode, and what happens when an optimizer steps.

Read `batchless_norm` (the layer) and `formulas` first, then `optimizer_step` (how statistics learn). May import `errors` alone.
"""
