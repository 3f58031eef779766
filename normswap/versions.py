"""The version of an installed package, ours included."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str:
    """As pip knows it; "unknown" if it is not installed, as when normswap runs from a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
