"""Norms that are no modules: functional calls and hand-written forms, in user code, in graphs, in exported programs."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery import error
from torch import Tensor, fx, nn

import normswap
from fixtures.nets import randomise
from normswap import BatchlessNorm
from normswap.detect.handwritten import find
from normswap.models.own_code import Rewritten

N, T, C, H, W = 5, 7, 6, 4, 3
SEQUENCE, IMAGE = (N, T, C), (N, C, H, W)


class Net(nn.Module):
    """A linear or conv, and a forward given as a function of (self, x)."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], image: bool = False) -> None:
        super().__init__()
        self.run = run
        self.first: nn.Module = nn.Conv2d(C, C, 3, padding=1) if image else nn.Linear(C, C)
        self.weight, self.bias = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.randn(C))
        self.register_buffer("var", torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.first(x))


def rms_by_hand(s: Any, x: Tensor) -> Tensor:
    dtype = x.dtype
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return s.weight * wide.to(dtype)


def layer_norm_by_hand(s: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return s.weight * ((x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)) + s.bias


def layer_norm_2d_by_hand(s: Any, x: Tensor) -> Tensor:
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) * (var + 1e-6) ** -0.5 * s.weight.view(1, -1, 1, 1)


# name -> (kind, image, forward)
FORMS: dict[str, tuple[str, bool, Callable[[Any, Tensor], Tensor]]] = {
    "F.batch_norm": ("batch_norm", True, lambda s, x: F.batch_norm(x, s.mean, s.var, s.weight, bias=s.bias, training=s.training, eps=1e-3)),
    "torch.batch_norm": (
        "batch_norm",
        True,
        lambda s, x: torch.batch_norm(x, s.weight, s.bias, s.mean, s.var, False, 0.1, 1e-3, True),
    ),
    "F.batch_norm of the batch": ("batch_norm", True, lambda s, x: F.batch_norm(x, None, None, s.weight, s.bias, True)),
    "F.layer_norm": ("layer_norm", False, lambda s, x: F.layer_norm(x, (C,), bias=s.bias, weight=s.weight)),
    "F.layer_norm of a shape": ("layer_norm", False, lambda s, x: F.layer_norm(x, x.shape[-1:], s.weight)),
    "F.layer_norm, bare": ("layer_norm", False, lambda s, x: F.layer_norm(input=x, normalized_shape=[C], eps=1e-3)),
    "torch.layer_norm": ("layer_norm", False, lambda s, x: torch.layer_norm(x, [C], s.weight, s.bias)),
    "F.group_norm": ("group_norm", True, lambda s, x: F.group_norm(x, 3, s.weight, s.bias)),
    "F.group_norm, bare": ("group_norm", True, lambda s, x: F.group_norm(x, num_groups=2)),
    "torch.group_norm": ("group_norm", True, lambda s, x: torch.group_norm(x, 3, s.weight, s.bias)),
    "F.instance_norm": ("instance_norm", True, lambda s, x: F.instance_norm(x, weight=s.weight, bias=s.bias)),
    "F.instance_norm, bare": ("instance_norm", True, lambda s, x: F.instance_norm(x)),
    "torch.instance_norm": (
        "instance_norm",
        True,
        lambda s, x: torch.instance_norm(x, s.weight, s.bias, None, None, True, 0.1, 1e-5, False),
    ),
    "F.instance_norm, tracked": (
        "instance_norm",
        True,
        lambda s, x: F.instance_norm(x, s.mean, s.var, s.weight, s.bias, use_input_stats=False),
    ),
    "F.rms_norm": ("rms_norm", False, lambda s, x: F.rms_norm(x, (C,), s.weight, 1e-6)),
    "torch.rms_norm": ("rms_norm", False, lambda s, x: torch.rms_norm(x, [C], s.weight)),
    "Llama's": ("hand_written", False, rms_by_hand),
    "pow, mean, rsqrt": ("hand_written", False, lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * s.weight),
    "square, sqrt, div": ("hand_written", False, lambda s, x: x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()),
    "1 + weight": ("hand_written", False, lambda s, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * (1 + s.weight)),
    "mean and var": ("hand_written", False, layer_norm_by_hand),
    "var of the population": (
        "hand_written",
        False,
        lambda s, x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * s.weight + s.bias,
    ),
    "var_mean": (
        "hand_written",
        False,
        lambda s, x: (
            (x - torch.var_mean(x, -1, keepdim=True, correction=0)[1])
            * (torch.var_mean(x, -1, keepdim=True, correction=0)[0] + 1e-5).rsqrt()
        ),
    ),
    "E[x^2] - E[x]^2": (
        "hand_written",
        False,
        lambda s, x: (x - x.mean(-1, True)) / (x.square().mean(-1, True) - x.mean(-1, True) ** 2 + 1e-5).sqrt(),
    ),
    "of std": ("hand_written", False, lambda s, x: s.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + s.bias),
    "over axis 1": ("hand_written", True, layer_norm_2d_by_hand),
    "over space": (
        "hand_written",
        True,
        lambda s, x: (x - x.mean((2, 3), True)) / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt(),
    ),
    "over channels and space": (
        "hand_written",
        True,
        lambda s, x: (x - x.mean((1, 2, 3), True)) / (x.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt(),
    ),
}
EXACT = {"F.batch_norm", "torch.batch_norm", "F.instance_norm, tracked"}


def net(name: str) -> tuple[Net, Tensor]:
    _, image, run = FORMS[name]
    generator = torch.Generator().manual_seed(len(name))
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return Net(run, image).eval(), torch.randn(IMAGE if image else SEQUENCE, generator=generator)


def batches(image: bool, sizes: tuple[int, ...] = (6, 9)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((n, *(IMAGE if image else SEQUENCE)[1:]), generator=generator) for n in sizes]


def the_one(model: nn.Module, x: Tensor, name: str) -> Any:
    """The plan has exactly one swap, of the right kind and promise; gives the conversion."""
    kind, image, _ = FORMS[name]
    decided = normswap.plan(model, x, approximate=True)
    assert decided.skips == ()
    (swap,) = decided.swaps
    assert (swap.kind, swap.preserves, swap.calls) == (kind, "exact" if name in EXACT else "approximate", 1)
    conversion = normswap.convert(model, x, calibration=batches(image), approximate=True)
    layer = dict(conversion.module.named_modules())[swap.name]
    assert isinstance(layer, BatchlessNorm)
    return conversion


@functools.cache
def in_code(name: str) -> Any:
    """The conversion of net(name), which no test changes; and that it leaves the net as it was."""
    model, x = net(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    conversion = the_one(model, x, name)
    assert type(model) is Net
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    return conversion


@pytest.mark.parametrize("name", FORMS)
def test_in_the_code_of_a_module(name: str) -> None:
    model, x = net(name)
    conversion = in_code(name)
    assert isinstance(conversion.model, Net)
    assert type(conversion.model) is not Net
    if name in EXACT:
        assert error(model, conversion.model, x) <= 1e-6
        assert conversion.drift is None
        assert not {"weight", "mean", "var"} & conversion.model.state_dict().keys()  # nothing reads them any more
    else:
        (fit,) = conversion.fits
        assert 0 < fit.error < 0.9
        # The layer alone stands between the two: its fit is the model's distance.
        assert conversion.drift.max_rel > 0


@pytest.mark.parametrize("name", FORMS)
def test_in_a_graph_module(name: str) -> None:
    model, x = net(name)
    graph = fx.symbolic_trace(model)
    graph.graph.owning_module.eval()
    conversion = the_one(graph, x, name)
    assert isinstance(conversion.model, fx.GraphModule)
    torch.testing.assert_close(conversion.model(x), in_code(name).model(x), rtol=1e-5, atol=1e-5)


IRS: dict[str, Callable[[Any], Any]] = {
    "training": lambda program: program,
    "inference": lambda program: program.run_decompositions({}),
    "core": lambda program: program.run_decompositions(),
}


# The forms that have operators of their own there. All others have those of the training IR, so that they would be found twice.
IN_INFERENCE = ("F.batch_norm", "torch.batch_norm", "F.batch_norm of the batch", "Llama's", "var_mean")


@functools.cache
def exported(run: Callable[[Any, Tensor], Tensor] | str) -> Any:
    """The program, in the training IR, of net(run), or of a net with this forward."""
    model, x = net(run) if isinstance(run, str) else (Net(run).eval(), torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(2)))
    return torch.export.export(model, (x,))


@functools.cache
def as_programs_are(name: str) -> nn.Module:
    """net(name), converted in its code on what the programs are converted on."""
    model, x = net(name)
    data = batches(FORMS[name][1], (N, N))
    # a graph has no linears to repair
    converted: nn.Module = normswap.convert(model, x, calibration=data, approximate=True, repair="none").model
    return converted


@pytest.mark.parametrize(
    ("name", "ir"),
    [
        pytest.param(name, ir, marks=[pytest.mark.slow] if ir == "inference" and name not in IN_INFERENCE else [])
        for name in FORMS
        for ir in IRS
    ],
)
def test_in_an_exported_program(name: str, ir: str) -> None:
    x = net(name)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        program = IRS[ir](exported(name))
        decided = normswap.plan(program, approximate=True)
        if ir == "core" and FORMS[name][0] == "instance_norm":
            # torch writes it as a BatchNorm of one sample with N x C channels, for this N alone.
            (skip,) = decided.skips
            assert decided.swaps == ()
            assert skip.reason.startswith(
                "takes a weight that the graph computes (repeat), so it is not a constant"
                if name in EXACT
                else "is an instance norm that was decomposed for one batch size; convert the program before run_decompositions()"
            )
            return
        assert decided.skips == ()
        (swap,) = decided.swaps
        assert swap.preserves == ("exact" if name in EXACT else "approximate")
        data = batches(FORMS[name][1], (N, N))  # the size of the batch is fixed
        conversion = normswap.convert(program, calibration=data, approximate=True)
        in_code = as_programs_are(name)
    assert type(conversion.model) is type(program)
    with torch.no_grad():
        torch.testing.assert_close(conversion.model.module()(x), in_code(x), rtol=1e-4, atol=1e-4)


NOT_NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": lambda s, x: torch.softmax(x @ x.transpose(-1, -2) / C**0.5, -1) @ x,
    "squeeze and excite": lambda s, x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "the root of a sum": lambda s, x: x / x.square().sum(-1, keepdim=True).sqrt(),
    "a weight that is standardised": lambda s, x: F.linear(
        x, (s.first.weight - s.first.weight.mean(1, keepdim=True)) * torch.rsqrt(s.first.weight.var(1, keepdim=True) + 1e-5)
    ),
    "a weight that F.batch_norm standardises": lambda s, x: F.linear(
        x, F.batch_norm(s.first.weight.reshape(1, C, -1), None, None, training=True).reshape_as(s.first.weight)
    ),
    "a weight that F.layer_norm standardises": lambda s, x: F.linear(x, F.layer_norm(s.first.weight, [C])),
    "an affine map": lambda s, x: (x - s.mean) / (s.var + 1e-5).sqrt() * s.weight + s.bias,
    "softplus": lambda s, x: torch.log1p(torch.exp(x)),
    "a distance": lambda s, x: (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt() + x,
    "F.normalize": lambda s, x: F.normalize(x, dim=-1),
    "the root of an input": lambda s, x: torch.sqrt(x.abs() + 1) * s.weight,
    "scaled by another's": lambda s, x: s.first(x) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_what_is_no_norm_is_not_listed(name: str) -> None:
    model = Net(NOT_NORMS[name]).eval()
    x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(2))
    for candidate in (model, fx.symbolic_trace(model)):
        decided = normswap.plan(candidate, x, approximate=True)
        assert (decided.swaps, decided.skips) == ((), ())


@pytest.mark.parametrize("ir", ["training", pytest.param("inference", marks=pytest.mark.slow), "core"])
@pytest.mark.parametrize("name", NOT_NORMS)
def test_what_is_no_norm_is_not_listed_in_aten_either(name: str, ir: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        decided = normswap.plan(IRS[ir](exported(NOT_NORMS[name])), approximate=True)
    assert (decided.swaps, decided.skips) == ((), ())


LOOKALIKES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of the whole batch": lambda s, x: (x - x.mean()) / (x.std() + 1e-5),
    "with the square left out": lambda s, x: x * torch.rsqrt(x.mean(-1, keepdim=True).abs() + 1),
    "centred by the variance": lambda s, x: (x - x.var(-1, keepdim=True)) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_a_norm_is_kept_with_the_reason(name: str) -> None:
    model = Net(LOOKALIKES[name]).eval()
    decided = normswap.plan(model, torch.randn(SEQUENCE), approximate=True)
    assert decided.swaps == ()
    (skip,) = decided.skips
    assert skip.kind == "hand_written"
    assert skip.reason.startswith("is code that looks like a normalization")


# -- what the code around the call does is kept ----------------------------------------------------------------------------------


def test_train_and_eval_mode_each_keep_their_code() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (C,), s.weight, s.bias)
        return F.dropout(x, 0.5, s.training) if s.training else -x

    model = Net(run).eval()
    x = torch.randn(SEQUENCE)
    converted: Any = normswap.convert(model, x, calibration=batches(False), approximate=True).model
    with torch.no_grad():
        assert float((converted(x).sign() == model(x).sign()).float().mean()) > 0.8  # the sign of eval mode
        converted.train()
        assert 0.3 < float((converted(x) == 0).float().mean()) < 0.7


@contextmanager
def region() -> Iterator[None]:
    with torch.no_grad():
        yield


def no_grad(s: Any, x: Tensor) -> Tensor:
    with region():
        y = F.layer_norm(x, (C,))
    return x + y


def sets(s: Any, x: Tensor) -> Tensor:
    s.last = F.layer_norm(x, (C,))
    return s.last


def differs(s: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (C,), s.weight) if s.training else F.layer_norm(x, (C,), s.bias)


REFUSED = {
    "no_grad": (no_grad, "it has a region of its own of no_grad or autocast"),
    "state": (sets, "its forward sets last"),
    "modes": (differs, "it normalizes differently in train and in eval mode"),
    "control flow": (
        lambda s, x: F.layer_norm(x, (C,)) if x.sum() > 0 else x,
        "torch.fx cannot trace it (TraceError: symbolically traced variables cannot be used as inputs to control flow)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_code_that_a_graph_would_change_is_left_alone(what: str) -> None:
    run, why = REFUSED[what]
    model = Net(run).eval()
    decided = normswap.plan(model, torch.randn(SEQUENCE), approximate=True)
    assert decided.swaps == ()
    (skip,) = decided.skips
    assert (
        skip.reason
        == f"is a call of torch.nn.functional.layer_norm in the code of Net, which cannot be rewritten because {why}; make it a layer"
    )


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = F.layer_norm(x, (C,), self.weight) * scale
        return x if mask is None else x * mask


def test_an_optional_argument_that_decides_is_refused() -> None:
    (skip,) = normswap.plan(Optional().eval(), torch.randn(SEQUENCE), approximate=True).skips
    assert "because what it computes depends on whether mask and scale are given" in skip.reason


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return F.layer_norm(x, (C,), self.weight) * scale


class Whole(nn.Module):
    """Cannot be traced as a whole; each part can."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Scaled(), Scaled()])
        self.again = self.parts[0]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x, scale=3.0) if float(x.abs().max()) > 0 else x
        return self.again(x)


def test_the_smallest_module_is_rewritten_and_shared_as_before() -> None:
    model, x = Whole().eval(), torch.randn(SEQUENCE)
    decided = normswap.plan(model, x, approximate=True)
    assert decided.backend == "walk"
    assert [(s.name, s.aliases, s.calls) for s in decided.swaps] == [
        ("parts.0.layer_norm", ("again.layer_norm",), 2),
        ("parts.1.layer_norm", (), 1),
    ]
    converted: Any = normswap.convert(model, x, calibration=batches(False), approximate=True).model
    assert type(converted) is Whole
    assert isinstance(converted.parts[0], Scaled)
    assert isinstance(converted.parts[0], Rewritten)
    assert converted.again is converted.parts[0]
    torch.testing.assert_close(converted.parts[1](x, scale=6.0), 3 * converted.parts[1](x))


def test_a_rewritten_module_copies_pickles_and_traces() -> None:
    model, x = net("F.batch_norm")
    model.run = bare = _batch_norm  # a lambda does not pickle
    converted = normswap.convert(model, x).model
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(converted), loaded, fx.symbolic_trace(converted), torch.export.export(converted, (x,)).module()):
        assert torch.equal(other(x), converted(x))
    assert copy.deepcopy(converted).run is bare
    again = normswap.convert(converted, x)
    assert (again.plan.swaps, again.plan.skips) == ((), ())
    assert error(model, normswap.revert(converted), x) <= 1e-6


def _batch_norm(s: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, s.mean, s.var, s.weight, s.bias)


def test_saved_weights_load_into_a_factory(tmp_path: Any) -> None:
    model, x = net("F.batch_norm")
    converted = normswap.convert(model, x)
    normswap.save(converted, tmp_path / "out")
    loaded: Any = normswap.load(tmp_path / "out", factory=lambda: net("F.batch_norm")[0])
    assert torch.equal(loaded.eval()(x), converted.model(x))


def test_gradients_reach_what_they_reached() -> None:
    model, x = net("F.batch_norm")
    converted: Any = normswap.convert(model, x).model
    model(x).square().sum().backward()
    converted(x).square().sum().backward()
    torch.testing.assert_close(converted.first.weight.grad, model.first.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(converted.batch_norm.weight.grad, model.weight.grad, rtol=1e-4, atol=1e-4)


# -- subclasses of torch's norms ---------------------------------------------------------------------------------------------------


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input * 2))


class LayerNormTanh(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


class Sometimes(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if float(input.detach().mean().abs()) < 1e9 else input


def test_a_subclass_that_adds_to_a_norm_is_rewritten_around_it() -> None:
    model: Any = randomise(nn.Sequential(nn.Conv2d(3, C, 3), BatchNormReLU(C), nn.Conv2d(C, 4, 3)), 3).eval()
    x = torch.randn(N, 3, 9, 8)
    conversion = normswap.convert(model, x)
    (swap,) = conversion.plan.swaps
    assert (swap.kind, swap.preserves, swap.site.function) == ("batch_norm", "exact", "torch.nn.BatchNorm2d.forward")
    converted: Any = conversion.model
    assert isinstance(converted[1], BatchNormReLU)
    assert error(model, converted, x) <= 1e-6
    assert converted.train()(x).shape == model(x).shape
    assert converted[1].running_mean is None or not any("running" in key for key in converted.state_dict() if "source" not in key)


class TwoHeads(nn.Module):
    """A second head that eval mode leaves out, as Inception's."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C))
        self.side = nn.Sequential(nn.Conv2d(C, 4, 1), norm(4))

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x)
        return (x, self.side(x)) if self.training else x


@pytest.mark.parametrize("watched", [False, True])
def test_a_subclass_that_eval_mode_does_not_call(watched: bool) -> None:
    model: Any = randomise(TwoHeads(BatchNormReLU), 4).eval()
    if watched:
        model.forward = model.forward  # torch.fx reads that of the class
    x = torch.randn(N, 3, 9, 8)
    plan = normswap.plan(model, x)
    assert plan.backend == ("walk" if watched else "fx")
    assert [(s.site.name, s.site.function, s.calls, s.preserves) for s in plan.swaps] == [
        ("trunk.1", None, 1, "exact"),
        ("side.1.norm", "torch.nn.BatchNorm2d.forward", 0, "exact"),
    ]
    model = randomise(TwoHeads(BatchNormReLU), 4).eval()
    converted: Any = normswap.convert(model, x).model
    before, after = model.side.eval()(model.trunk(x)), converted.side.eval()(converted.trunk(x))
    torch.testing.assert_close(after, before)


def test_a_subclass_that_eval_mode_does_not_call_and_that_cannot_be_traced_keeps_its_code() -> None:
    plan = normswap.plan(TwoHeads(Sometimes).eval(), torch.randn(N, 3, 9, 8))
    assert plan.skips == ()
    assert [(swap.name, swap.calls) for swap in plan.swaps] == [("trunk.1", 1), ("side.1.norm", 0)]


def test_a_subclass_of_a_norm_that_needs_data() -> None:
    model = nn.Sequential(nn.Linear(C, C), LayerNormTanh(C)).eval()
    (swap,) = normswap.plan(model, torch.randn(SEQUENCE), approximate=True).swaps
    assert (swap.kind, swap.preserves) == ("layer_norm", "approximate")
    (fit,) = normswap.convert(model, calibration=batches(False), approximate=True).fits
    assert fit.error < 0.9


def test_a_subclass_that_cannot_be_traced_keeps_its_code() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, C, 3), Sometimes(C)), 4).eval()
    converted = normswap.convert(model, torch.randn(N, 3, 9, 8)).model
    for x in (torch.randn(N, 3, 9, 8), torch.randn(N, 3, 9, 8) * 1e11):  # either branch
        torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5 * float(x.abs().max()))


