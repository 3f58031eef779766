"""Makes the converted model that a Plan describes, and takes a converted one back. May import `detect`, `models` and `layer`.

`apply.py` makes the converted model, `calibrate.py` sets its statistics from data where the Plan has approximate swaps, and `revert.py`
restores the original norms.
"""
