"""Where the norms of a model are: a Trace of what was called, in which order, and the Plan that is made of it. Changes nothing.
May import `models` and `layer`.
"""
