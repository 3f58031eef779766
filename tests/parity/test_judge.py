"""The judge: what it must fail, what it must pass, and what it must leave alone."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.parity.judge import CAP, FLOOR, LEVELS, SAME, compare, judge
from normswap.parity.probes import Probe
from normswap.parity.result import Parity
from normswap.parity.runners import TAP_SIZE, module_runner, onnx_float64_runner


def verify(reference: nn.Module | Path, candidate: nn.Module | Path, args: Any, kwargs: Any, **options: Any) -> Parity:
    sites = options.pop("sites", ())
    return compare(judge(reference, args, kwargs, sites=sites), candidate, sites=sites, **options)


X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(7))
SITES = ("bn1", "bn2")


class Net(nn.Module):
    """conv - bn1 - relu - conv - bn2, statistics of its own, `end` applied to the output."""

    def __init__(self, end: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.end = end
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)

    def forward(self, x: Tensor) -> Any:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return y if self.end is None else self.end(self, y)


def held(reference: nn.Module, candidate: nn.Module | None = None, *args: Any, **options: Any) -> Parity:
    return verify(reference, candidate or copy.deepcopy(reference), args or (X,), {}, **options)


def changed(change: Callable[[Net], Any], reference: Net | None = None) -> Parity:
    """A net against a copy of it with a change, its layers tapped."""
    reference = reference or Net()
    candidate = copy.deepcopy(reference)
    with torch.no_grad():
        change(candidate)
    return held(reference, candidate, sites=SITES)


def ending(end: Callable[[Any, Tensor], Any], other: Callable[[Any, Tensor], Any]) -> Parity:
    """Two nets that differ in what they do to the same output."""
    return held(Net(end), Net(other))


# --- what it must pass ------------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    logits: Tensor
    extra: Any = None


Pair = namedtuple("Pair", ["a", "b"])


class Bag(dict[str, Any]):
    """A dict that torch's pytree does not know."""


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
    parity = held(Net(end), sites=SITES)
    assert parity, (parity.failure, [d for d in (*parity.outputs, *parity.sites) if not d.passed])
    assert parity.failure is None
    assert parity.first_bad is None
    assert parity.dropped == ()


def test_outputs_are_named_by_their_path() -> None:
    parity = held(Net(lambda m, y: {"a": Result(y, Pair(y, [y]))}))
    assert [d.name for d in parity.outputs] == [
        "output['a'].logits",
        "output['a'].extra.a",
        "output['a'].extra.b[0]",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_dtype_has_its_own_limits(dtype: torch.dtype) -> None:
    parity = held(Net().to(dtype), None, X.to(dtype), sites=SITES)
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
    assert held(Overflows(), None, x)
    # a candidate that does not overflow there, or is NaN where the reference is not, is another function
    assert not held(Overflows(), Overflows(end=lambda y: y.clamp(-6e4, 6e4)), x)
    assert not held(Overflows(), Overflows(end=lambda y: y.masked_fill(y == y.max(), torch.nan)), x)


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
    parity = held(Autocast(back=back))
    assert parity
    assert parity.outputs[0].noise > 1e-4
    assert parity.outputs[0].tolerance <= 10 * CAP[torch.bfloat16]
    other = Autocast(back=back)
    other.net.bn2.weight.data[2] *= 1.2
    assert not held(Autocast(back=back), other)


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
    assert held(nn.Identity(), Flush()).outputs[0].probe == "batch 1 x 0.001"
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


def test_a_layer_that_differs_fails_even_if_no_output_does() -> None:
    """Behind a weight of zero nothing is seen."""
    reference = Net()
    reference.bn2.weight.data.zero_()
    parity = changed(lambda net: net.bn1.bias.add_(0.1), reference)
    assert all(d.passed for d in parity.outputs)
    assert not parity
    assert parity.first_bad == "bn1"


def test_sites_are_in_the_order_that_was_asked_for_and_calls_are_one_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return self.a(self.b(self.b(x)))

    reference = Twice()
    reference.b.running_var.fill_(0.3)  # type: ignore[union-attr]
    parity = held(reference, sites=("b", "a"))
    assert [d.name for d in parity.sites] == ["b", "a"]
    # only the second call differs
    candidate = copy.deepcopy(reference)
    count = itertools.count(1)
    candidate.b.register_forward_hook(lambda m, i, o: o * 1.01 if next(count) % 2 == 0 else o)
    parity = held(reference, candidate, sites=("b", "a"))
    assert [d.passed for d in parity.sites] == [False, False]
    assert parity.first_bad == "b"


def test_a_layer_that_is_called_less_often_fails() -> None:
    parity = held(Net(), Net(lambda m, y: m.bn2(y)), sites=SITES)
    assert [d.problem for d in parity.sites] == [None, "the reference does not return it"]
    parity = held(Net(lambda m, y: m.bn2(y)), Net(), sites=SITES)
    assert parity.first_bad == "bn2"


def test_a_failure_is_not_hidden_by_a_larger_error_that_passes() -> None:
    """Each input has its own limit: at x 0.001 this reference cancels and may be far off, at x 1000 it may not."""
    parity = held(Cancels(), Cancels(small=5e-5, large=3e-6))
    assert [(d.probe, d.passed) for d in parity.outputs] == [("batch 1 x 1000", False)]
    assert parity.max_rel > 10 * parity.outputs[0].max_rel


class Cancels(nn.Module):
    """x, by way of x + 1, off by a factor of 1 + small or 1 + large where it is not run in float64."""

    def __init__(self, small: float = 0.0, large: float = 0.0) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, x: Tensor) -> Tensor:
        size, y = x.abs().max(), x + 1 - 1
        if x.dtype is torch.float64:
            return y
        return y * (1 + self.small) if size < 0.1 else y * (1 + self.large) if size > 10 else y


