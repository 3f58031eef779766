"""Models as users have them, each of which was once missed, mistaken, or met with the wrong words."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.api.convert import inspect
from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.detect.sites import Plan
from normswap.errors import LoadError, SwapError, UnsafePickleError, UsageError

MAYBE = "scales by the root of a mean or variance, or by a norm, as a normalization written by hand does"


def batches(*shape: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def planned(model: nn.Module, *inputs: Any) -> Plan:
    return normswap.plan(randomise(model, 0).eval(), inputs, approximate=True)


class Code(nn.Module):
    """A linear layer, and code behind it."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.run = run
        self.linear = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.linear(x))


class Untraceable(Code):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e6:
            return x
        return super().forward(x)


# -- norms that cannot be listed leave a note ------------------------------------------------------------------------------------


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) * gain


class Gated(nn.Module):
    """Mamba's, by a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain


class TakesGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gated = nn.Linear(8, 16), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.linear(x).chunk(2, -1)
        return cast(Tensor, self.gated(x, gate))


def adain(self: Any, x: Tensor) -> Tensor:
    style = self.linear(x)
    mean, std = style.mean(1, keepdim=True), (style.var(1, keepdim=True) + 1e-5).sqrt()
    return cast(Tensor, std * (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt() + mean)


def rms(self: Any, x: Tensor) -> Tensor:
    return cast(Tensor, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain)


NOTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "code that depends on data": (lambda: nn.Sequential(Untraceable(rms)), "Untraceable (0)"),
    "standard deviation": (lambda: Untraceable(lambda s, x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5)), "Untraceable"),
    "root as a power": (lambda: Untraceable(lambda s, x: x * (x.square().mean(-1, True) + 1e-6) ** -0.5), "Untraceable"),
    "in place": (lambda: Untraceable(lambda s, x: x.mul_(torch.rsqrt(x.square().mean(-1, True) + 1e-6))), "Untraceable"),
    "a function with a gradient of its own": (lambda: Code(lambda s, x: cast(Tensor, cast(Any, Function).apply(x, s.gain))), "Code"),
    "a gate that may be left out": (TakesGated, "Gated (gated)"),
    "statistics of another tensor": (lambda: Code(adain), "Code"),
    "length of a vector": (lambda: Code(lambda s, x: x / x.norm(dim=-1, keepdim=True) * 8**0.5 * s.gain), "Code"),
    "length of a vector, untraceable": (lambda: Untraceable(lambda s, x: x / x.norm(dim=-1, keepdim=True) * s.gain), "Untraceable"),
}


@pytest.mark.parametrize("what", NOTED)
def test_code_that_may_hold_a_norm_is_named(what: str) -> None:
    make, where = NOTED[what]
    found = planned(make(), batches(6, 7, 8)[0])
    assert (found.swaps, found.skips) == ((), ())
    (note,) = (note for note in found.notes if MAYBE in note)
    assert note.startswith(f"the code of {where} scales by")
    assert note.endswith("If it is a normalization, make it a layer with Norm in the name of its class")


def test_the_note_says_why() -> None:
    notes = [note for make in (TakesGated, lambda: Code(adain)) for note in planned(make(), batches(6, 7, 8)[0]).notes if MAYBE in note]
    assert "it is not listed, as its code cannot be rewritten because what it computes depends on whether gate is given." in notes[0]
    assert "it is not listed, as it does not have a form that normswap knows." in notes[1]


def attention(self: Any, x: Tensor) -> Tensor:
    scale = torch.sqrt(torch.tensor(float(x.shape[-1])))
    return (x @ x.transpose(-1, -2) / scale).softmax(-1) @ x


def standardised(self: Any, x: Tensor) -> Tensor:
    weight = self.linear.weight
    return F.linear(x, (weight - weight.mean(1, keepdim=True)) * torch.rsqrt(weight.var(1, keepdim=True) + 1e-6))


SILENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": attention,
    "a weight that is standardised": standardised,
    "squeeze and excitation": lambda s, x: x * x.mean(1, keepdim=True).sigmoid(),
    "centring": lambda s, x: x - x.mean(1, keepdim=True),
    "a root without a mean": lambda s, x: x * torch.sqrt(x.abs() + 1),
    "a root that scales nothing": lambda s, x: torch.cat([x, x.std(0, keepdim=True).expand_as(x)], -1),
    "two roots": lambda s, x: x.var(-1, keepdim=True).sqrt() / x.var(1, keepdim=True).sqrt() + x.relu(),
    "a root times a number": lambda s, x: x + 2 * x.var(-1, keepdim=True).sqrt(),
    "a distance": lambda s, x: (x - x.flip(0)).norm(dim=-1),
    "cosines": lambda s, x: F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).transpose(-1, -2),
}


@pytest.mark.parametrize("cls", [Code, Untraceable])
@pytest.mark.parametrize("what", SILENT)
def test_code_that_is_none_is_not_named(what: str, cls: type[Code]) -> None:
    found = planned(cls(SILENT[what]), batches(6, 7, 8)[0])
    assert (found.swaps, found.skips) == ((), ())
    assert not [note for note in found.notes if MAYBE in note]


@pytest.mark.parametrize("make", [lambda: Code(rms), lambda: nn.Sequential(Code(rms), Untraceable(lambda s, x: x)), lambda: nn.RMSNorm(8)])
def test_a_norm_that_is_listed_is_not_named_again(make: Callable[[], nn.Module]) -> None:
    found = planned(make(), batches(6, 7, 8)[0])
    assert len(found.swaps) == 1
    assert not [note for note in found.notes if MAYBE in note]


# -- layers that share a parameter ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.left = nn.Linear(5, 8), norm(8)
        self.second, self.right = nn.Linear(8, 8), norm(8)
        self.last = norm(8)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.right(self.second(F.relu(self.left(self.first(x)))))))


def test_layers_that_share_a_weight_stay_and_the_others_are_swapped() -> None:
    model = randomise(Tied(nn.LayerNorm), 0).eval()
    conversion = normswap.convert(model, calibration=batches(32, 5), approximate=True)
    assert [swap.name for swap in conversion.plan.swaps] == ["last"]
    reason = "shares a parameter: left.weight and right.weight are one tensor, so calibration would change all; leave them, or untie them"
    assert [(skip.name, skip.reason) for skip in conversion.plan.skips] == [("left", reason), ("right", reason)]
    converted = cast(Any, conversion.model)
    assert converted.left.weight is converted.right.weight


def test_exact_swaps_may_share_a_weight() -> None:
    model = randomise(Tied(nn.BatchNorm1d), 0).eval()
    conversion = normswap.convert(model, batches(32, 5)[0])
    assert [swap.name for swap in conversion.plan.swaps] == ["left", "right", "last"]
    converted = cast(Any, conversion.model)
    assert converted.left.weight is converted.right.weight


def test_one_layer_at_two_places_shares_nothing() -> None:
    model = Tied(nn.LayerNorm)
    model.right = model.left
    assert [swap.name for swap in planned(model, batches(32, 5)[0]).swaps] == ["left", "last"]


# -- torch's encoder ------------------------------------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.Module:
    chosen: dict[str, Any] = {"batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(12, 3, 20, **chosen)
    return randomise(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False), 0).eval()


def test_norms_that_the_fast_path_of_an_encoder_reads_stay() -> None:
    model, data = encoder(), batches(6, 7, 12)
    conversion = normswap.convert(model, calibration=data, approximate=True)
    assert [swap.name for swap in conversion.plan.swaps] == ["norm"]
    assert [skip.name for skip in conversion.plan.skips] == [f"layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
    assert {skip.reason for skip in conversion.plan.skips} == {
        "has tensors that the fast path of TransformerEncoderLayer (set its activation_relu_or_gelu = 0, and use_nested_tensor = False "
        "of the encoder, to do without it) reads directly instead of calling the layer; call the layer there, or leave it"
    }
    with torch.no_grad():
        conversion.model(data[0])  # the fast path runs


@pytest.mark.parametrize("how", ["as the reason says", "batch_first", "activation", "bias"])
def test_norms_that_no_fast_path_reads_are_swapped(how: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "batch_first": {"batch_first": False},
        "activation": {"activation": F.silu},
        "bias": {"bias": False},
    }
    model = encoder(**options.get(how, {}))
    if how == "as the reason says":
        for layer in cast(Any, model).layers:
            layer.activation_relu_or_gelu = 0
    conversion = normswap.convert(model, calibration=batches(6, 7, 12), approximate=True)
    assert (len(conversion.plan.swaps), conversion.plan.skips) == (5, ())
    with torch.no_grad():
        assert conversion.model(batches(6, 7, 12)[0]).isfinite().all()


# -- views --------------------------------------------------------------------------------------------------------------------


def grouped(self: Any, x: Tensor, *, as_list: bool) -> Tensor:
    n, c, length = x.shape
    sizes = (1, n * 4, c * length // 4)
    view = x.reshape(sizes) if as_list else x.reshape(*sizes).contiguous()
    return cast(Tensor, F.batch_norm(view, None, None, training=True).reshape(n, c, length) * self.gain)


@pytest.mark.parametrize("as_list", [False, True])
def test_groups_normalized_as_the_channels_of_one_sample_stay(as_list: bool) -> None:
    found = planned(Code(lambda s, x: grouped(s, x, as_list=as_list)), batches(6, 12, 8)[0])
    assert [(skip.kind, skip.reason) for skip in found.skips] == [
        (
            "batch_norm",
            "normalizes a view of all samples as the channels of one, so that its channels depend on the batch size; "
            "write it as F.group_norm or F.instance_norm",
        )
    ]


def test_a_view_that_keeps_the_samples_apart_is_no_such_thing() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return cast(Tensor, F.batch_norm(x.reshape(-1, 8), None, None, training=True).reshape(x.shape) * self.gain)

    assert [swap.kind for swap in planned(Code(run), batches(6, 12, 8)[0]).swaps] == ["batch_norm"]


class Pixels(nn.Module):
    """A group norm by reshaping: how many values a group has, only the input tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        flat = x.view(x.shape[0], 4, -1)
        flat = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return flat.view(x.shape)


