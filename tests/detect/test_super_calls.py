"""Classes derived from a norm whose code guards `super().forward(x)`: the code stays, and the call goes to a layer. Or why not.

What a conversion must keep is the code, so every class is compared with itself, at several batch sizes and at inputs of every branch.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from next_step import says_what_to_do
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.detect.super_calls import under_super
from normswap.models.own_code import is_emptied

C = 6


class Empty(nn.BatchNorm2d):
    """detectron2's and maskrcnn-benchmark's, for batches without a box."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > 0:
            return super().forward(x)
        return x.new_empty(x.shape)


class Asserts(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, f"expected 4 axes, got {x.dim()}"
        return super().forward(x)


class Masked(nn.BatchNorm2d):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


class OneSample(nn.BatchNorm2d):
    """Does without the statistics of a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            self.eval()
            y = super().forward(x)
            self.train()
            return y
        return super().forward(x)


class Ghost(nn.BatchNorm2d):
    """Ghost batches: in train mode each half has statistics of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])
        return super().forward(x)


class Tokens(nn.BatchNorm1d):
    """levit's and swin's: images or tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return super().forward(x.flatten(2)).unflatten(2, x.shape[2:])
        return super().forward(x)


class Bounded(nn.BatchNorm2d):
    """A branch on the data, which reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 1e3:
            return cast(Tensor, x * self.weight.view(1, -1, 1, 1) + self.shifted())
        return super().forward(x)

    def shifted(self) -> Tensor:
        return self.bias.view(1, -1, 1, 1)


class Wide(nn.BatchNorm2d):
    """apex's keep_batchnorm_fp32, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class Counts(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + x.shape[0]
        return super().forward(x)


class Twice(Empty):
    """A guard over a guard."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] != 5 else -super().forward(x)


class Synced(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.numel() else x


class Tracked(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 1 else x


def tracked(channels: int) -> nn.Module:
    return Tracked(channels, affine=True, track_running_stats=True)


SWAPPED: dict[str, Callable[[int], nn.Module]] = {
    "nothing in the batch": Empty,
    "a rank asserted": Asserts,
    "an optional mask": Masked,
    "a batch of one": OneSample,
    "ghost batches": Ghost,
    "images or tokens": Tokens,
    "a branch on the data": Bounded,
    "a region without autocast": Wide,
    "an attribute that it sets": Counts,
    "a guard over a guard": Twice,
    "synchronized": Synced,
    "an instance norm with statistics": tracked,
    "no weight and bias": lambda c: Empty(c, affine=False),
    "by plain averages": lambda c: Empty(c, momentum=None),
}
NEEDS_SAMPLES = ("a branch on the data", "an instance norm with statistics")  # as their code or torch's does


def net(norm: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(4, C, 3), norm, nn.ReLU(), nn.Conv2d(C, 3, 1)), 5).eval()


def images(batch: int, factor: float = 1.0) -> Tensor:
    return torch.randn(batch, 4, 9, 7, generator=torch.Generator().manual_seed(batch)) * factor


@functools.cache
def made(what: str) -> tuple[nn.Module, normswap.Conversion]:
    """A net and its conversion, which tests copy before they change it."""
    torch.manual_seed(0)  # whichever test asks first
    model = net(SWAPPED[what](C))
    return model, normswap.convert(model, images(2))


@pytest.mark.parametrize("what", SWAPPED)
def test_a_guard_stays_and_its_norm_is_swapped(what: str) -> None:
    model, conversion = copy.deepcopy(made(what))  # one of them counts its samples
    (swap,) = conversion.plan.swaps
    assert (conversion.plan.skips, swap.name, swap.preserves) == ((), "1.norm", "exact")
    converted: Any = conversion.model
    assert isinstance(converted[1], type(cast(Any, model)[1]))
    assert isinstance(converted[1].norm, normswap.BatchlessNorm)
    assert not any("running" in name for name, _ in converted.named_buffers())
    for batch in (1, 2, 3, 5, *([] if what in NEEDS_SAMPLES else [0])):
        for factor in (1.0, 1e-3, 1e5):
            x = images(batch, factor)
            expected = model(x)
            torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=2e-6 * max(1.0, factor))


@pytest.mark.parametrize("what", SWAPPED)
def test_it_trains_at_every_batch_size_and_through_copies(what: str, tmp_path: Path) -> None:
    model, converted = copy.deepcopy((made(what)[0], cast(Any, made(what)[1].model)))
    converted.train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.01)
    before = converted[1].norm.mean.detach().clone()
    for batch in (2, 3, 4):
        optimizer.zero_grad()
        converted(images(batch)).square().mean().backward()
        optimizer.step()
    assert torch.equal(converted[1].norm.mean, before) == (what == "an instance norm with statistics")  # whose statistics are frozen
    converted.eval()
    x = images(3)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    copies = [copy.deepcopy(converted), torch.load(file, weights_only=False)]
    fresh = normswap.convert(model, x, coupling="none").model
    fresh.load_state_dict({name: tensor for name, tensor in converted.state_dict().items() if "input_mean" not in name}, strict=False)
    normswap.save(converted, tmp_path / "saved")
    copies += [fresh, normswap.load(tmp_path / "saved", lambda: copy.deepcopy(model))]
    for copied in copies:
        torch.testing.assert_close(cast(nn.Module, copied).eval()(x), converted(x), rtol=0, atol=0)


