"""A folder with a trained model, what it was converted into, and copies of that which are not the same function."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import normswap
from normswap.cli.convert import convert_to_directory
from normswap.demo import digits


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits.pt and digits/, its conversion."""
    folder = tmp_path_factory.mktemp("repository")
    torch.save(digits(), folder / "digits.pt")
    convert_to_directory(str(folder / "digits.pt"), folder / "digits")
    return folder


@pytest.fixture(scope="session")
def broken(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, in which the converted model, as a .pt and as an ONNX file, has one bias of layer 4 off by 1e-3."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(models, folder, dirs_exist_ok=True)
    conversion = normswap.convert(digits())
    with torch.no_grad():
        conversion.model[4].bias[3] += 1e-3
    torch.save(conversion.model, folder / "off.pt")
    normswap.export_onnx(conversion.model.eval(), torch.rand(2, 1, 8, 8), folder / "digits" / "model.onnx")
    return folder
