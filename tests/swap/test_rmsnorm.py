"""`to="rmsnorm"`: a LayerNorm becomes an RMSNorm where its input can lose its mean, and the function stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from fixtures import streams
from normswap.errors import LoadError
from normswap.layer.rms_norm import CentreInput, CentreOutput, RMSNorm, centrings
from normswap.report.conversion import Report

LIMIT = 1e-12
C = 6


def trained(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with gains, biases and means that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator) + 0.3)
    return model.double().eval()


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = model(x), other(x)
    return float((a - b).abs().max() / a.abs().max())


def converted(model: nn.Module, x: Tensor, **options: Any) -> normswap.Conversion[nn.Module]:
    x = x.double() if x.is_floating_point() else x
    before = {name: value.clone() for name, value in trained(model).state_dict().items()}
    conversion = normswap.convert(model, x, to="rmsnorm", **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the original is untouched
    assert error(model, conversion.model, x) <= LIMIT
    return conversion


class Block(nn.Module):
    def __init__(self, *, gain: bool = False, dropout: float = 0.0, last: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C, eps=1e-3), nn.Linear(C, 9), nn.Linear(9, C)
        self.drop, self.last = nn.Dropout(dropout), last or nn.Identity()
        self.gamma = nn.Parameter(torch.randn(C)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.drop(self.down(self.up(self.norm(x)).relu())))
        return x + (y if self.gamma is None else y * self.gamma)  # type: ignore[no-any-return]


class Post(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))  # type: ignore[no-any-return]


class ResPost(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(self.up(x).relu()))  # type: ignore[no-any-return]


class First(nn.LayerNorm):
    """torch's LayerNorm under another name."""


class OverChannels(nn.LayerNorm):
    """LayerNorm over axis 1, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Tied(nn.Module):
    """A head that shares the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.blocks, self.norm = nn.Embedding(11, C), nn.Sequential(Block(), Block()), nn.LayerNorm(C)
        self.head = nn.Linear(C, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.wte(x))))  # type: ignore[no-any-return]


class Stem(nn.Module):
    """A stem that ends in an activation, then positions: only what takes the sum can centre it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.positions = nn.Conv1d(4, C, 2, stride=2), nn.Parameter(torch.randn(5, C))
        self.first, self.second, self.norm = Block(), Block(), nn.LayerNorm(C)
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2) + self.positions
        return self.head(self.norm(self.second(self.first(h))))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A vision Transformer's stream: patches, a class token, positions, two shared blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token, self.positions = (
            nn.Conv2d(3, C, 2, stride=2),
            nn.Parameter(torch.randn(1, 1, C)),
            nn.Parameter(torch.randn(1, 7, C)),
        )
        self.block, self.norm, self.head = Block(gain=True, dropout=0.1), First(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        h = h + self.positions[:, : h.shape[1]]
        return self.head(self.norm(self.block(h))[:, 0])  # type: ignore[no-any-return]


class Places(nn.Module):
    """Channels on axis 1, all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.ConvTranspose2d(3, C, 2), OverChannels(C), nn.Conv2d(C, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(F.avg_pool2d(self.stem(x), 2)))  # type: ignore[no-any-return]


class Squared(nn.Module):
    """A product of the stream with itself: centred on one side it would be centred on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, C), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.head(self.norm(h @ h) + self.norm(h))  # type: ignore[no-any-return]


class Again(nn.Module):
    """One activation, called in the stem and before it: what it returns the second time is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, C), nn.Linear(C, C), nn.Tanh()
        self.blocks, self.norm, self.head = nn.Sequential(Block(), Block()), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.act(self.second(self.act(self.first(x)))))))  # type: ignore[no-any-return]


class Both(nn.Module):
    """Returns an activation, which is the stream, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        return h.tanh(), h.sin()


class AfterBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.norm, self.head = Both(), nn.Sequential(Block(), Block()), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, other = self.stem(x)
        return self.head(self.norm(self.blocks(h)) * other)  # type: ignore[no-any-return]


class Pair(Block):
    """Takes the stream twice."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return y + self.down(self.up(self.norm(x)).relu())  # type: ignore[no-any-return]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.block, self.norm, self.head = nn.Linear(4, C), Pair(), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        return self.head(self.norm(self.block(h, h)))  # type: ignore[no-any-return]


