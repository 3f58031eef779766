"""The command line, a skin over `api`: one file per command, with its options beside its work; `options.py` has those that several take,
`terminal.py` what a terminal shows and how an error ends, `app.py` puts the commands together. May import every room. No torch until a
command runs.
"""