def test_what_only_the_input_tells_is_loaded_with_the_recorded_input(tmp_path: Path) -> None:
    data = batches(4, 3, 12, 10)
    conversion = normswap.convert(randomise(Pixels(), 0).eval(), calibration=data, approximate=True)
    normswap.save(conversion, tmp_path / "saved")
    loaded = cast(nn.Module, normswap.load(tmp_path / "saved", Pixels)).eval()
    assert torch.equal(loaded(data[0]), conversion.model(data[0]))


# -- calibration ----------------------------------------------------------------------------------------------------------------


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)

    def forward(self, *, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(input=self.linear(input=x)))


def test_a_layer_that_is_called_by_keyword_is_calibrated() -> None:
    conversion = normswap.convert(ByKeyword().eval(), calibration=[{"x": x} for x in batches(32, 5)], approximate=True)
    assert [fit.name for fit in conversion.fits] == ["norm"]
    assert 0 < conversion.fits[0].error < 1


class InVmap(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 8), norm

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.vmap(lambda row: self.norm(self.linear(row)))(x))


class Nested(InVmap):
    def forward(self, x: Tensor) -> Tensor:
        parts = torch.nested.nested_tensor([x[0, :3], x[1]], layout=torch.jagged)
        return cast(Tensor, torch.nested.to_padded_tensor(self.norm(self.linear(parts)), 0.0))