class Serving(nn.Sequential):
    """For inference alone, where torch dispatches `linear` and `layer_norm` whole."""

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


class Through(nn.Module):
    """A stream that `body` takes from the first linear to the last norm."""

    def __init__(self, body: Callable[[Tensor], Tensor], start: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.start = body, start or nn.Linear(4, C)
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.start(x))))  # type: ignore[no-any-return]


class ReadsInside(nn.Module):
    """Returns an activation that it has read itself: a hook of its output comes too late."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        self.seen = self.norm(h)
        return h


class AfterInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.stem, self.norm, self.head = nn.Linear(4, C), ReadsInside(), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(self.start(x)))
        return self.head(y + self.stem.seen)  # type: ignore[no-any-return]


class PassedBy(nn.Module):
    """An activation that a module returns as it got it, and that is read beside that module, too."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.passes, self.norm, self.other, self.head = (
            nn.Linear(4, C),
            nn.Identity(),
            nn.LayerNorm(C),
            nn.LayerNorm(C),
            nn.Linear(C, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x).tanh()
        return self.head(self.norm(h) + self.other(self.passes(h)))  # type: ignore[no-any-return]


class Gained(nn.Module):
    """A linear with a gain behind it that reads the stream it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(C, C), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * self.gamma  # type: ignore[no-any-return]


class Read(Through):
    """`body` says what is made of the output and the stream."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        return self.head(self.norm(h)) + cast(Any, self.body)(h)  # type: ignore[no-any-return]


def _numpy(h: Tensor) -> Tensor:
    return torch.tensor(h.detach().numpy().mean())


def _list(h: Tensor) -> Tensor:
    return torch.tensor(h[0, 0].tolist()[1], dtype=h.dtype)


def tokens() -> Tensor:
    return torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))


def places(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1


def after(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, C), *layers, nn.LayerNorm(C), nn.Linear(C, 3))