def test_what_a_mask_does_stays() -> None:
    layer = randomise(nn.Sequential(Masked(C)), 3).eval()
    converted: Any = normswap.convert(layer, torch.randn(2, C, 5, 4)).model
    x, mask = torch.randn(3, C, 5, 4), torch.rand(3, 1, 5, 4).round()
    torch.testing.assert_close(converted[0](x, mask=mask), cast(Any, layer)[0](x, mask=mask), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="expected 4 axes, got 3"):
        cast(Any, normswap.convert(net(Asserts(C)), images(2)).model)[1](torch.randn(2, C, 5))


def test_plain_state_dicts_load_and_plans_do_not_list_it_twice() -> None:
    for norm in (Empty(C), Wide(C)):
        converted = normswap.convert(net(norm), images(2)).model
        converted.load_state_dict(dict(converted.state_dict()))  # without the metadata that say of which version it is
        plan = normswap.plan(converted, images(2))
        assert (plan.swaps, plan.skips) == ((), ())
        assert is_emptied(cast(Any, converted)[1])


def test_it_goes_back() -> None:
    model = net(Empty(C))
    reverted: Any = normswap.revert(normswap.convert(model, images(2)).model)
    torch.testing.assert_close(reverted(images(3)), model(images(3)), rtol=0, atol=1e-6)
    assert type(reverted[1].norm) is nn.BatchNorm2d
    assert torch.equal(reverted[1].norm.running_var, cast(Any, model)[1].running_var)


def test_its_conv_is_its_producer_if_it_passes_its_input_on() -> None:
    producers = {what: made(what)[1].plan.swaps[0].producer for what in SWAPPED}
    changing = {"ghost batches", "images or tokens"}
    assert {what for what, producer in producers.items() if producer is None} == changing
    assert normswap.inspect(net(Empty(C)), images(2))[1][0].shapes == ((2, C, 7, 5),)


def test_an_onnx_file_of_it(tmp_path: Path) -> None:
    converted = normswap.convert(net(Empty(C)), images(2))
    export = normswap.export_onnx(converted, images(2), tmp_path / "model.onnx")
    assert not any(site.left for site in export.sites)


class Shared(nn.Module):
    """One guarded norm under two names, and one that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(4, C, 3), Empty(C), nn.Conv2d(C, C, 1)
        self.again, self.other, self.idle = self.first, Empty(C), Empty(C)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.again(self.other(self.last(self.first(self.conv(x))))))


class SharedUntraceable(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) < 1e30 else x


@pytest.mark.parametrize("make", [Shared, SharedUntraceable])
def test_sharing_and_calls_are_counted(make: type[nn.Module]) -> None:
    model = randomise(make(), 8).eval()
    conversion = normswap.convert(model, images(2))
    assert conversion.plan.backend == ("fx" if make is Shared else "walk")
    assert [(s.name, s.aliases, s.calls, s.producer) for s in conversion.plan.swaps] == [
        ("first.norm", ("again.norm",), 2, None),
        ("other.norm", (), 1, "last"),
        ("idle.norm", (), 0, None),
    ]
    converted: Any = conversion.model
    assert converted.first is converted.again
    torch.testing.assert_close(converted(images(3)), model(images(3)), rtol=1e-5, atol=1e-5)


def test_a_guarded_norm_in_a_graph_module_and_as_the_model_itself() -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = net(Empty(C))
    traced = torch.fx.GraphModule(model, Leaves().trace(model))
    alone = randomise(Empty(C), 9).eval()
    for source, x, name in ((traced, images(2), "1.norm"), (alone, torch.randn(2, C, 5, 4), "norm")):
        conversion = normswap.convert(source, x)
        assert [swap.name for swap in conversion.plan.swaps] == [name]
        torch.testing.assert_close(conversion.model(x[:1]), source(x[:1]), rtol=1e-5, atol=2e-6)


# -- approximate ---------------------------------------------------------------------------------------------------------------------------


class Ranked(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 3
        return super().forward(x).tanh()


class Castable(nn.LayerNorm):
    """Reads the weight, which calibration changes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)) if x.numel() > 1 else x


