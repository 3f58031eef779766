"""`normswap verify DIR`: what each directory that is not as it was written says, and that it keeps no other from being checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from junit_schema import cases_of
from own_net import CODE, NET
from typer.testing import CliRunner

from normswap.cli.app import app
from normswap.cli.convert import ConvertOptions, convert_to_directory

ROOT = Path(__file__).parents[2]


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the folder, which may be changed; its source lies beside the converted directory."""
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    recipe = copy / "digits" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(models / "digits.pt"), "digits.pt"))
    return copy


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


NOT_THERE = "{0} was written with {1}, which is not there any more\n  hint: was the directory copied, or committed, whole? "
WRONG: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "an ONNX file is gone": ("model.onnx", Path.unlink, ("error: {0}/model.onnx: " + NOT_THERE,)),
    "the weights are gone": ("model.safetensors", Path.unlink, ("error: {0}: " + NOT_THERE,)),
    "the model is gone": ("model.pt", Path.unlink, ("error: {0}: " + NOT_THERE, "error: {0}/model.onnx: there is no file {0}/model.pt")),
    "an ONNX file is cut off": ("model.onnx", cut, ("error: {0}/model.onnx: {0}/model.onnx is not an ONNX file, or it was cut off",)),
    "the weights are cut off": ("model.safetensors", cut, ("error: {0}: {0}/{1} was changed after it was written",)),
    "the recipe is cut off": ("recipe.json", cut, ("error: {0}: {0}/recipe.json is not a recipe that normswap wrote: ",)),
    "a newer recipe": ("recipe.json", newer, ("error: {0}: {0}/recipe.json is a recipe of version 99; expected 1\n  hint: ",)),
    "the report is cut off": ("report.json", cut, ("error: {0}: {0}/report.json is not a report that normswap wrote: ",)),
    "a newer report": ("report.json", newer, ("error: {0}: {0}/report.json is a report of version 99; expected 1\n  hint: ",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_directory_is_said_and_the_next_one_is_checked(name: str, folder: Path) -> None:
    file, change, expected = WRONG[name]
    bad = folder / "bad"
    shutil.copytree(folder / "digits", bad)
    change(bad / file)
    done = verify(folder, "--junit", folder / "out.xml")
    assert done.exit_code == 3
    assert [line for line in expected if line.format(bad, file) not in done.stdout] == []
    assert "Traceback" not in done.stdout + done.stderr
    assert "\\n" not in done.stdout
    assert "None" not in done.stdout
    cases = cases_of(folder / "out.xml")
    passed = [case for case in cases if "digits/model.onnx against" in case]
    assert passed
    assert all(cases[case] == "passed" for case in passed)
    assert "\\n" not in (folder / "out.xml").read_text()


def test_a_function_that_is_another_is_named_with_its_figure_and_its_cause(broken: Path) -> None:
    done = verify(broken)
    assert done.exit_code == 3
    _, _, said = done.stdout.partition("FAILED: 1 of 2 comparisons passed, 1 failed\n")
    first, *rest = said.splitlines()
    assert first == f"not the same function: {broken}/digits/model.onnx and {broken}/digits"
    assert [line.split()[0] for line in rest] == ["output", "probe", "figure", "cause", "starts", "in", "compared"]


def test_the_reports_may_be_gone(folder: Path) -> None:
    for name in ("report.json", "report.html"):
        (folder / "digits" / name).unlink()
    assert verify(folder).exit_code == 0


@pytest.mark.parametrize("source", ["digits.pt", "models/digits.pt", "elsewhere/digits.pt"])
def test_the_source_is_found_from_any_directory(source: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the directory, or where it was named from: the root of the repository, say."""
    recipe = folder / "digits" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"source": "digits.pt"', f'"source": "{source}"'))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    done = verify("../models")
    assert done.exit_code == 0
    assert "2 of 2 comparisons passed" in done.stdout


# --- models of one's own -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """whole/ of a pickled module of one's own class, weights/ of a state dict, made/ of a factory."""
    (tmp_path / f"{NET}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(NET)
    torch.manual_seed(1)
    net = module.Net()
    torch.save(net, "whole.pt")
    torch.save(net.state_dict(), "weights.pt")
    inputs = ["2x1x6x5"]
    convert_to_directory("whole.pt", Path("out/whole"), ConvertOptions(trust_packages=[NET], inputs=inputs))
    convert_to_directory("weights.pt", Path("out/weights"), ConvertOptions(arch=f"{NET}:net", inputs=inputs))
    convert_to_directory(f"{NET}:net", Path("out/made"), ConvertOptions(inputs=inputs))
    sys.modules.pop(NET)
    yield tmp_path / "out"
    sys.modules.pop(NET, None)


def test_code_that_nobody_vouched_for_fails_and_says_what_to_do(own: Path) -> None:
    done = verify(own)
    assert done.exit_code == 3
    assert "FAILED: 0 of 6 comparisons passed, 6 failed" in done.stdout
    named = f"error: {own}/weights: recipe.json names '{NET}:net' as what builds the model, and to import that is to run code\n"
    assert f"{named}  hint: --trust runs it, if these files are your own" in done.stdout
    assert f"  hint: --trust-package {NET} allows nn.Module classes from there" in done.stdout
    assert NET not in sys.modules


def test_the_page_says_how_to_load_it(own: Path) -> None:
    assert f"normswap.load(&#39;out/whole&#39;, trust_packages=[&#39;{NET}&#39;])" in (own / "whole/report.html").read_text()


def test_what_was_vouched_for_is_compared(own: Path) -> None:
    assert verify(own / "whole", "--trust-package", NET).exit_code == 0
    assert verify(own / "weights", "--trust-package", NET).exit_code == 3  # to call a function is more than to use its classes
    done = verify(own, "--trust")
    assert done.exit_code == 0
    assert "6 of 6 comparisons passed" in done.stdout


def test_a_source_that_is_code_is_not_imported_on_the_word_of_a_recipe(folder: Path, own: Path) -> None:
    recipe = folder / "digits" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"source": "digits.pt"', f'"source": "{NET}:net"'))
    done = verify(folder)
    assert (done.exit_code, NET in sys.modules) == (3, False)
    assert f"recipe.json names '{NET}:net' as what builds the model" in done.stdout


def test_pytest_and_the_classes_of_a_package(own: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "normswap.ci.plugin", "-p", "no:cacheprovider", "--normswap", str(own / "whole")]
    options = ("--normswap-trust-package", NET)
    done, refused = (
        subprocess.run([*command, *more], cwd=own.parent, env=environment, capture_output=True, text=True) for more in (options, ())
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert f"hint: --normswap-trust-package {NET} allows nn.Module classes from there" in refused.stdout