# name -> (model, its input, the norms that become RMSNorm, the hooks that centre)
FIRES: dict[str, tuple[nn.Module, Callable[[], Tensor], list[str], list[str]]] = {
    "blocks": (after(Block(), Block(dropout=0.1)), places(2, 5, 4), ["1.norm", "2.norm", "3"], []),
    "a gain": (after(Block(gain=True), Block(gain=True, dropout=0.1)), places(2, 5, 4), ["1.norm", "2.norm", "3"], []),
    "a tied head": (Tied(), tokens, ["blocks.0.norm", "blocks.1.norm", "norm"], ["wte"]),
    "a stem": (Stem(), places(2, 10, 4), ["first.norm", "second.norm", "norm"], ["first"]),
    "patches": (Patches(), places(2, 3, 4, 6), ["block.norm", "norm"], []),
    "channels on axis 1": (Places(), places(2, 3, 4, 5), ["norm"], []),
    "a norm after the branch": (after(ResPost(), ResPost()), places(2, 5, 4), ["1.norm", "2.norm"], []),
    "a branch that cannot be centred": (
        after(Block(), Block(last=nn.Tanh()), Block()),
        places(2, 5, 4),
        ["1.norm", "2.norm", "3.norm", "4"],
        ["2.last"],
    ),
    "a norm before the blocks": (nn.Sequential(nn.Linear(4, C), nn.LayerNorm(C), Block(), Block()), places(2, 5, 4), ["1"], []),
    "a norm before the blocks, and one behind": (
        after(nn.LayerNorm(C), Block(), Block()),
        places(2, 5, 4),
        ["1", "2.norm", "3.norm", "4"],
        ["1"],
    ),
    "a linear without a bias": (nn.Sequential(nn.Linear(4, C, bias=False), nn.LayerNorm(C, bias=False)), places(2, 4), ["1"], []),
    "no affine": (nn.Sequential(nn.Linear(4, C), nn.LayerNorm(C, elementwise_affine=False)), places(2, 4), ["1"], []),
    "an activation that is called twice": (Again(), places(2, 5, 4), ["blocks.0.norm", "blocks.1.norm", "norm"], ["blocks"]),
    "a module that returns two": (AfterBoth(), places(2, 5, 4), ["blocks.0.norm", "blocks.1.norm", "norm"], ["blocks"]),
    "a forward in inference mode": (Serving(nn.Linear(4, C), nn.LayerNorm(C), nn.Linear(C, 3)), places(2, 5, 4), ["1"], []),
    "places that numbers pick": (Through(lambda h: h[torch.arange(len(h)), torch.tensor([2, 0])]), places(2, 5, 4), ["norm"], []),
    "places that numbers pick, in two axes": (Through(lambda h: h[:, torch.tensor([[2, 0], [1, 4]])]), places(2, 5, 4), ["norm"], []),
    "places that are picked apart": (
        Through(lambda h: h[:, None].expand(-1, 2, -1, -1)[torch.tensor([1, 0, 1]), :, torch.tensor([2, 0, 1])]),
        places(2, 5, 4),
        ["norm"],
        [],
    ),
    "places that a mask picks": (Through(lambda h: h[torch.arange(10).view(2, 5) % 3 == 1]), places(2, 5, 4), ["norm"], []),
    "a mixture of two places": (Through(lambda h: torch.lerp(h, h.roll(1, 1), 0.3)), places(2, 5, 4), ["norm"], []),
    "a mixture with a share for each place": (
        Through(lambda h: torch.lerp(h, h.flip(1), torch.linspace(0, 1, 5, dtype=h.dtype)[:, None])),
        places(2, 5, 4),
        ["norm"],
        [],
    ),
    "bags of tokens": (Through(lambda h: h, nn.EmbeddingBag(11, C)), tokens, ["norm"], []),
    "bags of tokens, summed": (Through(lambda h: h, nn.EmbeddingBag(11, C, mode="sum", padding_idx=1)), tokens, ["norm"], []),
    "a variance that is read": (Read(lambda h: h.var(-1, keepdim=True) + h.std(-1, keepdim=True)), places(2, 5, 4), ["norm"], []),
    "blocks after one with the norm behind the sum": (after(Post(), Block()), places(2, 5, 4), ["2.norm", "3"], ["1.norm"]),
}


@pytest.mark.parametrize("case", FIRES)
def test_the_function_stays(case: str) -> None:
    model, make, names, cuts = FIRES[case]
    conversion = converted(model, make())
    assert [swap.name for swap in conversion.plan.swaps] == names
    assert [name for name, module in conversion.model.named_modules() if centrings(module)] == cuts
    rms = [name for name, module in conversion.model.named_modules() if isinstance(module, RMSNorm)]
    assert rms == names
    assert conversion.model.state_dict().keys() == model.state_dict().keys()


def test_the_stream_has_no_mean() -> None:
    conversion = converted(after(Block(gain=True), Block()), places(2, 5, 4)())
    seen: list[Tensor] = []
    conversion.model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr, operator]
    conversion.model(places(2, 5, 4)().double())
    assert float(seen[0].mean(-1).abs().max().detach()) <= 1e-15 * float(seen[0].abs().max().detach()) * C


class Merge(nn.Module):
    """Swin's: pairs of tokens are joined along the channels, then normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(2 * C), nn.Linear(2 * C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(x.reshape(len(x), -1, 2 * C)))  # type: ignore[no-any-return]


class Tap(nn.Module):
    """Returns the stream as well."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.block, self.norm = nn.Linear(4, C), Block(), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.start(x))
        return torch.cat([h[..., :2], self.norm(h)], -1)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, groups=C), OverChannels(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class InCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(4, C), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.linear(x), (C,), self.weight)


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C))
    model[2].weight = model[0].weight
    return model