class Raises(nn.Module):
    def __init__(self, batch: int | None = None) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        if self.batch in (None, len(x)):
            raise RuntimeError(f"no batch of {len(x)}\nand a second line")
        return x


def test_a_candidate_that_raises_fails() -> None:
    parity = held(nn.Identity(), Raises())
    assert not parity
    assert parity.failure == "the candidate raised RuntimeError: no batch of 2"
    assert parity.outputs == ()
    assert held(nn.Identity(), Raises(3)).failure == "the candidate raised RuntimeError: no batch of 3"


def test_a_candidate_that_is_interrupted_is_not_judged() -> None:
    def interrupt(m: Any, y: Tensor) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ending(lambda m, y: y, interrupt)


@pytest.mark.parametrize("nothing", [None, "text", [], {}])
def test_a_model_without_tensors_fails(nothing: Any) -> None:
    parity = ending(lambda m, y: nothing, lambda m, y: nothing)
    assert not parity
    assert parity.failure == "nothing was compared: the model returns no tensor"


def test_a_model_with_empty_tensors_only_fails() -> None:
    parity = ending(lambda m, y: y[:0], lambda m, y: y[:0] + 1)
    assert not parity
    assert parity.failure == "nothing was compared: every tensor that the model returns is empty"


def test_a_model_that_is_nowhere_finite_fails() -> None:
    parity = ending(lambda m, y: y * torch.nan, lambda m, y: y * torch.nan)
    assert not parity
    assert parity.outputs[0].problem == "has no finite value to compare"


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

    assert not held(Gain(1.0), Gain(1.5), torch.zeros(1, 3, 8, 8))


# --- the limits ------------------------------------------------------------------------------------------------------------------------


def test_tolerance_replaces_the_limits() -> None:
    strict = ending(lambda m, y: y, lambda m, y: y * (1 + 1e-5))
    assert not strict
    loose = held(Net(), Net(lambda m, y: y * (1 + 1e-5)), tolerance=1e-4, sites=SITES)
    assert loose
    assert {d.tolerance for d in (*loose.outputs, *loose.sites)} == {1e-4}
    assert not held(Net(), tolerance=0.0)


@pytest.mark.parametrize("end", [lambda m, y: y * (1 + 1e-5), lambda m, y: y + 1e-6])
def test_the_smallest_tolerance_is_the_smallest(end: Callable[[Any, Tensor], Any]) -> None:
    judgement = judge(Net(), (X,), {})
    candidate = Net(end)
    smallest = compare(judgement, candidate).smallest_tolerance
    assert compare(judgement, candidate, tolerance=smallest)
    assert not compare(judgement, candidate, tolerance=smallest * (1 - 1e-9))
    assert compare(judgement, candidate, tolerance=smallest).max_rel == smallest


