"""The judge: what it must fail, what it must pass, and how much it runs."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from comparing import ROWS, SITES, Bag, Linear, Net, Pair, Raises, Result, X, changed, compared, ending, onnx_file, verify
from torch import Tensor, nn

from normswap.parity.judge import compare, judge
from normswap.parity.limits import CAP, FLOOR, SAME
from normswap.parity.run_onnx import LEVELS

# --- what it must pass ------------------------------------------------------------------------------------------------------------------


PASSING: dict[str, Callable[[Any, Tensor], Any]] = {
    "tensor": lambda m, y: y,
    "tuple": lambda m, y: (y, y.sum((2, 3))),
    "dict": lambda m, y: {"a": y, "b": [y * 2, None]},
    "dataclass": lambda m, y: Result(y, Result(y * 2)),
    "namedtuple": lambda m, y: Pair(y, (y * 2,)),
    "dict of its own class": lambda m, y: Bag(a=y),
    "list of tensors": lambda m, y: [y, *y.unbind()],
    "integers": lambda m, y: (y.flatten(1).argmax(1), y > 0),
    "numbers": lambda m, y: (y, float(y.sum()), y.shape[0], True),
    "float()": lambda m, y: (y.float() / 3).float(),
    "dtype=float32": lambda m, y: torch.softmax(y, 1, dtype=torch.float32) + torch.arange(6, dtype=torch.float32).view(6, 1, 1),
    "half inside": lambda m, y: y.half().float() * 2,
    "half out": lambda m, y: y.half(),
    "minus infinity": lambda m, y: y.masked_fill(y > y.mean(), -torch.inf),
    "complex": lambda m, y: torch.complex(y, y * 2),
    "zero": lambda m, y: y * 0,
    "one empty output": lambda m, y: (y, y[:0]),
}


@pytest.mark.parametrize("end", PASSING.values(), ids=PASSING.keys())
def test_the_same_model_passes(end: Callable[[Any, Tensor], Any]) -> None:
    parity = compared(Net(end), sites=SITES)
    assert parity, (parity.failure, [d for d in (*parity.outputs, *parity.sites) if not d.passed])
    assert parity.failure is None
    assert parity.first_bad is None
    assert parity.dropped == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_dtype_has_its_own_limits(dtype: torch.dtype) -> None:
    parity = compared(Net().to(dtype), None, X.to(dtype), sites=SITES)
    assert parity
    assert parity.candidate == str(dtype)
    rows = [d for d in (*parity.all_outputs, *parity.sites) if not d.float64]
    assert all(FLOOR[dtype] <= d.tolerance <= 10 * CAP[dtype] for d in rows)
    assert {d.tolerance for d in parity.all_outputs if d.float64} == {SAME}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.table = Net(), nn.Embedding(11, 6)

    def forward(self, x: Tensor, *, tokens: Tensor, extra: list[Tensor], mask: Tensor | None = None) -> Tensor:
        y = self.net(x).mean((2, 3)) + self.table(tokens).mean(1) + sum(extra)
        return y if mask is None else y.masked_fill(mask, 0)


def test_keywords_lists_and_tokens() -> None:
    kwargs = {"tokens": torch.tensor([[1, 5], [7, 10]]), "extra": [torch.randn(2, 6), torch.randn(2, 1)], "mask": torch.rand(2, 6) > 0.8}
    parity = verify(Keywords(), (other := Keywords()), (X,), kwargs)
    assert not parity  # another table
    other.table.weight.data.copy_((reference := Keywords()).table.weight)
    parity = verify(reference, other, (X,), kwargs)
    assert parity
    assert len(parity.probes) == 5


class Overflows(nn.Module):
    def __init__(self, factor: float = 3e4, end: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.weight, self.end = nn.Parameter(torch.full((3,), factor, dtype=torch.half)), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * self.weight)


@pytest.mark.parametrize("x", [torch.rand(4, 3) + 1, torch.rand(4, 3) * 0.1, torch.rand(4, 3) * 3], ids=["all", "some", "most"])
def test_a_reference_that_overflows_in_half_precision(x: Tensor) -> None:
    x = x.half()
    assert compared(Overflows(), None, x)
    # a candidate that does not overflow there, or is NaN where the reference is not, is another function
    assert not compared(Overflows(), Overflows(end=lambda y: y.clamp(-6e4, 6e4)), x)
    assert not compared(Overflows(), Overflows(end=lambda y: y.masked_fill(y == y.max(), torch.nan)), x)


class Autocast(nn.Module):
    def __init__(self, *, back: bool) -> None:
        super().__init__()
        self.net, self.back = Net(), back

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.net(x)
        return y.float() if self.back else y


@pytest.mark.parametrize("back", [True, False])
def test_an_autocast_region_has_the_limits_of_bfloat16(back: bool) -> None:
    parity = compared(Autocast(back=back))
    assert parity
    assert parity.outputs[0].noise > 1e-4
    assert parity.outputs[0].tolerance <= 10 * CAP[torch.bfloat16]
    other = Autocast(back=back)
    other.net.bn2.weight.data[2] *= 1.2
    assert not compared(Autocast(back=back), other)


# --- what it must fail ------------------------------------------------------------------------------------------------------------------

FAILING: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any], str | None]] = {
    "scaled": (lambda m, y: y, lambda m, y: y * (1 + 1e-3), None),
    "one NaN": (lambda m, y: y, lambda m, y: y.index_fill(1, torch.tensor([2]), torch.nan), None),
    "all NaN": (lambda m, y: y, lambda m, y: y * torch.nan, None),
    "one infinity": (lambda m, y: y, lambda m, y: y.masked_fill(y == y.max(), torch.inf), None),
    "the other infinity": (
        lambda m, y: y.masked_fill(y > y.mean(), -torch.inf),
        lambda m, y: y.masked_fill(y > y.mean(), torch.inf),
        None,
    ),
    "NaN for infinity": (
        lambda m, y: y.masked_fill(y > y.mean(), -torch.inf),
        lambda m, y: y.masked_fill(y > y.mean(), torch.nan),
        None,
    ),
    "missing": (lambda m, y: (y, y), lambda m, y: (y,), "is missing"),
    "extra": (lambda m, y: (y,), lambda m, y: (y, y), "the reference does not return it"),
    "other names": (lambda m, y: {"a": y}, lambda m, y: {"b": y}, "is missing"),
    "shape": (lambda m, y: y, lambda m, y: y.flatten(2), "has the shape (2, 6, 6), expected (2, 6, 3, 2)"),
    "one more axis": (lambda m, y: y, lambda m, y: y.unsqueeze(0), "has the shape (1, 2, 6, 3, 2), expected (2, 6, 3, 2)"),
    "dtype": (lambda m, y: y, lambda m, y: y.double(), "has the dtype torch.float64, expected torch.float32"),
    "zero": (lambda m, y: y * 0, lambda m, y: y * 0 + 1e-9, None),
    "one element": (lambda m, y: y, lambda m, y: y.index_put((torch.tensor([0]),) * 4, y.max() * 1.01), None),
    "integer": (lambda m, y: y.flatten(1).argmax(1), lambda m, y: y.flatten(1).argmin(1), None),
    "boolean": (lambda m, y: y > y.mean(), lambda m, y: y < y.mean(), None),
    "number": (lambda m, y: (y, float(y.sum())), lambda m, y: (y, float(y.sum()) * 1.001), None),
    "inside a dataclass": (lambda m, y: Result(y, Result(y)), lambda m, y: Result(y, Result(y * 1.001)), None),
    "inside a dict of its own class": (lambda m, y: (y, Bag(a=y)), lambda m, y: (y, Bag(a=y * 1.001)), None),
    "only at x 1000": (lambda m, y: y, lambda m, y: y.clamp(-500, 500), None),
    "only at a batch of 3": (lambda m, y: y, lambda m, y: y if len(y) < 3 else y.flip(0), None),
}


@pytest.mark.parametrize(("end", "other", "problem"), FAILING.values(), ids=FAILING.keys())
def test_another_model_fails(end: Callable[[Any, Tensor], Any], other: Callable[[Any, Tensor], Any], problem: str | None) -> None:
    parity = ending(end, other)
    assert not parity
    bad = [d for d in parity.outputs if not d.passed]
    assert bad
    assert bad[0].problem == problem
    assert parity.first_bad == bad[0].name


class Flush(nn.Module):
    """Takes what is small for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.abs().max() > 0.1 else x * 0