def _only(reason: str) -> dict[str, str]:
    return {"norm": reason}


_WRITTEN = "it would take a centring of its own to save that of one LayerNorm: its stream is written by the model itself "

KEPT: dict[str, tuple[nn.Module, Callable[[], Tensor], dict[str, str]]] = {
    "read in the module that returns it": (
        AfterInside(),
        places(2, 5, 4),
        {"stem.norm": "its stream is written by stem (tanh)", "norm": "its stream is written by stem (tanh)"},
    ),
    "taken twice": (
        Twice(),
        places(2, 5, 4),
        {"block.norm": "its stream is ", "norm": "it would take a centring of its own to save that of one LayerNorm: "},
    ),
    "read by a linear with a gain behind it": (
        after(Gained()),
        places(2, 5, 4),
        {"2": "it would take a centring of its own to save that of one LayerNorm: its stream is also read by 1.linear (a matrix product)"},
    ),
    "read beside the module that returns it": (
        PassedBy(),
        places(2, 5, 4),
        {"norm": "its stream is written by the model itself (tanh)", "other": "its stream is written by the model itself (tanh)"},
    ),
    "channels that numbers pick": (
        Through(lambda h: h[..., torch.tensor([1, 0, 2, 2, 4, 5])]),
        places(2, 5, 4),
        _only(_WRITTEN + "(index)"),
    ),
    "places that are picked for each channel": (
        Through(lambda h: h[0, torch.arange(6) % 5, torch.arange(6)].expand(2, -1)),
        places(2, 5, 4),
        _only("it would take a centring of its own to save that of one LayerNorm"),
    ),
    "a mask over the channels": (Through(lambda h: h[h > -9].view(2, 5, C)), places(2, 5, 4), _only("it would take a centring of its own")),
    "a mixture with a share for each channel": (
        Through(lambda h: torch.lerp(h, h.roll(1, 1), torch.linspace(0, 1, C, dtype=h.dtype))),
        places(2, 5, 4),
        _only(_WRITTEN + "(lerp)"),
    ),
    "the largest of each bag": (
        Through(lambda h: h, nn.EmbeddingBag(11, C, mode="max")),
        tokens,
        _only("it would take a centring of its own to save that of one LayerNorm: its stream is written by start (embedding_bag"),
    ),
    "a variance over another axis": (Read(lambda h: h.var(1, keepdim=True)[..., :3]), places(2, 5, 4), _only("its stream is also read by")),
    "a variance over two axes": (Read(lambda h: h.var((1, 2), keepdim=True)), places(2, 5, 4), _only("its stream is also read by")),
    "read by numpy": (Read(_numpy), places(2, 5, 4), _only("its stream is written into through a view, or read by code outside torch")),
    "read by Python": (Read(_list), places(2, 5, 4), _only("its stream is written into through a view, or read by code outside torch")),
    "post-norm": (
        nn.Sequential(nn.Linear(4, C), Post()),
        places(2, 5, 4),
        {"1.norm": "it would take a centring of its own to save that of one LayerNorm: its stream is also read by 1.up (a matrix"},
    ),
    "joined patches": (
        nn.Sequential(nn.Linear(4, C), Block(), Merge()),
        places(2, 6, 4),
        {
            "1.norm": "its stream is also read by 2 (which joins or splits its channels), where its mean may count; leave it",
            "2.norm": "it would take a centring of its own to save that of one LayerNorm: its stream is written by 2 (which joins",
        },
    ),
    "an output": (
        Tap(),
        places(2, 5, 4),
        {"block.norm": "its stream is also read by the model itself", "norm": "its stream is also read by"},
    ),
    "the output": (
        nn.Sequential(nn.Linear(4, C), Block()),
        places(2, 5, 4),
        {"1.norm": "its stream is an output of the model, of which the mean"},
    ),
    "depthwise": (
        Depthwise(),
        places(2, C, 5, 6),
        {"norm": "it would take a centring of its own to save that of one LayerNorm: its stream is written by conv"},
    ),
    "the input": (
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)),
        places(2, 4),
        {"0": "it would take a centring of its own to save that of one"},
    ),
    "in code": (InCode(), places(2, 4), {"layer_norm": "is a call in the code of a module; make it a layer, nn.LayerNorm"}),
    "two axes": (nn.Sequential(nn.Linear(4, C), nn.LayerNorm((5, C))), places(2, 5, 4), {"1": "normalizes over several axes; leave it"}),
    "a product with itself": (Squared(), places(C, 4), {"norm": "its stream is also read by the model itself (a matrix product)"}),
    "group norm": (
        nn.Sequential(nn.Conv1d(4, C, 2), nn.GroupNorm(2, C)),
        places(2, 4, 5),
        {"1": "is a GroupNorm, which does not compute LayerNorm"},
    ),
    "batch norm": (
        nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C)),
        places(2, 4),
        {"1": "is a BatchNorm1d, which does not compute LayerNorm"},
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_cannot_be_done_is_kept_with_the_reason(case: str) -> None:
    model, make, reasons = KEPT[case]
    conversion = converted(model, make())
    assert not conversion.plan.swaps
    found = {skip.name: skip.reason for skip in conversion.plan.skips}
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert found[name].startswith(reason)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), conversion.model.state_dict().values(), strict=True))


