"""Finds the norms of a model and decides which of them are swapped. Changes nothing. May import `models`.

`sites.py` has the data: Site, Trace, Rule, Plan. `trace.py` finds the sites, through one of its back-ends (`fx_backend.py`,
`walk_backend.py`); `functional.py` and `handwritten.py` find norms that are not modules, and `calls.py` makes sites of them.
`match.py` makes a Plan from a Trace and rules. `facts.py` and `hazards.py` collect what `inspect` prints besides the plan.
"""