def test_the_probe_that_shows_it_is_named() -> None:
    assert compared(nn.Identity(), Flush()).outputs[0].probe == "batch 1 x 0.001"
    assert ending(*FAILING["only at x 1000"][:2]).outputs[0].probe == "batch 1 x 1000"
    assert ending(*FAILING["only at a batch of 3"][:2]).outputs[0].probe == "batch 3"


@pytest.mark.parametrize("channel", range(4))
def test_one_wrong_channel_in_one_layer_is_named(channel: int) -> None:
    def change(net: Net) -> None:
        net.bn1.bias[channel] += 1e-3

    parity = changed(change)
    assert not parity
    assert parity.first_bad == "bn1"
    assert not parity.sites[0].passed
    parity = changed(lambda net: net.bn2.running_mean[channel].mul_(1.01))
    assert not parity
    assert parity.first_bad == "bn2"
    assert [d.passed for d in parity.sites] == [True, False]


def test_a_candidate_that_raises_fails() -> None:
    parity = compared(nn.Identity(), Raises())
    assert not parity
    assert parity.failure == "the candidate raised RuntimeError: no batch of 2"
    assert parity.outputs == ()
    assert compared(nn.Identity(), Raises(3)).failure == "the candidate raised RuntimeError: no batch of 3"


def test_a_candidate_that_is_interrupted_is_not_judged() -> None:
    def interrupt(m: Any, y: Tensor) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ending(lambda m, y: y, interrupt)


