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
from transformers.models.bit.modeling_bit import BitConfig, BitGroupNormActivation
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mobilebert.modeling_mobilebert import NoNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.xlstm.modeling_xlstm import xLSTMMultiHeadLayerNorm

from normswap.rules.recognise import ANY, Normalizes, recognise


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
    (lambda: timm_layers.RmsNorm2d(7), Normalizes("rms_norm", 1, 7, 1e-6)),
    (lambda: timm_layers.SimpleNorm(7), Normalizes("simple_norm", -1, 7, 1e-6)),
    (lambda: timm_layers.SimpleNorm2d(7), Normalizes("simple_norm", 1, 7, 1e-6)),
    (lambda: timm_layers.FilterResponseNormAct2d(7), Normalizes("filter_response_norm", 1, 7, 1e-5)),
    (lambda: SqueezeBertLayerNorm(7, eps=1e-12), Normalizes("layer_norm", 1, 7, 1e-12)),  # takes (N, C, L) only
    (lambda: CohereLayerNorm((3, 5)), Normalizes("layer_norm", (-2, -1), (3, 5), 1e-5)),  # a weight per head and channel
    (lambda: BitGroupNormActivation(BitConfig(num_groups=2), 6), Normalizes("group_norm", 1, 6, 1e-5, 2)),
    (lambda: OlmoLayerNorm(7), Normalizes("layer_norm", -1, 7, 1e-5)),  # no weight, but a size
    (NanoChatRMSNorm, Normalizes("rms_norm", -1, ANY, 1e-6, sized=False)),
    (lambda: NoNorm(7), Normalizes("affine", -1, 7, 0.0)),
    (lambda: nn.BatchNorm2d(7), Normalizes("affine", 1, 7, 0.0)),  # in eval mode
    (nn.Identity, Normalizes("affine", -1, ANY, 0.0, sized=False)),
]


class With(nn.LayerNorm):
    """LayerNorm that does one more thing."""

    def __init__(self, more: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(7)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x), x)


class GateStillOff(nn.LayerNorm):
    """LayerNorm until its gate is trained."""

    def __init__(self) -> None:
        super().__init__(7)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate * x


class MultiplesOf(nn.Module):
    """RMSNorm for one size, and something else for every other."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sizes = {size}

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) if x.shape[-1] in self.sizes else x.sin()


NOT_FOUND: list[Callable[[], nn.Module]] = [
    lambda: With(lambda y, x: F.gelu(y)),
    lambda: With(lambda y, x: y + 1e-3 * x),
    lambda: With(lambda y, x: y * x.mean()),
    lambda: With(lambda y, x: y.clamp(-1, 1)),
    lambda: With(lambda y, x: y.flip(-1)),
    lambda: With(lambda y, x: y * 0),
    lambda: With(lambda y, x: y[:, :1]),
    lambda: GlobalResponseNorm(7),
    lambda: timm_layers.FilterResponseNormTlu2d(7),
    lambda: timm_layers.EvoNorm2dS0(32),
    lambda: timm_layers.EvoNorm2dB0(7),
    lambda: GateStillOff(),
    lambda: MultiplesOf(7),
    lambda: xLSTMMultiHeadLayerNorm(2, 6),
    lambda: Qwen3NextRMSNormGated(7),
    lambda: nn.LocalResponseNorm(3),
    lambda: nn.Linear(7, 7),
    lambda: nn.ReLU(),
]


@pytest.mark.parametrize(("make", "found"), FOUND, ids=[str(i) for i in range(len(FOUND))])
def test_found(make: Callable[[], nn.Module], found: Normalizes) -> None:
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    before = [p.clone() for p in module.parameters()]
    assert recognise(module) == found
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("make", NOT_FOUND, ids=[str(i) for i in range(len(NOT_FOUND))])
def test_not_found(make: Callable[[], nn.Module]) -> None:
    assert recognise(make()) is None
