"""The benchmark of the judge: its faults are faults, what is right is not taken for one, and nothing is measured twice.

Everything is measured by `python -m benchmarks.judge`; the last result is in docs/judge.md.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import normswap
from benchmarks import judge, judge_faults, judge_nets
from benchmarks.judge_faults import Truth, in_runtime, outputs_of, plain_export, planted, seed_of, wide
from benchmarks.libraries import Case
from fixtures.faults import EVERY_LAYER, IN_TORCH, KINDS, OF_LAYERS, OF_NORMS, OF_THE_BATCH, fold_norms, in_onnx, in_torch
from fixtures.nets import randomise

ONLY_IN_TORCH = (OF_THE_BATCH, "bfloat16 by autocast")
SMALL = ("a user's", "dead channels", "groups and products", "conv_and_norm_twice", "pre_activation")
NETS = {case.name: case for case in judge_nets.planted()}


@functools.cache
def made(name: str) -> tuple[nn.Module, Any, Truth, nn.Module]:
    """(a net, its arguments, its truth, the net converted)."""
    model, arguments = NETS[name].make()
    return model, arguments, Truth(model, arguments), normswap.convert(model, arguments).model


@functools.cache
def plain_file(name: str) -> bytes:
    model, _, truth, _ = made(name)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        plain_export(model, truth.probes[0], Path(directory) / "plain.onnx")
        return (Path(directory) / "plain.onnx").read_bytes()


# -- the faults ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_applies_to_some_module_and_moves_its_output(kind: str) -> None:
    most = 0.0
    for name in SMALL:
        _, _, truth, right = made(name)
        before = {key: tensor.clone() for key, tensor in right.state_dict().items()}
        faulty = in_torch(kind, right, lambda m, truth=truth: outputs_of(m, truth.probes[0]), seed_of(NETS[name], kind))  # type: ignore[misc]
        assert all(torch.equal(tensor, before[key]) for key, tensor in right.state_dict().items())
        if faulty is not None:
            dtypes = [t.dtype for t in outputs_of(copy.deepcopy(faulty), truth.probes[0])]
            own = functools.partial(outputs_of, copy.deepcopy(faulty))
            times = max(truth.worst(run, truth.noise, flat=False)[0] for run in (own, wide(faulty)))
            most = max(most, times if dtypes == truth.dtypes else float("inf"))
    assert most > 1, "it applies nowhere, or does nothing"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ONLY_IN_TORCH])
def test_every_kind_applies_to_some_file_and_moves_its_output(kind: str, tmp_path: Path) -> None:
    most = 0.0
    for name in SMALL:
        _, _, truth, _ = made(name)
        right = onnx.load_from_string(plain_file(name))
        row = outputs_of(made(name)[0], truth.probes[0])[0][:1].numpy()
        faulty = in_onnx(kind, right, row, seed_of(NETS[name], kind))
        assert right.SerializeToString() == onnx.load_from_string(plain_file(name)).SerializeToString()
        if faulty is not None:
            run = in_runtime(faulty, tmp_path / "faulty.onnx")
            same = [t.dtype for t in run(truth.probes[0])] == truth.dtypes
            most = max(most, truth.worst(run, truth.noise, flat=True)[0] if same else float("inf"))
    assert most > 1, "it applies nowhere, or does nothing"


@pytest.mark.parametrize("name", SMALL)
def test_what_is_right_is_no_fault(name: str, tmp_path: Path) -> None:
    model, _, truth, right = made(name)
    assert truth.worst(lambda probe: outputs_of(model, probe), truth.noise, flat=True)[0] <= 1
    assert truth.worst(wide(right), truth.noise, flat=True)[0] <= 1
    proto = onnx.load_from_string(plain_file(name))
    for folded in (False, True):
        if folded:
            fold_norms(proto)
        run = in_runtime(proto, tmp_path / "right.onnx")
        assert truth.worst(run, truth.noise, flat=True)[0] < judge.MUST / 2


def test_a_fold_of_norms_leaves_none_behind_a_conv() -> None:
    proto = onnx.load_from_string(plain_file("a user's"))
    assert "BatchNormalization" in {node.op_type for node in proto.graph.node}
    fold_norms(proto)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


@pytest.mark.parametrize("kind", [*OF_NORMS, OF_THE_BATCH])
def test_faults_of_norms_need_a_norm(kind: str) -> None:
    assert in_torch(kind, nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), lambda model: None, 0) is None


@pytest.mark.parametrize("kind", [*OF_LAYERS, *IN_TORCH])
def test_faults_of_layers_need_a_layer(kind: str) -> None:
    def run(model: nn.Module) -> Any:
        return model(torch.randn(2, 4, 3, 3))

    assert in_torch(kind, randomise(nn.BatchNorm2d(4), 1).eval(), run, 0) is None


def test_the_truth_has_a_scale_that_no_small_input_takes_away() -> None:
    truth = Truth(nn.Linear(3, 2, bias=False), torch.randn(2, 3))
    scales = {name: found[0] for name, found in truth.scales.items()}
    assert scales["batch 1 x 0.001"] == pytest.approx(1e-3 * max(scales[name] for name in ("example", "batch 1", "batch 3")))
    assert scales["batch 1 x 1000"] == pytest.approx(1000 * scales["batch 1"])
    assert truth.moved("batch 1", [torch.zeros(1, 2)]) == [pytest.approx(1)]
    assert truth.moved("batch 1", [torch.full((1, 2), float("nan"))]) == [float("inf")]
    assert truth.moved("batch 1", [torch.zeros(1, 3)]) == truth.moved("batch 1", []) == [float("inf")]


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_faults_in_a_trained_net_are_caught(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a third of the kinds, of norms, of layers and of functions alike."""
    kinds = KINDS[::every]
    monkeypatch.setattr(judge_faults, "KINDS", kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        record = planted(NETS["digits"])
    assert record["refused"] == {}
    assert judge.missed(record["rows"]) == []
    found = {(row["kind"], row["path"]) for row in record["rows"]}
    asked = {(kind, path) for kind in (*OF_NORMS, *EVERY_LAYER) if kind in kinds for path in ("torch", "onnx")}
    assert asked
    assert asked - found <= {
        (kind, path) for kind in ("the bias of a dead channel", "statistics of the neighbour") for path in ("torch", "onnx")
    }
    assert sum(row["caught"] for row in record["rows"]) > 0.8 * len(record["rows"])


# -- what is right -------------------------------------------------------------------------------------------------------------------------


def test_the_slices() -> None:
    slices = [name for name in judge.SLICES if name != "real"]
    cases = judge.cases_of(slices)
    assert len({(case.family, case.name) for case in cases}) == len(cases)
    counts = {name: sum(case.family == name for case in cases) for name in slices}
    assert counts["faults"] >= 30
    assert counts["torchvision"] >= 121
    assert counts["timm"] == 314 + 2 * 5
    assert counts["transformers"] == 147
    assert counts["random"] == 300


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rapidocr_onnxruntime", "basic_pitch"))), reason="the packages with real files are not installed"
)
def test_real_models_and_files() -> None:
    cases = judge.cases_of(["real"])
    assert len(cases) == len(judge_nets.REAL) + 4
    record = judge.measure(next(case for case in cases if case.name.endswith("cls_infer.onnx")))
    assert record["name"] == "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    assert set(record["refused"]) <= {"fold"}