def test_a_candidate_that_is_not_deterministic_fails() -> None:
    count = itertools.count()
    assert not ending(lambda m, y: y, lambda m, y: y * (1 + 1e-3 * next(count)))


def test_only_the_batch_probes_show_a_norm_left_in_batch_mode() -> None:
    """Statistics that happen to be those of the example: in the example itself nothing is wrong."""
    reference = nn.BatchNorm2d(3)
    reference.running_mean, reference.running_var = X.mean((0, 2, 3)), X.var((0, 2, 3), correction=0)
    candidate = nn.BatchNorm2d(3, track_running_stats=False)
    judgement = judge(reference, (X,), {})
    at_example = compare(judgement, candidate, only_like_example=True)
    assert at_example.probes == ("example",)
    assert at_example
    parity = compare(judgement, candidate)
    assert not parity
    assert parity.outputs[0].probe == "batch 1"


def test_a_blank_example_does_not_hide_another_model() -> None:
    class Gain(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.gain = gain

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    assert not compared(Gain(1.0), Gain(1.5), torch.zeros(1, 3, 8, 8))


# --- the limits ------------------------------------------------------------------------------------------------------------------------


def test_tolerance_replaces_the_limits() -> None:
    strict = ending(lambda m, y: y, lambda m, y: y * (1 + 1e-5))
    assert not strict
    loose = compared(Net(), Net(lambda m, y: y * (1 + 1e-5)), tolerance=1e-4, sites=SITES)
    assert loose
    assert {d.tolerance for d in (*loose.outputs, *loose.sites)} == {1e-4}
    assert not compared(Net(), tolerance=0.0)


@pytest.mark.parametrize("end", [lambda m, y: y * (1 + 1e-5), lambda m, y: y + 1e-6])
def test_the_smallest_tolerance_is_the_smallest(end: Callable[[Any, Tensor], Any]) -> None:
    judgement = judge(Net(), (X,), {})
    candidate = Net(end)
    smallest = compare(judgement, candidate).smallest_tolerance
    assert compare(judgement, candidate, tolerance=smallest)
    assert not compare(judgement, candidate, tolerance=smallest * (1 - 1e-9))
    assert compare(judgement, candidate, tolerance=smallest).max_rel == smallest


def test_a_float64_model_is_held_to_float64() -> None:
    reference = Net(lambda m, y: (y, float(y.sum()))).double()
    parity = compared(reference, None, X.double())
    assert parity
    assert parity.candidate == "torch.float64"
    other = copy.deepcopy(reference)
    other.bn2.bias.data += 1e-8
    assert not compared(reference, other, X.double())


class Counter(nn.Module):
    """Counts the forward passes of all its copies, and sees which copies are alive."""

    passes = 0
    copies: ClassVar[weakref.WeakSet[Counter]] = weakref.WeakSet()

    def forward(self, x: Tensor) -> Tensor:
        Counter.passes += 1
        Counter.copies.add(self)
        self.log.append(len(Counter.copies))
        return x * 2

    def __init__(self, log: list[int]) -> None:
        super().__init__()
        self.log = log

    def __deepcopy__(self, memo: dict[int, Any]) -> Counter:
        return Counter(self.log)


def test_twenty_two_forward_passes_and_one_copy_at_a_time() -> None:
    Counter.passes, log = 0, []
    reference = Counter(log)
    judgement = judge(reference, (X,), {})
    assert (Counter.passes, judgement.passes) == (12, 12)
    parity = compare(judgement, Counter(log))
    assert (Counter.passes, parity.forward_passes) == (22, 22)
    assert compare(judgement, reference).forward_passes == 22
    assert Counter.passes == 32
    assert set(log) == {1}


# --- ONNX ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_an_onnx_candidate(level: str, tmp_path: Path) -> None:
    judgement = judge(Linear(), (ROWS,), {}, sites=("",))
    parity = compare(judgement, onnx_file(tmp_path / "a.onnx"), level=level)
    assert parity
    assert parity.candidate == f"onnxruntime ({level})"
    assert parity.forward_passes == 18
    assert parity.sites == ()
    assert not compare(judgement, onnx_file(tmp_path / "b.onnx", gain=2.002), level=level)


def test_an_onnx_candidate_with_other_outputs_inputs_or_batch(tmp_path: Path) -> None:
    judgement = judge(Linear(), (ROWS,), {})
    more = compare(judgement, onnx_file(tmp_path / "more.onnx", outputs=2))
    assert [d.problem for d in more.outputs] == [None, "the reference does not return it"]
    fixed = onnx_file(tmp_path / "fixed.onnx", batch=2)
    assert (compare(judgement, fixed).failure or "").startswith("the candidate raised ")
    assert compare(judgement, fixed, only_like_example=True)
    two = judge(nn.Bilinear(3, 3, 2), (ROWS, ROWS), {})
    assert compare(two, fixed).failure == "the candidate raised ValueError: the file has 1 inputs (x), but 2 tensors were given"
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    assert (compare(judgement, tmp_path / "broken.onnx").failure or "").startswith("the candidate raised ")
