"""What is public, how heavy an import is, and what lies beside the rooms. Who may import whom is in pyproject.toml, for `lint-imports`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import normswap

PACKAGE = Path(normswap.__file__).parent


def test_only_the_ground_lies_beside_the_rooms() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "versions"}


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_a_room_says_what_it_is_for_and_what_it_may_import(room: str) -> None:
    docstring = (PACKAGE / room / "__init__.py").read_text().split('"""')[1]
    assert "ay import " in docstring or "mports nothing" in docstring, docstring


def loaded_by(code: str) -> set[str]:
    """The top-level packages in memory after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr.split())


def test_the_library_is_light() -> None:
    loaded = loaded_by("import normswap")
    assert "normswap" in loaded
    assert not {"onnx", "onnxruntime", "onnxscript", "onnx_ir", "typer", "rich", "torchvision", "timm", "matplotlib"} & loaded


@pytest.mark.parametrize("arguments", ["--help", "--version", "convert --help"])
def test_help_is_light(arguments: str) -> None:
    run = "from normswap.cli.app import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    code = f"import sys\nsys.argv[1:] = {arguments.split()!r}\n{run}"
    loaded = loaded_by(code)
    assert "typer" in loaded
    assert not {"torch", "onnx", "onnxruntime", "numpy", "matplotlib"} & loaded


TRAINING = {"drift", "couple", "aux_loss", "attach", "param_groups", "masked", "norm_keys", "backward_in_micro_batches", "for_opacus"}
CONTRACT = TRAINING | {
    "plan",
    "inspect",
    "convert",
    "verify",
    "export_onnx",
    "fold_onnx",
    "save",
    "load",
    "revert",
    "BatchlessNorm",
    "DEFAULT_RULES",
}


def test_the_contract_is_public() -> None:
    assert set(normswap.__all__) >= CONTRACT
    assert len(set(normswap.__all__)) == len(normswap.__all__)


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(normswap) == sorted(normswap.__all__)
    for name in normswap.__all__:
        assert getattr(normswap, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        normswap.no_such_name  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert normswap.__version__.count(".") == 2


def test_a_public_name_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a test or a notebook does it: what is set is what is called."""
    monkeypatch.setattr(normswap, "convert", lambda model: "mine")
    assert normswap.convert(None) == "mine"


def test_no_submodule_bears_a_public_name() -> None:
    """Importing it would put the module in the place of the function."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert not modules & set(normswap.__all__)


@pytest.mark.parametrize("name", sorted(set(normswap.__all__) - {"__version__", "DEFAULT_RULES"}))
def test_a_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(normswap, name))
