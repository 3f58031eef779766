"""Acts on a Plan: makes the converted model, sets its statistics from data where the Plan asks for that, and goes back to the norms
that were there. May import `detect`, `models` and `layer`.
"""