@pytest.mark.parametrize("name", [pytest.param("small 7", marks=pytest.mark.slow), "small 12", "graph 1"])  # small 7 is judged below
def test_a_right_conversion_passes(name: str) -> None:
    record = judge.measure(next(case for case in judge.cases_of(["random"]) if case.name == name))
    assert record["refused"] == {}
    assert record["files"]
    assert record["cannot"] == {}


def test_a_model_of_which_no_file_can_be_made_is_not_refused() -> None:
    record = judge.measure(next(case for case in judge.cases_of(["random"]) if case.name == "graph 3"))
    assert record["refused"] == {}
    assert "torch cannot make an ONNX graph" in record["cannot"]["export"]
    assert judge.state(record).startswith("no file: ")


def test_whatever_stops_a_conversion_is_a_refusal() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("never")

    record = judge.measure(Case("timm", "fails", lambda: (Fails(), torch.randn(2, 3))))
    assert "never" in record["refused"]["convert"]


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RESULTS", "RAW", "PAGE"):
        monkeypatch.setattr(judge, name, tmp_path / "new" / name if name == "RESULTS" else tmp_path / name)
    judge.PAGE.write_text(f"# A page\n\n{judge.BEGIN}\n{judge.END}\nand more\n")
    asked = ["--only", "random", "--match", "small [78]"]
    assert judge.main([*asked, "--shard", "0/2"]) == judge.main(asked) == judge.main(asked) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.endswith("to measure")] == [
        "1 of 1 models to measure",
        "1 of 2 models to measure",
        "0 of 2 models to measure",
    ]
    with judge.RESULTS.open("a") as file:
        file.write('{"family": "random", "na')  # interrupted
    assert {name for _, name in judge.recorded()} == {"small 7", "small 8"}
    assert judge.main(["report"]) == 0
    assert json.loads(judge.RAW.read_text())["slices"]["random"]["models"] == 2
    page = judge.PAGE.read_text()
    assert page.startswith("# A page\n")
    assert page.endswith("and more\n")
    assert "0 of 2 right conversions were refused" in page


