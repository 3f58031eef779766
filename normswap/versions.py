"""The versions of installed packages, ours included."""

from __future__ import annotations

import platform
from importlib import metadata

REPORT_VERSION = 1  # of report.json, as docs/report.md describes it
PACKAGES = ("normswap", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "safetensors", "numpy")


def version_of(package: str) -> str:
    """As pip knows it; "unknown" if it is not installed, as when normswap runs from a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Of Python and of each package that can change a number and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
