"""The pytest plugin, in real runs of pytest: what passes, what fails and how that reads, and that nobody else pays for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from junit_schema import cases_of
from lxml import etree

from normswap.ci import plugin

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
OFF = ["layer     4", "probe     example", "figure    error ", "cause     it differs in float64"]


def run(pytester: pytest.Pytester, *arguments: object) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *map(str, arguments), plugins=[plugin])


# --- the fixture -------------------------------------------------------------------------------------------------------------------------


def test_the_same_function_passes(pytester: pytest.Pytester, models: Path) -> None:
    pytester.makepyfile(
        f"""
        import torch
        from normswap.demo import digits

        def test_directory(normswap_verify):
            assert normswap_verify({str(models / "digits.pt")!r}, {str(models / "digits")!r}).passed

        def test_modules_and_inputs(normswap_verify):
            parity = normswap_verify(digits(), digits(), torch.rand(3, 1, 8, 8), tolerance=1e-5)
            assert parity.max_rel < 1e-5
        """
    )
    done = run(pytester, "--junitxml", "out.xml", "-W", "error")
    done.assert_outcomes(passed=2)
    assert set(cases_of(pytester.path / "out.xml").values()) == {"passed"}  # pytest's own file: the schema is not of our making alone
    found = {each.get("name") for each in etree.parse(pytester.path / "out.xml").iter("property")}
    assert {"normswap_passed", "normswap_max_rel", "normswap_candidate"} <= found


def test_a_bias_off_by_a_thousandth_fails_and_is_named(pytester: pytest.Pytester, broken: Path) -> None:
    pytester.makepyfile(f"def test(normswap_verify): normswap_verify({str(broken / 'digits.pt')!r}, {str(broken / 'off.pt')!r})")
    done = run(pytester)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([f"*{line}*" for line in OFF])
    text = done.stdout.str()
    said = text[text.index("not the same function") : text.index("= short test summary")].splitlines()
    assert len(said) <= 10
    assert "Traceback" not in text


def test_a_mistake_of_the_user_is_no_traceback(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(normswap_verify): normswap_verify('missing.pt', 'missing.onnx')")
    done = run(pytester)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*there is no file missing.pt*", "*hint: *"])
    assert "plugin.py" not in done.stdout.str()


# --- pytest --normswap DIR ---------------------------------------------------------------------------------------------------------------


def test_a_directory_is_a_test_for_its_source_and_one_for_each_file(pytester: pytest.Pytester, models: Path) -> None:
    done = run(pytester, "-v", "--normswap", models)
    done.assert_outcomes(passed=2)
    done.stdout.fnmatch_lines(["*digits/recipe.json::source PASSED*", "*digits/recipe.json::model.onnx PASSED*"])


def test_a_file_that_was_changed_fails(pytester: pytest.Pytester, broken: Path) -> None:
    done = run(pytester, "--normswap", broken)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*not the same function: *model.onnx and *digits*", "*figure *", "*cause *", "*starts at 4,*"])


def test_what_cannot_be_compared_is_skipped_with_the_reason(pytester: pytest.Pytester, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "digits", tmp_path / "moved")
    recipe = tmp_path / "moved" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(models / "digits.pt"), "elsewhere/gone.pt"))
    done = run(pytester, "-rs", "--normswap", tmp_path)
    done.assert_outcomes(passed=1, skipped=1)
    done.stdout.fnmatch_lines(["*its source 'elsewhere/gone.pt' is not here*"])


def test_a_recipe_that_is_none_fails(pytester: pytest.Pytester, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("[]")
    done = run(pytester, "--normswap", tmp_path)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*recipe.json is not a recipe that normswap wrote: it is no JSON object*"])


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_file_that_is_gone_fails_and_its_message_is_said_once(
    ci: str, pytester: pytest.Pytester, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models/digits/model.onnx").unlink()
    (tmp_path / "models/digits/model.pt").write_bytes(b"")
    done = run(pytester, "--normswap", tmp_path)
    done.assert_outcomes(failed=2)
    text = done.stdout.str().partition("= short test summary")[0]  # in CI, the summary repeats messages
    assert text.count("was written with model.onnx, which is not there any more\nhint: ") == 1
    assert text.count("model.pt was changed after it was written: its SHA-256 is not the one in recipe.json\nhint: ") == 1
    assert "exception" not in text


def test_if_nothing_can_be_compared_it_fails(pytester: pytest.Pytester, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "digits", tmp_path / "moved")
    recipe = json.loads((tmp_path / "moved/recipe.json").read_text())
    del recipe["files"]["model.onnx"]
    (tmp_path / "moved/model.onnx").unlink()
    (tmp_path / "moved/recipe.json").write_text(json.dumps(recipe | {"source": "elsewhere/gone.pt"}))
    pytester.makepyfile("def test(): pass")
    done = run(pytester, ".", "--normswap", tmp_path)
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["nothing can be compared: its source 'elsewhere/gone.pt' is not here"])


def test_a_hint_names_the_options_of_pytest(pytester: pytest.Pytester, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "digits", tmp_path / "own")
    recipe = tmp_path / "own/recipe.json"
    recipe.write_text(recipe.read_text().replace('"factory": null', '"factory": "own_code:net"'))
    done = run(pytester, "--normswap", tmp_path)
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*recipe.json names 'own_code:net' as what builds the model*", "hint: --normswap-trust runs it, *"])


def test_a_folder_without_a_converted_model_is_a_usage_error(pytester: pytest.Pytester, tmp_path: Path) -> None:
    done = run(pytester, "--normswap", tmp_path)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"ERROR: --normswap {tmp_path}: no converted directory is there; *"])
    done = run(pytester, "--normswap", tmp_path / "gone")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"ERROR: --normswap {tmp_path}/gone: there is no such directory; *"])


def test_a_recipe_is_only_collected_where_it_was_asked_for(pytester: pytest.Pytester, models: Path) -> None:
    shutil.copytree(models, pytester.path / "models")
    pytester.makepyfile("def test(): pass")
    run(pytester).assert_outcomes(passed=1)
    run(pytester, "--normswap", "models").assert_outcomes(passed=3)


# --- those who do not use it -------------------------------------------------------------------------------------------------------------

FREE = """
import sys, pytest
assert pytest.main(["-p", "normswap.ci.plugin", "-p", "no:cacheprovider", "-W", "error", "-q"]) == 0
heavy = {"torch", "numpy", "onnx", "rich", "typer", "normswap.api", "normswap.errors"} & set(sys.modules)
assert not heavy, heavy
"""


def test_it_imports_nothing_unless_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test(): pass")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", FREE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_workers_check_each_directory_once(models: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["-m", "pytest", "-p", "normswap.ci.plugin", "-p", "no:cacheprovider", "-n", "2", "--normswap", models, "-W", "error"]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
