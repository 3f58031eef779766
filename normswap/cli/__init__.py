"""The command line: one file per command, which reads the options, calls `api`, prints with `report`, and exits. May import every room."""