class ByName(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.LayerNorm.forward(self, x) if x.numel() > 99 else super().forward(x)


def test_a_guarded_layer_norm_is_swapped_when_asked_for() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, C), Ranked(C), nn.Linear(C, 3)), 4).eval()
    data = [torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    (skip,) = normswap.convert(model, calibration=data).plan.skips
    assert skip.reason.endswith(
        "ask for an approximate one, from the calibration data that you gave, with approximate=True (--approximate)"
    )
    conversion = normswap.convert(model, calibration=data, approximate=True)
    (fit,) = conversion.fits
    assert (fit.name, fit.error < 0.9) == ("1.norm", True)
    for norm, why in ((Castable(C), "its code reads weight itself"), (ByName(C), "its code calls LayerNorm itself")):
        assert under_super(norm).why_not == why


# -- a copy of torch's forward -----------------------------------------------------------------------------------------------------------


class Copied(nn.BatchNorm2d):
    """Torch's own forward, copied and changed: it asks for the rank, counts and reads the statistics."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, by_batch, momentum, self.eps)
        return F.leaky_relu(y, 0.1)


class CopiedAnyRank(Copied):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 3:
            raise ValueError(f"expected 3 axes or more, got {input.dim()}")


class CopiedByRank(Copied):
    """Another function at another rank."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else F.batch_norm(x, self.running_mean, self.running_var)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@pytest.mark.parametrize("norm", [Copied, CopiedAnyRank])
def test_a_copy_of_torchs_forward_is_rewritten(norm: type[nn.BatchNorm2d]) -> None:
    model = net(norm(C))
    conversion = normswap.convert(model, images(2))
    (swap,) = conversion.plan.swaps
    assert (conversion.plan.skips, swap.name, swap.site.function) == ((), "1.batch_norm", "torch.nn.functional.batch_norm")
    converted = conversion.model
    for batch in (1, 3):
        torch.testing.assert_close(converted(images(batch)), model(images(batch)), rtol=1e-5, atol=2e-6)
    converted.train()(images(1)).square().mean().backward()
    assert normswap.plan(converted.eval(), images(2)).skips == ()
    converted.load_state_dict(dict(converted.state_dict()))


def test_another_function_at_another_rank_stays() -> None:
    (skip,) = normswap.plan(net(CopiedByRank(C)), images(2)).skips
    assert "its code reads num_batches_tracked, running_mean and running_var itself" in skip.reason


# -- kept ---------------------------------------------------------------------------------------------------------------------------------


class OwnStatistics(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            return x - cast(Tensor, self.running_mean).view(1, -1, 1, 1)
        return super().forward(x) if x.numel() else x


class Hidden(nn.BatchNorm2d):
    """By a helper, and by a name in a string."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().mean()) < 9 else self.other(x)

    def other(self, x: Tensor) -> Tensor:
        return x - cast(Tensor, getattr(self, "running_mean")).view(1, -1, 1, 1)  # noqa: B009


class OwnCall(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.numel() else F.layer_norm(x, x.shape[1:])


class OldStyle(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x) if x.numel() else x


class NeverTrains(nn.BatchNorm2d):
    """In train mode it normalizes by code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-5)
        return super().forward(x) if x.numel() else x


class NeedsMore(nn.BatchNorm2d):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x * scale if scale > 1 else x)


def outside(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return x - cast(Tensor, norm.running_mean).view(1, -1, 1, 1)


class Outside(nn.BatchNorm2d):
    """What a function elsewhere reads, no look at the class tells; running it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + outside(self, x) if x.numel() else x


KEPT: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "statistics": (OwnStatistics, "its code reads running_mean itself"),
    "statistics, hidden": (Hidden, "its code reads running_mean itself"),
    "another norm": (OwnCall, "its code calls layer_norm itself"),
    "not by super": (OldStyle, "its code reaches the norm otherwise than by super().forward(x)"),
    "not in train mode": (NeverTrains, "its code does not call super().forward in train mode as it does in eval mode"),
    "another argument": (NeedsMore, "it takes none of the inputs that it was tried with"),
    "statistics, outside": (Outside, "its code reaches the norm otherwise than by super().forward(x)"),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_does_more_stays_and_the_rest_goes_on(what: str) -> None:
    make, why = KEPT[what]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.own, self.plain = nn.Conv2d(4, C, 3), make(C), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            more = (2.0,) if isinstance(self.own, NeedsMore) else ()
            return cast(Tensor, self.plain(self.own(self.conv(x), *more)))

    model = randomise(Net(), 6).eval()
    conversion = normswap.convert(model, images(2))
    assert [swap.name for swap in conversion.plan.swaps] == ["plain"]
    (skip,) = conversion.plan.skips
    assert skip.reason == (
        f"is a {type(model.own).__name__}, which overrides forward, so it may do more than normalize ({why}); "
        "if it only normalizes, pass a rule of your own (--rule, docs/writing_rules.md)"
    )
    assert says_what_to_do(skip.reason)


def test_a_branch_that_no_trial_took_fails_loudly() -> None:
    """Never silently wrong: the object has no statistics any more, so what reads them stops there."""

    class Late(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().abs().max()) < 1e6 else outside(self, x)

    model = net(Late(C))
    converted = normswap.convert(model, images(2)).model
    with pytest.raises(AttributeError, match="'Late' object has no attribute 'running_mean'"):
        converted(images(2, 1e9))


def test_asking_changes_nothing() -> None:
    for make in (*SWAPPED.values(), *(make for make, _ in KEPT.values())):
        norm = randomise(make(C), 2).train()
        state, random = {n: t.clone() for n, t in norm.state_dict().items()}, torch.get_rng_state()
        held = dict(vars(norm))
        under_super(norm)
        assert torch.equal(torch.get_rng_state(), random)
        assert norm.training
        assert vars(norm).keys() == held.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())