@pytest.mark.parametrize(
    "asks",
    [
        lambda m, y: y / 3,
        lambda m, y: (y.float() / 3).float(),
        lambda m, y: (y / 3).to(torch.float32),
        lambda m, y: torch.mul(y.half(), torch.ones((), dtype=torch.float32) / 3),
        lambda m, y: torch.cat([y.type(torch.float32)[:, :3] / 3, y.to(dtype=torch.float32)[:, 3:] / 3], 1),
    ],
)
def test_the_judge_is_the_reference_in_float64(asks: Callable[[Any, Tensor], Any]) -> None:
    """Also if its code asks for float32 by name."""
    judgement = judge(Net(asks), (X,), {})
    truth = judgement.outputs["example"]["output"].value
    expected = Net(lambda m, y: y / 3).double().eval()(X.double())
    assert truth.dtype == torch.float64
    torch.testing.assert_close(truth, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "norm",
    [
        nn.RMSNorm(6),
        nn.RMSNorm(6, elementwise_affine=False),
        lambda x: nn.functional.rms_norm(x, (6,)),
        lambda x: torch.rms_norm(x, [6], eps=None),
        lambda x: torch.ops.aten.rms_norm.default(x, [6]),
    ],
)
def test_an_eps_that_torch_takes_from_the_dtype_is_the_models(norm: Callable[[Tensor], Tensor]) -> None:
    """RMSNorm without an eps takes the machine epsilon of its input: in float64 that would be another function, for small inputs."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = copy.deepcopy(norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    x = torch.randn(5, 6) * 1e-4
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        wide = x.to(dtype).double()
        truth = judge(Normed().to(dtype), (x.to(dtype),), {}).outputs["example"]["output"]
        expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        torch.testing.assert_close(truth.value, expected, rtol=1e-12, atol=0)
        assert truth.noise < 1e-6


def test_an_eps_that_is_given_stays() -> None:
    class Normed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (6,), eps=0.5)

    x = torch.randn(5, 6)
    truth = judge(Normed(), (x,), {}).outputs["example"]["output"].value
    torch.testing.assert_close(truth, x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt(), rtol=1e-12, atol=0)


def test_a_float64_model_is_held_to_float64() -> None:
    reference = Net(lambda m, y: (y, float(y.sum()))).double()
    parity = held(reference, None, X.double())
    assert parity
    assert parity.candidate == "torch.float64"
    other = copy.deepcopy(reference)
    other.bn2.bias.data += 1e-8
    assert not held(reference, other, X.double())


def test_the_error_of_the_reference_itself_is_what_a_candidate_may_use_ten_times() -> None:
    cancels = Net(lambda m, y: (y + 100) - 100)
    parity = held(cancels)
    assert parity
    assert all(d.tolerance == pytest.approx(min(10 * d.noise, CAP[torch.float32])) for d in parity.outputs)


# --- probes that cannot be used ---------------------------------------------------------------------------------------------------------


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 60) * 2


def test_a_probe_that_the_reference_refuses_is_dropped_and_named() -> None:
    parity = held(FixedBatch())
    assert parity
    assert parity.probes == ("example",)
    assert [text.partition(":")[0] for text in parity.dropped] == ["batch 1", "batch 3", "batch 1 x 0.001", "batch 1 x 1000"]
    assert all("RuntimeError: shape '[2, 60]' is invalid" in text for text in parity.dropped)
    assert parity.forward_passes == 4


def test_a_reference_that_cannot_run_on_the_example() -> None:
    with pytest.raises(UsageError, match=r"^the model cannot run on the example inputs: RuntimeError: no batch of 2") as error:
        held(Raises())
    assert error.value.hint is not None
    assert "--input" in error.value.hint


class OnlyFloat32(nn.Module):
    """Stands for a layer with kernels of its own, as quantised ones are: float64 is refused."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise RuntimeError("only float32")
        return x * self.factor


def test_a_reference_that_cannot_run_in_float64_is_judged_in_its_own_dtype() -> None:
    parity = held(OnlyFloat32(), OnlyFloat32())
    assert parity
    assert parity.max_rel == 0
    assert parity.outputs[0].tolerance == FLOOR[torch.float32]
    assert parity.dropped == ("float64, so judged in its own dtype: RuntimeError: only float32",)
    assert not held(OnlyFloat32(), OnlyFloat32(1 + 1e-5))