@pytest.mark.parametrize(
    ("cls", "shape", "what"), [(InVmap, (6, 5), "inside torch.vmap or the like"), (Nested, (2, 7, 5), "on a nested tensor")]
)
def test_where_calibration_cannot_look(cls: type[InVmap], shape: tuple[int, ...], what: str) -> None:
    with pytest.raises(UsageError, match=rf"^norm is called {what}, so it cannot be calibrated") as raised:
        normswap.convert(cls(nn.LayerNorm(8)).eval(), calibration=batches(*shape), approximate=True)
    assert raised.value.hint == "exclude it from the conversion"


def test_an_exact_swap_works_inside_vmap() -> None:
    model = randomise(InVmap(nn.Sequential(nn.Unflatten(0, (1, 8)), nn.BatchNorm1d(8), nn.Flatten(0))), 0).eval()
    assert normswap.convert(model, batches(6, 5)[0]).parity.passed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_part_is_calibrated_as_it_was_written() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 8)
            self.part = torch.compile(nn.Sequential(nn.BatchNorm1d(8), nn.LayerNorm(8)), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.part(self.linear(x)))

    compiled: Any = randomise(Model(), 0).eval()
    plain = nn.Sequential(compiled.linear, *copy.deepcopy(compiled.part._orig_mod)).eval()
    one, other = (normswap.convert(model, calibration=batches(32, 5), approximate=True) for model in (compiled, plain))
    assert [fit.error for fit in one.fits] == pytest.approx([fit.error for fit in other.fits])


def test_a_part_that_a_hook_of_a_layer_calls_comes_along() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8)).eval()
    model[1].add_module("observer", nn.Identity())
    model[1].register_forward_hook(lambda module, args, output: module.observer(output))
    conversion = normswap.convert(model, calibration=batches(32, 5), approximate=True)
    assert isinstance(conversion.model[1].observer, nn.Identity)


# -- what is said ----------------------------------------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """One gain for all channels (Nguyen & Salazar 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.scale * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5))


def test_one_gain_for_all_channels_is_no_number_of_channels() -> None:
    (skip,) = planned(nn.Sequential(nn.Linear(5, 8), ScaleNorm()), batches(6, 5)[0]).skips
    assert skip.reason.startswith("is a ScaleNorm without a weight or a size of its own, so only its input tells how many channels")