# -- what is said of it --------------------------------------------------------------------------------------------------------------------

ROW = {
    "kind": "eps left out",
    "path": "onnx",
    "times": 21.0,
    "moved": 3e-6,
    "probe": "batch 1",
    "caught": False,
    "at": None,
    "judged": True,
}
SIZES = dict.fromkeys(judge.SLICES, 40)
RECORD = {"family": "faults", "name": "a net", "rows": [ROW], "refused": {}, "seconds": 2.0, "commit": "abc"}


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 1),
        ({"times": None, "moved": None}, 1),
        ({"times": 19.0}, 0),
        ({"caught": True}, 0),
        ({"times": 0.0, "moved": 0.0}, 0),
    ],
)
def test_what_must_be_caught(change: dict[str, Any], count: int) -> None:
    found = judge.summary([{**RECORD, "rows": [ROW | change]}], SIZES)
    assert len(found["missed"]) == count
    assert f"{count} of these were missed" in judge.table(found)
    assert ("* eps left out in a net, onnx: " in judge.table(found)) == bool(count)
    assert ("MISSED" in judge.state({**RECORD, "rows": [ROW | change]})) == bool(count)


def test_the_smallest_that_was_caught_is_more_than_noise() -> None:
    rows = [ROW | {"caught": True}, ROW | {"caught": True, "moved": 1e-9, "times": 0.1}, ROW | {"moved": 1e-8}]
    found = judge.summary([{**RECORD, "rows": rows}], SIZES)
    assert found["smallest caught"]["onnx"]["moved"] == 3e-6
    assert found["smallest caught"]["torch"] is None


def test_what_was_converted_only_is_measured_again_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RESULTS", "RAW", "PAGE"):
        monkeypatch.setattr(judge, name, tmp_path / name)
    judge.PAGE.write_text(f"{judge.BEGIN}\n{judge.END}\n")
    record = {"family": "transformers", "name": "Albert", "refused": {}, "files": False, "seconds": 1.0, "commit": judge.commit()}
    judge.RESULTS.write_text(json.dumps(record) + "\n")
    asked = ["--only", "transformers", "--match", "Albert"]
    for options in ([], ["--onnx"], ["--onnx"]):
        assert judge.main([*asked, *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("to measure")]
    assert [line.split()[0] for line in lines] == ["0", "1", "0"]


def test_refusals_are_listed() -> None:
    record = {"family": "timm", "name": "a|b", "refused": {"convert": "ParityError: max|x| <y>"}, "seconds": 1.0}
    text = judge.table(judge.summary([RECORD, record], SIZES))
    assert "1 of 1 right conversions were refused" in text
    assert "* timm, a|b, convert: ParityError: max\\|x\\| \\<y>" in text


def test_the_page_is_what_was_measured() -> None:
    found = json.loads(judge.RAW.read_text())
    assert judge.PAGE.read_text().partition(judge.BEGIN)[2].partition(judge.END)[0].strip() == judge.table(found).strip()
    assert found["missed"] == []


def test_a_slice_without_rows_keeps_what_was_found_before() -> None:
    refused = {"family": "torchvision", "name": "resnet18", "refused": {"convert": "no"}, "seconds": 1.0, "commit": "old"}
    before = judge.summary([{**RECORD, "commit": "old"}, refused], SIZES)
    fresh = {"family": "timm", "name": "vgg11", "refused": {}, "seconds": 1.0, "commit": "new"}
    found = judge.with_slices_of(judge.summary([fresh], SIZES), before)
    assert list(found["slices"]) == ["faults", "torchvision", "timm"]
    assert (found["faults"], found["missed"], found["commits"]) == (before["faults"], before["missed"], ["new", "old"])
    assert [row["name"] for row in found["refused"]] == ["resnet18"]

    again = judge.with_slices_of(judge.summary([fresh, refused | {"refused": {}}], SIZES), before)
    assert again["refused"] == []
    assert again["slices"]["torchvision"]["refused"] == 0
