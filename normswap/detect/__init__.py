"""Where the norms of a model are, and what is decided about each. Changes nothing. May import `models`.

`sites.py` has the data: Site, Trace, Rule, Plan. `trace.py` finds the sites, through one of its back-ends (`fx_backend.py`,
`walk_backend.py`); `functional.py` and `handwritten.py` find norms that are no modules, and `calls.py` says whose code they are in.
`match.py` makes a Plan of a Trace and rules. `facts.py` and `hazards.py` are what `inspect` says besides.
"""
