"""Recognition by what a layer computes, not by what it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm.layers as timm_layers
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from normswap.rules.probing import Normalizes, probe


class Unusual(nn.Module):
    """RMS normalization under names that nobody uses, and an eps that is no attribute of the right name."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.tiny = nn.Parameter(torch.randn(11)), 3e-4

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.tiny) * (2 - self.gain)


FOUND: list[tuple[Callable[[], nn.Module], Normalizes]] = [
    (lambda: nn.LayerNorm(7), Normalizes("layer_norm", -1, 7, 1e-5)),
    (lambda: nn.LayerNorm(7, eps=1e-3, elementwise_affine=False), Normalizes("layer_norm", -1, 7, 1e-3)),
    (lambda: nn.GroupNorm(3, 6), Normalizes("group_norm", 1, 6, 1e-5, 3)),
    (lambda: timm_layers.LayerNorm2d(7), Normalizes("layer_norm", 1, 7, 1e-6)),
    (lambda: timm_layers.LayerNormAct2d(7), Normalizes("layer_norm", 1, 7, 1e-5)),
    (lambda: timm_layers.RmsNorm(7), Normalizes("rms_norm", -1, 7, 1e-6)),
    (lambda: timm_layers.GroupNorm1(6), Normalizes("group_norm", 1, 6, 1e-5, 1)),
    (lambda: timm_layers.GroupNormAct(6, num_groups=2), Normalizes("group_norm", 1, 6, 1e-5, 2)),
    (lambda: LayerNorm2d(7, eps=1e-6), Normalizes("layer_norm", 1, 7, 1e-6)),
    (lambda: LlamaRMSNorm(7), Normalizes("rms_norm", -1, 7, 1e-6)),
    (lambda: GemmaRMSNorm(7), Normalizes("rms_norm", -1, 7, 1e-6)),
    (lambda: T5LayerNorm(7), Normalizes("rms_norm", -1, 7, 1e-6)),
    (Unusual, Normalizes("rms_norm", -1, 11, 3e-4)),
]


class With(nn.LayerNorm):
    """LayerNorm that does one more thing."""

    def __init__(self, more: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(7)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x), x)


NOT_FOUND: list[Callable[[], nn.Module]] = [
    lambda: With(lambda y, x: F.gelu(y)),
    lambda: With(lambda y, x: y + 1e-3 * x),
    lambda: With(lambda y, x: y * x.mean()),
    lambda: With(lambda y, x: y.clamp(-1, 1)),
    lambda: With(lambda y, x: y.flip(-1)),
    lambda: With(lambda y, x: y * 0),
    lambda: With(lambda y, x: y[:, :1]),
    lambda: GlobalResponseNorm(7),
    lambda: timm_layers.FilterResponseNormAct2d(7),
    lambda: nn.BatchNorm2d(7),
    lambda: nn.LocalResponseNorm(3),
    lambda: nn.Linear(7, 7),
    lambda: nn.ReLU(),
    lambda: nn.Identity(),
]


@pytest.mark.parametrize(("make", "found"), FOUND, ids=[str(i) for i in range(len(FOUND))])
def test_found(make: Callable[[], nn.Module], found: Normalizes) -> None:
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    before = [p.clone() for p in module.parameters()]
    assert probe(module) == found
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("make", NOT_FOUND, ids=[str(i) for i in range(len(NOT_FOUND))])
def test_not_found(make: Callable[[], nn.Module]) -> None:
    assert probe(make()) is None