def test_what_a_users_hook_sees_stays() -> None:
    model = after(Block(), Block())
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    conversion = converted(model, places(2, 5, 4)())
    assert {skip.reason for skip in conversion.plan.skips} >= {"its stream is seen by hooks of 1; leave it"}
    model(places(2, 5, 4)().double())
    first = seen[-1]
    conversion.model(places(2, 5, 4)().double())
    assert torch.equal(seen[-1], first)


def test_include_and_exclude_choose() -> None:
    conversion = converted(after(Block(), Block()), places(2, 5, 4)(), exclude=["2.norm"])
    assert [swap.name for swap in conversion.plan.swaps] == ["1.norm", "3"]
    assert type(conversion.model[2].norm) is nn.LayerNorm  # type: ignore[index]


def test_the_judge_would_see_a_gain_that_is_centred_on_the_wrong_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.swap import rmsnorm

    real = rmsnorm.plan_rmsnorm

    def without_folds(*args: Any) -> Any:
        planned = real(*args)
        planned.streams.folds.clear()
        return planned

    monkeypatch.setattr("normswap.api.convert.plan_rmsnorm", without_folds)
    with pytest.raises(normswap.ParityError):
        normswap.convert(trained(after(Block(gain=True))), places(2, 5, 4)().double(), to="rmsnorm")


# -- afterwards ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Tied, Stem], ids=["the output is centred", "the input is centred"])
def test_it_is_saved_and_loaded(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    x = tokens() if make is Tied else places(2, 10, 4)()
    model = trained(make()).float()
    conversion = normswap.convert(model, x, to="rmsnorm")
    directory = normswap.save(conversion, tmp_path / "converted")
    again = normswap.load(directory, make)
    assert isinstance(again, nn.Module)
    assert torch.equal(again.eval()(x), conversion.model(x))
    (entry,) = json.loads((directory / "recipe.json").read_text())["centred"]
    assert entry == {"name": "wte" if make is Tied else "first", "place": None if make is Tied else 0, "axis": -1}


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    directory = normswap.save(normswap.convert(trained(Tied()).float(), tokens(), to="rmsnorm"), tmp_path / "converted")
    with pytest.raises(LoadError, match=r"the given architecture has no wte, of which .* centres what it takes or returns"):
        normswap.load(directory, lambda: nn.ModuleDict({"blocks": nn.Sequential(Block(), Block()), "norm": nn.LayerNorm(C)}))


def test_the_command_converts_a_pickled_model_and_exports_it(tmp_path: Path) -> None:
    from normswap.cli.convert import ConvertOptions, convert_to_directory

    model = nn.Sequential(nn.Embedding(11, C), nn.LayerNorm(C), nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 11, bias=False))
    model[4].weight = model[0].weight
    both = nn.Sequential(model[0], nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 4))
    torch.save(trained(both).float(), tmp_path / "net.pt")
    report, directory = convert_to_directory(str(tmp_path / "net.pt"), tmp_path / "out", ConvertOptions(to="rmsnorm", inputs=["2x5:int64"]))
    assert report.status == "converted"
    assert report.onnx is not None
    loaded = normswap.load(directory)
    assert isinstance(loaded, nn.Module)
    assert isinstance(loaded[2], RMSNorm)  # type: ignore[index]
    assert normswap.verify(tmp_path / "net.pt", directory, tokens())


