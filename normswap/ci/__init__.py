"""A check of models in other people's continuous integration: the pytest plugin, `plugin.py`. May import every room but `cli`.

pytest imports the plugin at its start, so nothing else is imported there before a test needs it.
"""