# -- find ------------------------------------------------------------------------------------------------------------------------


def test_chains_are_found_one_by_one() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.layer_norm(x, (C,)) + layer_norm_by_hand(s, x)

    graph = fx.symbolic_trace(Net(run))
    found = find(graph.graph, graph)
    assert [f.function for f in found] == ["hand-written", "hand-written", "torch.nn.functional.layer_norm", "hand-written"]
    assert found[1].start is found[0].end
    x = torch.randn(SEQUENCE)
    for f in found:
        assert f.layer is not None
    y = found[0].layer(x)  # type: ignore[misc]
    torch.testing.assert_close(y, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


# What stands before a norm is no part of it, though it is written with the same operations.
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "a factor": lambda x: x * 0.5,
    "a square": lambda x: x * x,
    "a square by name": lambda x: x.square(),
    "a product": lambda x: x * x.neg(),
    "a difference": lambda x: x - x.tanh(),
    "a mean": lambda x: x.mean(1),
    "a cast": lambda x: x.to(torch.float32),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("form", ["Llama's", "mean and var", "of std"])
@pytest.mark.parametrize("before", BEFORE)
def test_a_form_by_hand_is_found_after_anything(before: str, form: str, graph: bool) -> None:
    model = Net(lambda s, x: FORMS[form][2](s, BEFORE[before](x))).eval()
    x = torch.randn(SEQUENCE)
    decided = normswap.plan(fx.symbolic_trace(model).eval() if graph else model, x, approximate=True)
    assert [(s.kind, s.calls) for s in decided.swaps] == [("hand_written", 1)]
    assert decided.skips == ()


def test_a_form_by_hand_in_a_program_whose_batch_is_open() -> None:
    model, x = net("over space")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    (swap,) = normswap.plan(program, approximate=True).swaps
    assert swap.kind == "hand_written"


def overwritten(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x.relu_()
    return y * s.weight, x


def test_what_is_normalized_may_be_overwritten_before_the_weight_comes() -> None:
    """The layer takes the place of the norm and its weight, and has to read what the norm read."""
    model = Net(overwritten).eval()
    x = torch.randn(SEQUENCE)
    converted: Any = normswap.convert(model, x, calibration=batches(False), approximate=True).model
    with torch.no_grad():
        assert bool((converted(x)[0] < 0).any())
        torch.testing.assert_close(converted(x)[0], converted.mul_1(model.first(x)))
        torch.testing.assert_close(converted(x)[1], model(x)[1])


def test_without_inputs_a_call_without_weights_says_what_is_missing() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.instance_norm(x)

    decided = normswap.plan(Bare().eval(), approximate=True)
    (skip,) = decided.skips
    assert skip.reason == (
        "is a call of torch.nn.functional.instance_norm without weight and bias, so only its input says how many channels there are; "
        "give example inputs"
    )


def _both(s: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float64)
    centred = wide - wide.mean(-1, keepdim=True)
    first = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s.weight
    second = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-2) + s.bias
    return first.sigmoid() + second.tanh()


def _rms_of_one_cast(s: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float64)
    first = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    again = wide.to(torch.float64)
    second = again * torch.rsqrt(again.pow(2).mean(-1, keepdim=True) + 1e-6)
    return first.sigmoid() + (s.weight * second).tanh() + again


@pytest.mark.parametrize("form", [_both, _rms_of_one_cast], ids=["centred", "cast"])
@pytest.mark.parametrize("graph", [False, True])
def test_forms_by_hand_that_share_their_beginning_are_all_found(form: Callable[[Any, Tensor], Tensor], graph: bool) -> None:
    model: nn.Module = Net(form).double().eval()
    if graph:
        model = fx.symbolic_trace(model)
    x = torch.randn(SEQUENCE, dtype=torch.float64)
    planned = normswap.plan(model, x, approximate=True)
    assert [s.kind for s in planned.swaps] == ["hand_written", "hand_written"]
    swapped = normswap.convert(model, x, approximate=True, calibration=[x]).model
    given: list[Tensor] = []
    for layer in (m for m in swapped.modules() if isinstance(m, BatchlessNorm)):
        layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    swapped(x)
    assert len(given) == 2
    for value in given:
        torch.testing.assert_close(value, model.first(x))  # type: ignore[operator]
