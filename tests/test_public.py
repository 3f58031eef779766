"""Who may import whom (docs of the layout: the design's "Layout"), how heavy an import is, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import normswap

NOTHING: frozenset[str] = frozenset()
DATA = frozenset({"errors", "numerics", "parity", "plan", "inputs", "functional", "sharing", "outputs", "exported", "probes", "taps"})
STAGE = DATA | {"batchless"}  # and never another stage

# By the first part of a module's name below `normswap`. A module that is not here has no place yet: give it one on purpose.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": NOTHING,
    "numerics": NOTHING,
    "parity": NOTHING,
    "precision": NOTHING,
    "moments": NOTHING,
    "versions": NOTHING,
    "taps": NOTHING,
    "functional": NOTHING,
    "graphs": NOTHING,
    "super_calls": frozenset({"errors", "functional", "graphs"}),
    "calls": frozenset({"functional", "graphs", "super_calls"}),
    "call_sites": frozenset({"calls", "errors", "graphs", "plan", "sharing", "super_calls"}),
    "interrupts": NOTHING,
    "wellformed": NOTHING,
    "external_data": frozenset({"errors"}),
    "outputs": frozenset({"errors", "interrupts", "external_data"}),
    "specs": frozenset({"errors"}),
    "exported": frozenset({"errors", "inputs", "wellformed"}),
    "sharing": frozenset({"errors"}),
    "archives": NOTHING,
    "inputs": frozenset({"errors", "archives", "sharing"}),
    "pickles": frozenset({"errors", "wellformed"}),
    "plan": frozenset({"errors", "numerics"}),
    "autograd": frozenset(),
    "injection": frozenset({"stepping", "autograd"}),
    "sharded": NOTHING,
    "joined": NOTHING,
    "stepping": frozenset({"errors", "numerics", "coupling", "feedback", "joined", "sharded"}),
    "coupling": frozenset({"numerics", "joined", "sharded"}),
    "feedback": frozenset({"joined", "numerics"}),
    "guard": frozenset({"numerics"}),
    "train_pass": frozenset({"autograd", "coupling", "feedback", "guard", "numerics"}),
    "batchless": frozenset(
        {"errors", "numerics", "plan", "injection", "stepping", "coupling", "feedback", "guard", "sharded", "train_pass"}
    ),
    "probes": frozenset({"errors", "inputs", "parity", "sharing"}),
    "runners": DATA | {"kernels", "precision", "onnx_file"},
    "rules": STAGE | {"calls", "graphs", "precision", "specs", "super_calls"},
    "load": STAGE | {"pickles", "specs", "wellformed", "archives", "saved_transformers"},
    "saved_transformers": frozenset({"outputs"}),
    "trace": STAGE | {"call_sites", "calls", "graphs", "super_calls"},
    "match": STAGE,
    "traps": frozenset({"functional", "graphs"}),
    "facts": STAGE | {"calls", "traps"},
    "swap": STAGE | {"calls", "graphs", "coupling", "super_calls"},
    "calibrate": STAGE | {"moments"},
    "verify": STAGE | {"runners", "second_look"},
    "kernels": NOTHING,
    "second_look": DATA | {"batchless", "runners"},
    "locate": DATA | {"precision", "runners", "second_look"},
    "rollback": NOTHING,
    "onnx_file": frozenset({"errors"}),
    "cuda": NOTHING,
    "attention": frozenset({"quiet", "sharing"}),
    "fused": NOTHING,
    "half": frozenset({"errors", "sharing", "folding"}),
    "quiet": NOTHING,
    "lean": frozenset({"quiet"}),
    "exporting": frozenset(
        {"errors", "batchless", "numerics", "sharing", "injection", "quiet", "lean", "folding", "onnx_file", "versions"}
    ),
    "export": STAGE | {"exporting", "folding", "onnx_file", "cuda", "attention", "half", "fused"},
    "fold": STAGE | {"folding", "versions", "onnx_file", "lean"},
    "folding": frozenset({"errors", "numerics", "taps"}),
    "recipe_checks": frozenset({"batchless", "numerics"}),
    "save": STAGE | {"coupling", "versions", "recipe_checks"},
    "report": frozenset({"parity", "plan", "versions"}),
    "training": STAGE | {"injection", "stepping", "coupling"},
    "pipeline": STAGE | {"training", "rules", "trace", "match", "facts", "swap", "calibrate", "verify", "graphs"},
    # Orchestrates stages as `pipeline` does, and asks `pipeline` for what they decide.
    "sensitivity": STAGE | {"pipeline", "rules", "swap", "calibrate", "runners", "versions"},
    "landscape": STAGE | {"runners", "stepping"},
    "__init__": STAGE | {"landscape", "training", "commands", "pipeline", "rules", "export", "facts", "swap", "sensitivity"},
    "commands": STAGE
    | {"calibrate", "pipeline", "sensitivity", "rules", "specs", "runners", "load", "swap", "verify", "export", "fold", "save", "report"}
    | {"graphs", "cuda", "half", "locate", "interrupts", "landscape", "rollback", "external_data", "recipe_checks", "training"},
    "cli": frozenset(
        {"errors", "commands", "interrupts", "report", "versions"}
    ),  # report: `verify` has a Parity to show and no Report around it
    "__main__": frozenset({"cli"}),
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) for every import of ours that runs, wherever it stands; `import normswap` and a public name give "__init__"."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports of ours are written in full"
            names = [f"normswap.{alias.name}" for alias in node.names] if node.module == "normswap" else [node.module or ""]
        for name in names:
            if name.partition(".")[0] == "normswap":
                part = [*name.split("."), "__init__"][1]
                yield node.lineno, part if part in MAY_IMPORT or _is_module(part) else "__init__"


def _is_module(name: str) -> bool:
    package = Path(normswap.__file__).parent
    return (package / f"{name}.py").exists() or (package / name / "__init__.py").exists()


def violations(module: str, source: str) -> list[str]:
    if module not in MAY_IMPORT:
        return [f"{module} is not in the import table"]
    allowed = MAY_IMPORT[module] | {module}
    return [f"{module} imports {name} (line {line})" for line, name in imported(source) if name not in allowed]


def test_every_module_imports_only_what_it_may() -> None:
    package = Path(normswap.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).with_suffix("").parts[0]
        found += [f"{path.relative_to(package)}: {violation}" for violation in violations(part, path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("match", "from normswap.swap import swap", ["match imports swap (line 1)"]),
        ("match", "def late():\n    import normswap.swap", ["match imports swap (line 2)"]),
        ("match", "from normswap import swap as s, errors", ["match imports swap (line 1)"]),
        ("match", "from normswap import convert", ["match imports __init__ (line 1)"]),
        ("pipeline", "from normswap import cli", ["pipeline imports cli (line 1)"]),
        ("trace", "from normswap.folding import affine", ["trace imports folding (line 1)"]),
        ("novelty", "", ["novelty is not in the import table"]),
        ("match", "from normswap.plan import Plan\nimport torch\nfrom normswap import errors", []),
        ("rules", "from normswap.rules import tensors", []),
        ("errors", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from normswap.parity import Parity", []),
        ("errors", "if True:\n    from normswap.parity import Parity", ["errors imports parity (line 2)"]),
    ],
)
def test_the_check_finds_what_is_planted(module: str, source: str, found: list[str]) -> None:
    assert violations(module, source) == found


def test_nothing_imports_the_command_line() -> None:
    assert [module for module, allowed in MAY_IMPORT.items() if "cli" in allowed] == ["__main__"]


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
    code = (
        f"import sys\nsys.argv[1:] = {arguments.split()!r}\nfrom normswap.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    )
    loaded = loaded_by(code)
    assert "typer" in loaded
    assert not {"torch", "onnx", "onnxruntime", "numpy", "matplotlib"} & loaded


TRAINING = {"aux_loss", "attach", "param_groups", "masked", "norm_keys", "backward_in_micro_batches", "for_opacus"}
CONTRACT = TRAINING | {"plan", "convert", "verify", "export_onnx", "save", "load", "revert", "BatchlessNorm", "DEFAULT_RULES"}


def test_the_contract_is_public() -> None:
    assert set(normswap.__all__) >= CONTRACT
    assert len(set(normswap.__all__)) == len(normswap.__all__)


def test_all_is_what_is_public() -> None:
    ours = [name for name in dir(normswap) if name[0] != "_" and getattr(getattr(normswap, name), "__module__", "").startswith("normswap")]
    assert set(ours) <= set(normswap.__all__)
    for name in normswap.__all__:
        assert getattr(normswap, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        normswap.no_such_name  # noqa: B018


def test_a_public_function_is_not_hidden_by_the_module_of_its_name() -> None:
    """Importing `normswap.plan` makes the module an attribute of the package, in the place of the function."""
    modules = [name for name in ("plan", "verify", "load", "save", "swap", "pipeline") if _is_module(name)]
    names = [name for name in ("plan", "convert", "verify", "export_onnx", "save", "load", "revert") if name in normswap.__all__]
    assert names
    script = (
        f"import normswap, {', '.join(f'normswap.{m}' for m in modules)}\nassert all(callable(getattr(normswap, n)) for n in {names!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