class ByPrecision(nn.Module):
    """Returns another shape in float64, at the given batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        third = torch.tensor(1.0).to(x) / 3
        return x[:, :1] if len(x) == self.batch and third.double() == 1 / 3 else x


@pytest.mark.parametrize("batch", [2, 3])
def test_shapes_that_depend_on_rounding_are_told_and_float64_decides(batch: int) -> None:
    parity = held(ByPrecision(batch))
    assert parity
    probe = {2: "example", 3: "batch 3"}[batch]
    assert parity.unjudged == (
        f"output at the probe {probe!r}: its shape is ({batch}, 1, 5, 4) in float64 and ({batch}, 3, 5, 4) in the model's own dtype",
    )
    assert not held(ByPrecision(batch), ByPrecision(1))


# --- what it must leave alone -----------------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Dropout, a buffer that every forward changes, and an input that it writes into."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Net(), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x.mul_(2)
        return self.drop(self.net(x)) + self.count + self.plain


def test_nothing_outside_changes() -> None:
    reference, candidate, x = Restless().train(), Restless().train(), X.clone()
    before = [copy.deepcopy(m.state_dict()) for m in (reference, candidate)]
    torch.manual_seed(11)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    assert held(reference, candidate, x, sites=("net.bn1",))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.equal(x, X)
    for model, saved in zip((reference, candidate), before, strict=True):
        assert all(torch.equal(v, saved[k]) and v.dtype == saved[k].dtype for k, v in model.state_dict().items())
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_default_dtype_and_generator_come_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(UsageError):
        held(Raises())
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


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


# --- taps ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4096), (1, 4097), (1, 8191), (1, 14, 768), (1, 16, 768), (3, 64, 32, 32), (1, 8, 8, 513)])
def test_taps_are_few_and_see_every_channel(shape: tuple[int, ...]) -> None:
    for axis in (1, -1):
        index = torch.arange(shape[axis], dtype=torch.float64).view([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])
        _, taps = module_runner(nn.Sequential(nn.Identity()), ("0",))(Probe("p", (index.expand(shape),), {}))
        (values,) = taps.values()
        assert values.numel() <= TAP_SIZE
        assert values.numel() >= min(TAP_SIZE // 2 - 1, index.expand(shape).numel())
        if shape[axis] <= 1024:
            assert len(values.unique()) == shape[axis]


# --- ONNX ------------------------------------------------------------------------------------------------------------------------------


def onnx_file(path: Path, *, gain: float = 2.0, dtype: int = TensorProto.FLOAT, outputs: int = 1, batch: int | str = "n") -> Path:
    """y = (x @ w) * gain + 1, the gain as a Constant with `value_float`, the 1 by a Cast: (n, 3) -> (n, 2)."""
    narrow = helper.tensor_dtype_to_np_dtype(dtype)
    weight = torch.arange(6).view(3, 2).sub(2).div(7).numpy().astype(narrow)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=dtype),
        helper.make_node("MatMul", ["h", "w"], ["a"]),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["gain"], value_float=gain),
        helper.make_node("Mul", ["b", "gain"], ["c"]),
        *(helper.make_node("Add", ["c", "one"], [f"y{i}"]) for i in range(outputs)),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [batch, 2]) for i in range(outputs)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(torch.ones(()).numpy(), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


class Linear(nn.Module):
    """What onnx_file computes."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.arange(6).view(3, 2).sub(2).div(7)), gain

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.gain + 1


ROWS = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


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


def test_an_onnx_reference_is_judged_in_float64(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "a.onnx")
    judgement = judge(path, (ROWS,), {})
    truth = judgement.outputs["example"]["#0"].value
    weight = torch.arange(6).view(3, 2).sub(2).div(7).double()
    torch.testing.assert_close(truth, ROWS.double() @ weight * 2 + 1, rtol=1e-15, atol=1e-15)
    assert judgement.outputs["example"]["#0"].dtype == torch.float32
    assert judgement.dtype == torch.float32
    for candidate in (path, Linear()):
        assert compare(judgement, candidate)
    for other in (onnx_file(tmp_path / "b.onnx", gain=2.002), Linear(2.002)):
        assert not compare(judgement, other)


def test_a_half_precision_onnx_reference_has_the_limits_of_float16(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "a.onnx", dtype=TensorProto.FLOAT16)
    assert verify(path, path, (ROWS,), {})
    assert judge(path, (ROWS,), {}).dtype == torch.float16


def test_a_convolution_is_widened_too(tmp_path: Path) -> None:
    """onnxruntime has no float64 Conv; the judge of an ONNX file has."""
    weight = torch.randn(4, 3, 2, 2).numpy()
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 5, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 4, 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "conv.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    found, _ = onnx_float64_runner(path)(Probe("p", (X.double(),), {}))
    expected = torch.nn.functional.conv2d(X.double(), torch.from_numpy(weight).double())
    torch.testing.assert_close(found["#0"], expected, rtol=1e-13, atol=1e-13)
