"""Measurements, and the scripts that make them; each writes its results under results/; README.md lists them."""
