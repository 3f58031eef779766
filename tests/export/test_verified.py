"""A fold that costs too many digits is undone by itself, and named; the rest stays folded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnx.numpy_helper import from_array
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.api.fold import fold_onnx
from normswap.export.any_file import fold
from normswap.export.to_onnx import Program, Settings
from normswap.export.verified import MEASURED, Attempt, search
from normswap.folding import write
from normswap.parity.judge import compare, judge
from normswap.parity.result import ParityError
from normswap.report.onnx import fold_json, fold_summary

# -- which folds -------------------------------------------------------------------------------------------------------------------------

NAMES = tuple("abcdefgh")


class Trial:
    """A file whose folds `bad` break it."""

    def __init__(self, bad: Set[str], names: Sequence[str] = NAMES) -> None:
        self.bad, self.names, self.tried = bad, names, list[frozenset[str]]()

    def __call__(self, kept: Mapping[str, str]) -> Attempt[frozenset[str]]:
        self.tried.append(frozenset(kept))
        folded = [name for name in self.names if name not in kept]
        wrong = self.bad - kept.keys()
        return Attempt(frozenset(kept), not wrong, folded, f"off by {len(wrong)}")


@pytest.mark.parametrize("bad", ["", "a", "d", "f", "h", "ab", "bg", "bcdfg", "abcdefgh"])
def test_only_what_is_wrong_is_left_out(bad: str) -> None:
    trial = Trial(set(bad))
    found = search(trial)
    assert found.passed
    assert found.result == set(bad) == trial.tried[-1]  # what is on the disk is what was returned


def test_one_of_many_takes_few_attempts() -> None:
    names = [f"norm{i}" for i in range(200)]
    for bad in (names[0], names[57], names[199]):
        trial = Trial({bad}, names)
        assert search(trial).result == {bad}
        assert len(trial.tried) <= 11


def test_attempts_end_and_what_is_left_of_the_list_is_left_out() -> None:
    names = [f"norm{i}" for i in range(400)]
    bad = set(names[100::60])
    trial = Trial(bad, names)
    found = search(trial)
    assert found.passed
    assert bad < found.result == trial.tried[-1]
    assert not found.result & set(names[:100])
    assert len(trial.tried) <= MEASURED + 1


def test_what_no_fold_explains_is_not_returned_as_passed() -> None:
    trial = Trial({"a", "not a fold"})
    found = search(trial)
    assert not found.passed
    assert found.result == frozenset()
    assert len(trial.tried) == 2


def test_reasons_say_what_was_measured() -> None:
    reasons: list[Mapping[str, str]] = []

    def attempt(kept: Mapping[str, str]) -> Attempt[None]:
        reasons.append(kept)
        return Attempt(None, "b" in kept, "ab", f"y was {len(kept) + 2}.0e-02 off")

    search(attempt)
    assert reasons[-1] == {"b": "rolled back: folded, y was 2.0e-02 off"}
    assert reasons[1] == dict.fromkeys("ab", "rolled back: with this one or others folded, y was 2.0e-02 off")


# -- a file ------------------------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
WIDTH = 6


def tensor(name: str, array: object) -> onnx.TensorProto:
    return from_array(np.asarray(array, np.float32), name)


def small_stream(path: Path, shift: float) -> Path:
    """Numbers around 1e-4 to which a norm adds `shift`: nothing but what the file holds tells how small they are."""
    body = """
        h = Conv(x, w0)
        first = Mul(h, s1) a1 = Add(first, t1) r1 = Relu(a1) b1 = Conv <pads=[1,1,1,1]> (r1, w1, c1) z = Add(h, b1)
        second = Mul(z, s2) a2 = Add(second, t2) r2 = Relu(a2) b2 = Conv <pads=[1,1,1,1]> (r2, w2, c2) u = Add(z, b2)
        y = Conv(u, w3)
    """
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g (float[b,3,6,5] x) => (float[ob,oc,oh,ow] y) {{ {body} }}')
    normal = RNG.standard_normal
    weight = normal((WIDTH, WIDTH, 3, 3)) * 1e-7
    arrays = {
        "w0": normal((WIDTH, 3, 1, 1)) * 1e-4,
        "s1": RNG.uniform(0.9, 1.1, (WIDTH, 1, 1)),
        "t1": RNG.uniform(shift, shift * 1.2, (WIDTH, 1, 1)),
        "w1": weight,
        "c1": -1.1 * shift * weight.sum((1, 2, 3)),
        "s2": RNG.uniform(0.5, 1.5, (WIDTH, 1, 1)) * 1e4,
        "t2": normal((WIDTH, 1, 1)) * 0.3,
        "w2": normal((WIDTH, WIDTH, 3, 3)) * 1e-5,
        "c2": normal(WIDTH) * 1e-5,
        "w3": normal((4, WIDTH, 1, 1)),
    }
    proto.graph.initializer.extend(tensor(name, array) for name, array in arrays.items())
    onnx.save(proto, path)
    return path


def test_the_first_bad_fold_is_undone_and_the_other_one_stays(tmp_path: Path) -> None:
    source, target = small_stream(tmp_path / "in.onnx", 40.0), tmp_path / "out.onnx"
    result = fold_onnx(str(source), target)
    bad, good = result.sites
    assert (bad.how, bad.left, good.how, good.left) == ("", ("Mul", "Add"), "stream_shift", ())
    assert bad.reason.startswith("rolled back: folded, #0 in onnxruntime (disabled) was ")
    assert bad.reason.endswith(" passes")
    assert result.comparisons.passed
    written = onnx.load(target)
    assert [node.op_type for node in written.graph.node].count("Mul") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]
    legs = fold_json(str(source), result)["legs"]
    assert [leg["status"] for leg in legs] == ["noise floor", *["passed"] * 2]
    assert len(fold_summary(result).splitlines()) == 4


def test_it_is_really_that_fold(tmp_path: Path) -> None:
    """Written without measuring, the file is wrong; it is not the file that came in."""
    source, target = small_stream(tmp_path / "in.onnx", 40.0), tmp_path / "out.onnx"
    assert all(not site.left for site in fold(source, target).sites)
    x = torch.randn(2, 3, 6, 5)
    assert compare(judge(source, (x,), {}), target).max_rel > 1e-3
    fold(source, target, kept={"first": "why not"})
    assert compare(judge(source, (x,), {}), target)


def test_nothing_is_undone_where_the_digits_suffice(tmp_path: Path) -> None:
    result = fold_onnx(str(small_stream(tmp_path / "in.onnx", 1e-5)), tmp_path / "out.onnx")
    assert [site.how for site in result.sites] == ["stream_shift", "stream_shift"]
    assert all(site.reason == "" for site in result.sites)


# -- a model -----------------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """The same of torch: the statistics of the first norm are those that it was made with, and no input has them."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.stem, self.norm1, self.conv1 = nn.Conv2d(3, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm2, self.conv2, self.head = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 1)
        torch.manual_seed(0)
        with torch.no_grad():
            self.stem.weight.normal_(0, 1e-4)
            self.norm1.bias.uniform_(shift, 1.2 * shift)
            self.conv1.weight.normal_(0, 1e-7)
            assert self.conv1.bias is not None
            self.conv1.bias.copy_(-1.1 * shift * self.conv1.weight.sum((1, 2, 3)))
            self.norm2.running_var.fill_(1e-8)  # type: ignore[union-attr]
            self.norm2.eps = 0.0
            self.norm2.bias.normal_(0, 0.3)
            self.conv2.weight.mul_(1e-4)
            self.conv2.bias.mul_(1e-4)  # type: ignore[union-attr]
            self.head.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(torch.relu(self.norm1(x)))
        return self.head(x + self.conv2(torch.relu(self.norm2(x))))  # type: ignore[no-any-return]


