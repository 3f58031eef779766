"""Writes models/digits.pt, a trained model with BatchNorm, and converts it into models/digits/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from normswap.demo import digits

MODELS = Path(__file__).parent / "models"

if __name__ == "__main__":
    MODELS.mkdir(exist_ok=True)
    torch.save(digits(), MODELS / "digits.pt")
    command = [sys.executable, "-m", "normswap", "convert", "models/digits.pt", "-o", "models/digits"]
    raise SystemExit(subprocess.run(command, cwd=MODELS.parent).returncode)