def test_a_list_of_modules_that_is_not_registered() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norms = nn.Linear(5, 8), [nn.LayerNorm(8)]

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.norms[0](self.linear(x)))

    (skip,) = planned(Listed(), batches(6, 5)[0]).skips
    assert "because it calls a module that is no submodule of it: a list of modules has to be an nn.ModuleList" in skip.reason


@pytest.mark.parametrize("enabled", [False, True])
def test_a_region_of_autocast_stays(enabled: bool) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return F.layer_norm(x.float(), (8,), self.gain)

    (skip,) = planned(Code(run), batches(6, 8)[0]).skips
    assert "because it has a region of its own of no_grad or autocast" in skip.reason


def test_tracing_leaves_autocast_and_gradients_as_they_were() -> None:
    planned(Code(lambda s, x: F.layer_norm(x, (8,), s.gain)), batches(6, 8)[0])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_have_no_function_to_keep() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(6)).eval()
    with pytest.raises(UsageError, match=r"^0, 2 are lazy and have no weights yet, so there is no function to keep"):
        normswap.convert(model, batches(6, 5)[0])
    model(batches(6, 5)[0])
    assert normswap.convert(model, batches(6, 5)[0]).parity.passed


def test_a_model_that_refuses_to_be_copied() -> None:
    class Sharded(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("FSDP does not support deepcopy. Please use state dict for serialization.")

    with pytest.raises(SwapError, match=r"^Sharded cannot be copied: FSDP does not support deepcopy") as raised:
        normswap.plan(Sharded(nn.Linear(5, 8), nn.BatchNorm1d(8)).eval(), batches(6, 5)[0])
    assert raised.value.hint == "convert the model before fully_shard wraps it"


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_the_norms_of_a_scripted_part_are_not_called_uncalled() -> None:
    model = nn.Sequential(nn.Linear(5, 8), torch.jit.script(nn.Sequential(nn.BatchNorm1d(8)).eval()))
    plan, (known,) = inspect(model.eval(), batches(6, 5)[0])
    assert plan.skips[0].calls is None
    assert "never_called" not in [trap.code for trap in known.warnings]


def test_what_is_known_of_a_norm_that_is_written_out() -> None:
    _, (known,) = inspect(Code(rms).eval(), batches(6, 7, 8)[0])
    assert known.unseen == "it is written out in code, of which a watched forward pass shows no call"


def test_distributed_data_parallel_is_unwrapped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    for model, name in ((wrapped, "the model"), (nn.Sequential(wrapped), "0")):
        with pytest.raises(SwapError, match=f"^{name} is wrapped in DistributedDataParallel") as raised:
            normswap.plan(model, batches(6, 5)[0])
        assert raised.value.hint is not None
        assert re.match(r"convert what it wraps, its `module`", raised.value.hint)
    assert len(normswap.plan(wrapped.module.eval(), batches(6, 5)[0]).swaps) == 1


SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 8)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return F.layer_norm(self.linear(x), (8,), self.gain)




def build():
    torch.manual_seed(0)
    return Net().eval()
"""


def test_a_file_that_carries_code_says_how_else_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    nets = importlib.import_module("users_nets")
    torch.save(nets.build(), tmp_path / "net.pt")
    torch.save(batches(32, 5)[0], tmp_path / "data.pt")
    out, trusted = tmp_path / "out", ["users_nets"]
    options = ConvertOptions(data=str(tmp_path / "data.pt"), approximate=True, onnx=False, trust_packages=trusted)
    convert_to_directory(str(tmp_path / "net.pt"), out, options)
    with pytest.raises(UnsafePickleError, match=r"out/model.pt carries code, as a norm was replaced in the code of one of its") as raised:
        normswap.load(out, trust_packages=["users_nets"])
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("--arch package.module:factory (factory=... in Python) with what builds the original model")
    x = batches(4, 5)[0]
    built, run = cast(Any, normswap.load(out, nets.build)), cast(Any, normswap.load(out, trust=True))
    assert torch.equal(built(x), run(x))
    (out / "model.pt").write_bytes((tmp_path / "net.pt").read_bytes())  # whatever else it wants to run is listed as ever
    with pytest.raises(LoadError, match=r"model\.pt was changed after it was written"):
        normswap.load(out)
    recipe = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps({name: value for name, value in recipe.items() if name != "files"}))
    with pytest.raises(UnsafePickleError, match=r"wants to run code that nobody vouched for:\n  users_nets.Net"):
        normswap.load(out)


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_drift_that_nothing_can_keep(limit: float) -> None:
    with pytest.raises(UsageError, match=rf"^max_drift is {limit}; expected a number that is 0 or more$"):
        normswap.convert(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8)).eval(), calibration=batches(32, 5), max_drift=limit)