def test_a_model_loses_one_fold_and_not_its_file(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        result = normswap.export_onnx(normswap.convert(Small(40.0).eval(), torch.randn(2, 3, 6, 5)), path=tmp_path / "a.onnx")
        plain = normswap.export_onnx(normswap.convert(Small(1e-5).eval(), torch.randn(2, 3, 6, 5)), path=tmp_path / "b.onnx")
    assert result.residue == ("norm1",)
    assert result.sites[0].left == ("BatchNormalization",)
    assert "rolled back: folded, output in onnxruntime (disabled) was" in result.sites[0].reason
    assert result.comparisons.passed
    assert list(result.comparisons.parities) == ["onnxruntime (disabled)", "onnxruntime (all)"]
    assert plain.residue == ()


def test_a_file_that_no_rolling_back_mends_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write.write_remainder
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.BatchNorm2d(4), nn.GELU()).eval()
    nn.init.uniform_(model[2].bias)  # type: ignore[arg-type]
    conversion = normswap.convert(model, torch.randn(2, 3, 5, 4))
    # What is left of a norm computes something else, too.
    monkeypatch.setattr(write, "write_remainder", lambda affine, scale, shift, *rest: written(affine, scale, shift + 1, *rest))
    with pytest.raises(ParityError):
        normswap.export_onnx(conversion, path=tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["portable", "cuda"])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_undone_stays_in_the_file(tmp_path: Path, target: Any, half: bool) -> None:
    """torch's own optimiser would fold it into the convolution before it."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)).eval()
    nn.init.uniform_(model[1].bias)  # type: ignore[arg-type]
    module, x, path = normswap.convert(model, torch.randn(2, 3, 9, 8)).module, torch.randn(2, 3, 9, 8), tmp_path / "a.onnx"
    program = Program(module, (x,), {}, Settings(target=target, half=half))  # two files of one graph, as `verified_export` makes them
    result = program.write(path, {"1": "rolled back"})
    assert [(site.left, site.reason) for site in result.sites] == [(("BatchNormalization",), "rolled back"), ((), "")]
    assert [node.op_type for node in onnx.load(path).graph.node].count("BatchNormalization") == 1
    assert result.nodes["BatchNormalization"] == 1
    assert {entry.domain for entry in onnx.load(path).opset_import} == {""}
    result = program.write(path)
    assert "BatchNormalization" not in result.nodes


def test_a_flat_input_at_which_nothing_can_be_learnt_is_dropped_and_named(tmp_path: Path) -> None:
    path = small_stream(tmp_path / "in.onnx", 1e-5)
    linear = judge(nn.Sequential(nn.Threshold(5.0, 0.0), nn.Linear(3, 2, bias=False)), (torch.randn(2, 3),), {})
    assert linear.dropped == ["batch 1, all 3: the original returns only 0 there"]
    norm = judge(nn.InstanceNorm1d(4), (torch.randn(2, 4, 9) / 3,), {})
    assert any(text.startswith("batch 1, all ") for text in norm.dropped)
    judgement = judge(path, (torch.randn(2, 3, 6, 5),), {})
    assert compare(judgement, path).probes[-2:] == ("batch 1 x 1000", "batch 1, all 3")
    assert compare(linear, nn.Linear(3, 2)).probes == ("example", "batch 1", "batch 3", "batch 1 x 0.001", "batch 1 x 1000")
    assert compare(linear, nn.Linear(3, 2)).dropped == ()


class Samples(nn.Module):
    """As a variational autoencoder does: what it puts out depends on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).mean((2, 3))
        return h + torch.randn_like(h)


def test_a_model_that_draws_random_numbers_is_not_called_wrong(tmp_path: Path) -> None:
    conversion = normswap.convert(randomise(Samples(), 0).eval(), torch.randn(2, 3, 6, 5))
    drawn = r"is not judged: the file draws random numbers \(RandomNormalLike\), so no two runs of it can be compared"
    with pytest.raises(ParityError, match=drawn) as error:
        normswap.export_onnx(conversion, path=tmp_path / "m.onnx")
    assert error.value.hint is not None
    assert error.value.hint.startswith("make the random numbers an input of the model")
    assert list(tmp_path.iterdir()) == []