def test_hooks_that_centre_are_read_from_a_pickle_without_running_it(tmp_path: Path) -> None:
    from normswap.files.load import load

    linear = nn.Linear(3, 4)
    linear.register_forward_hook(CentreOutput(-1))
    linear.register_forward_pre_hook(CentreInput(-1, 0), with_kwargs=True)
    torch.save(linear, tmp_path / "linear.pt")
    assert centrings(load(str(tmp_path / "linear.pt")).model) == [(0, -1), (None, -1)]  # type: ignore[arg-type]


def test_an_argument_by_name_is_centred() -> None:
    class Named(nn.Module):
        def forward(self, *, hidden: Tensor) -> Tensor:
            return hidden

    module = Named()
    module.register_forward_pre_hook(CentreInput(-1, "hidden"), with_kwargs=True)
    assert float(module(hidden=torch.tensor([1.0, 5.0])).sum()) == 0


def test_inspect_says_it_of_every_layer_norm() -> None:
    model = trained(
        nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C), nn.Tanh(), nn.LayerNorm(C))
    )
    plan, facts = normswap.inspect(model, places(2, 4)().double())
    assert {known.name: known.to_rmsnorm for known in facts} == {"1": None, "3": True, "6": False}
    lines = Report("net.pt", plan, facts=facts).summary().splitlines()
    assert "  with --to rmsnorm: 1 of 2 LayerNorms would be an RMSNorm, exactly" in lines
    assert any(line.startswith("  no RMSNorm: 6: it would take a centring of its own to save that of one LayerNorm") for line in lines)


# -- random networks -------------------------------------------------------------------------------------------------------------------

QUICK, ALL = 24, 300


def convert_random(seed: int) -> tuple[int, int]:
    """(LayerNorms that became RMSNorm, all) of one random network, whose function has to stay."""
    model, x = streams.net(seed)
    model, x = model.double(), x.double()
    conversion = normswap.convert(model, x, to="rmsnorm")
    with torch.no_grad():
        for more in (x, x[:1] * 3, torch.randn(3, 8, 4, dtype=torch.float64) * 2):
            for a, b in zip(model(more), conversion.model(more), strict=True):
                assert float((a - b).abs().max()) <= LIMIT * max(float(a.abs().max()), 1.0), seed
    return len(conversion.plan.swaps), len(conversion.plan.swaps) + len(conversion.plan.skips)


@pytest.mark.parametrize("seeds", [range(first, first + 6) for first in range(0, QUICK, 6)], ids=str)
def test_random_networks_are_never_wrong(seeds: range) -> None:
    counts = [convert_random(seed) for seed in seeds]
    assert any(exact for exact, _ in counts)
    assert any(exact < total for exact, total in counts)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(first, first + 12) for first in range(QUICK, ALL, 12)], ids=str)
def test_300_random_networks_are_never_wrong(seeds: range) -> None:
    for seed in seeds:
        convert_random(seed)


def test_random_networks_differ() -> None:
    made = [streams.net(seed)[0] for seed in range(ALL)]
    assert {net.start for net in made} == {"embedding", "linear", "conv", "input", "norm"}
    assert {net.tap for net in made} == {None, "output", "head", "softmax", "sum"}
    assert {block.kind for net in made for block in net.blocks if isinstance(block, streams.Between)} == set(streams.BETWEEN)
