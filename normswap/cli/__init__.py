"""The command line, a thin layer over `api`: one file per command; `options.py` has the options that several commands share,
`terminal.py` prints results, progress and errors, `app.py` puts the commands together. May import every room. torch is imported only when
a command runs.
"""
