"""Every rule: what it fires on, and what it declines or leaves to others, with the sentence that says so. Sizes are pairwise different."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from next_step import says_what_to_do
from surgery import error, swapped
from torch import Tensor, nn
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.xlstm.modeling_xlstm import xLSTMMultiHeadLayerNorm

import normswap
from fixtures.nets import RenamedBatchNorm, ShiftedBatchNorm, randomise
from normswap.detect.handwritten import find
from normswap.detect.sites import Site
from normswap.rules import DEFAULT_RULES

N, C, D, H, W = 2, 5, 3, 7, 4


def timm_act(name: str, **options: Any) -> nn.Module:
    from timm.layers import norm_act

    return cast(nn.Module, getattr(norm_act, name)(C, **options))


def timm_layer(name: str) -> nn.Module:
    from timm.layers import evo_norm, filter_response_norm, grn

    cls = next(getattr(module, name) for module in (evo_norm, filter_response_norm, grn) if hasattr(module, name))
    return cast(nn.Module, cls(C))


def sync_act() -> nn.Module:
    from timm.layers.norm_act import convert_sync_batchnorm

    return cast(nn.Module, convert_sync_batchnorm(timm_act("BatchNormAct2d", act_layer=nn.SiLU)))


def frozen_and_more() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    class FrozenAndMore(FrozenBatchNorm2d):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, super().forward(x)) + 1

    return FrozenAndMore(C)


def frozen(**options: Any) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return cast(nn.Module, FrozenBatchNorm2d(C, **options))


def flag_off(norm: nn.BatchNorm2d) -> nn.Module:
    """Lightning's way of freezing: the flag is off, the buffers are there and are used in eval mode."""
    norm.track_running_stats = False
    return norm


def materialised() -> nn.Module:
    lazy = nn.LazyBatchNorm2d()
    lazy(torch.randn(N, C, H, W))
    return lazy


def half_affine() -> nn.Module:
    norm = nn.BatchNorm2d(C)
    norm.bias = None
    return norm


@torch.no_grad()
def set_to(norm: Any, **tensors: float) -> Any:
    for name, value in tensors.items():
        getattr(norm, name)[1] = value
    return norm


def in_dtype(norm: Any, **dtypes: torch.dtype) -> Any:
    for name, dtype in dtypes.items():
        norm._buffers[name] = getattr(norm, name).to(dtype)
    return norm


class OwnCheck(nn.BatchNorm2d):
    """Takes any rank; `forward` is BatchNorm's."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class FrozenByHand(nn.Module):
    """BatchNorm's formula, and a hook for what else a layer might do."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", *(("weight", "bias") if affine else ())):
            self.register_buffer(name, torch.ones(C))
        if not affine:
            self.weight = self.bias = None

    def normalized(self, x: Tensor) -> Tensor:
        mean, var = cast(Tensor, self.running_mean)[:, None], cast(Tensor, self.running_var)[:, None]
        y = (x - mean) / torch.sqrt(var + 1e-3)
        return y if self.weight is None else y * self.weight[:, None] + cast(Tensor, self.bias)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x)


class TrainsNorm(FrozenByHand):
    """In train mode it normalizes by the batch, so it is not frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 2), keepdim=True)) if self.training else self.normalized(x)


class EvaluatesNorm(FrozenByHand):
    """The other way round: what it computes in train mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x) if self.training else x.sin()


class UpdatesNorm(FrozenByHand):
    def forward(self, x: Tensor) -> Tensor:
        y = self.normalized(x)
        if self.training:
            cast(Tensor, self.running_mean).mul_(0.9)
        return y


class ResidualNorm(FrozenByHand):
    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x) + 1e-3 * x


class VarianceNorm(FrozenByHand):
    """Divides by the variance: with a variance of 1, as here, nothing shows."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = cast(Tensor, self.running_mean)[:, None], cast(Tensor, self.running_var)[:, None]
        return (x - mean) / (var + 1e-3)


class TemperedNorm(FrozenByHand):
    """A factor that is 1 until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x) * self.temperature


# kind, layer, shape of its input
FIRES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": ("batch_norm", lambda: nn.BatchNorm1d(C), (N, C)),
    "1d sequence": ("batch_norm", lambda: nn.BatchNorm1d(C), (N, C, W)),
    "2d": ("batch_norm", lambda: nn.BatchNorm2d(C), (N, C, H, W)),
    "3d": ("batch_norm", lambda: nn.BatchNorm3d(C), (N, C, D, H, W)),
    "sync": ("batch_norm", lambda: nn.SyncBatchNorm(C), (N, C, H, W)),
    "affine=False": ("batch_norm", lambda: nn.BatchNorm2d(C, affine=False), (N, C, H, W)),
    "weight only": ("batch_norm", half_affine, (N, C, H, W)),
    "momentum=None": ("batch_norm", lambda: nn.BatchNorm2d(C, momentum=None), (N, C, H, W)),
    "eps=0": ("batch_norm", lambda: nn.BatchNorm2d(C, eps=0.0), (N, C, H, W)),
    "eps=2": ("batch_norm", lambda: nn.BatchNorm2d(C, eps=2.0), (N, C, H, W)),
    "flag off, buffers there": ("batch_norm", lambda: flag_off(nn.BatchNorm2d(C)), (N, C, H, W)),
    "lazy, materialised": ("batch_norm", materialised, (N, C, H, W)),
    "subclass": ("batch_norm", lambda: RenamedBatchNorm(C), (N, C, H, W)),
    "subclass of another rank": ("batch_norm", lambda: OwnCheck(C), (N, C, W)),
    "tiny variance": ("batch_norm", lambda: set_to(nn.BatchNorm2d(C, eps=0.0), running_var=1e-12), (N, C, H, W)),
    "weight 0": ("batch_norm", lambda: set_to(nn.BatchNorm2d(C), weight=0.0), (N, C, H, W)),
    "torchvision's frozen": ("frozen_batch_norm", frozen, (N, C, H, W)),
    "frozen, eps=0": ("frozen_batch_norm", lambda: frozen(eps=0.0), (N, C, H, W)),
    "transformers' frozen": ("frozen_batch_norm", lambda: DetrFrozenBatchNorm2d(C), (N, C, H, W)),  # eps is in its code
    "frozen, by hand": ("frozen_batch_norm", FrozenByHand, (N, C, W)),
    "frozen, by hand, no weight": ("frozen_batch_norm", lambda: FrozenByHand(affine=False), (N, C, W)),
    "norm-act": ("batch_norm_act", lambda: timm_act("BatchNormAct2d"), (N, C, H, W)),
    "norm-act, sync": ("batch_norm_act", sync_act, (N, C, H, W)),
    "norm-act, frozen": ("batch_norm_act", lambda: timm_act("FrozenBatchNormAct2d"), (N, C, H, W)),
    "norm-act, no affine": ("batch_norm_act", lambda: timm_act("BatchNormAct2d", affine=False), (N, C, H, W)),
    "norm-act, prelu": ("batch_norm_act", lambda: timm_act("BatchNormAct2d", act_layer=nn.PReLU), (N, C, H, W)),
}


@pytest.mark.parametrize("what", FIRES)
def test_fires(what: str) -> None:
    kind, make, shape = FIRES[what]
    norm = make()
    special = what in ("tiny variance", "weight 0")
    if not special:
        randomise(norm, 1)
    model = nn.Sequential(norm).eval()
    x = torch.randn(shape)
    (swap,) = normswap.plan(model, x).swaps
    assert (swap.kind, swap.preserves) == (kind, "exact")
    assert special or hides_nothing(swapped(model, x)[0])
    assert error(model, swapped(model, x), x) <= 1e-6


def hides_nothing(layer: nn.Module) -> bool:
    """Whether an error in the formula of a rule would show: no mean is 0, no std 1. (`randomise` knows the names of BatchNorm alone.)"""
    (norm,) = (module for module in layer.modules() if isinstance(module, normswap.BatchlessNorm))
    return bool(norm.mean.all() and norm.std_parameter.all())  # the log of the std


# -- declined ------------------------------------------------------------------------------------------------------------------


def own_forward(norm: nn.Module) -> nn.Module:
    norm.forward = types.MethodType(lambda self, x: x + 1, norm)  # type: ignore[method-assign]
    return norm


class OwnCall(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return cast(Tensor, super().__call__(x)) + 1


class OwnWeight(nn.BatchNorm2d):
    """Its weight is an expression."""

    def __init__(self) -> None:
        super().__init__(C, affine=False)
        del self.weight
        self.log_weight = nn.Parameter(torch.zeros(C))

    weight = property(lambda self: self.log_weight.exp(), lambda self, value: None)  # type: ignore[assignment]


def with_more() -> nn.Module:
    norm = nn.BatchNorm2d(C)
    norm.register_buffer("temperature", torch.ones(1))
    return norm


def no_stats(**options: Any) -> nn.Module:
    return nn.BatchNorm2d(C, track_running_stats=False, **options)


def fused() -> nn.Module:
    return torch.ao.nn.intrinsic.ConvBn2d(nn.Conv2d(4, C, 1), nn.BatchNorm2d(C))  # type: ignore[no-untyped-call]


def qat() -> nn.Module:
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    return ConvBn2d(4, C, 1, qconfig=get_default_qat_qconfig("fbgemm"))  # type: ignore[no-untyped-call, no-any-return]


def quantised() -> nn.Module:
    return torch.ao.nn.quantized.BatchNorm2d(C)  # type: ignore[no-untyped-call]


class Flavour_RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(W))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.scale)


class CallsItselfNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(W))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Custom_RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(W))


class NoForwardNorm(nn.Module):
    pass


class GatedNorm(nn.Module):
    """RMSNorm of x times a gate, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(W))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate.sigmoid()
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class PairNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(W))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x / x.norm(dim=-1, keepdim=True) * self.weight, None


class GateStillOff(nn.LayerNorm):
    """LayerNorm until its gate is trained."""

    def __init__(self) -> None:
        super().__init__(W)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate * x


# kind, layer, the sentence (from its start)
DECLINES: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "no statistics": (
        "batch_norm",
        no_stats,
        "has no running statistics to start from (track_running_stats=False): it normalizes by each batch's own, in eval mode too, "
        "so an exact swap does not exist; ask for an approximate one with approximate=True",
    ),
    "no statistics, no affine": ("batch_norm", lambda: no_stats(affine=False), "has no running statistics to start from"),
    "lazy": ("batch_norm", nn.LazyBatchNorm2d, "is lazy and has no shape yet; run one forward pass before converting"),
    "no channels": ("batch_norm", lambda: nn.BatchNorm2d(0), "has no channels"),
    "meta": (
        "batch_norm",
        lambda: nn.BatchNorm2d(C, device="meta"),
        "is on the meta device, so its statistics have no values yet; load the weights first",
    ),
    "NaN mean": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C), running_mean=torch.nan),
        "has 1 of 5 values of running_mean that are not finite",
    ),
    "variance in 8 bits": (
        "batch_norm",
        lambda: in_dtype(nn.BatchNorm2d(C), running_var=torch.float8_e4m3fn),
        "has a running_var of float8_e4m3fn, which torch does not compute with; convert it to float32",
    ),
    "complex mean": (
        "frozen_batch_norm",
        lambda: in_dtype(frozen(), running_mean=torch.complex64),
        "has a running_mean of complex64, which torch does not compute with",
    ),
    "infinite variance": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C), running_var=torch.inf),
        "has 1 of 5 values of running_var that are not finite",
    ),
    "variance 0, eps 0": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C, eps=0.0), running_var=0.0),
        "has 1 of 5 channels whose running_var + eps is not positive (eps=0): no std to divide by",
    ),
    "variance -1": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C), running_var=-1.0),
        "has 1 of 5 channels whose running_var + eps is not positive",
    ),
    "variance -eps": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C), running_var=-1e-5),  # which float32 adds up to 0, and float64 to 3e-13
        "has 1 of 5 channels whose running_var + eps is not positive (eps=1e-05): no std to divide by; repair running_var",
    ),
    "variance -eps, in bfloat16": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C, eps=2**-20, dtype=torch.bfloat16), running_var=-(2**-20)),
        "has 1 of 5 channels whose running_var + eps is not positive (eps=9.53674e-07): no std to divide by",
    ),
    "variance -eps, but for a rounding": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C), running_var=-1e-5 + 1e-12),
        "has 1 of 5 channels whose running_var cancels eps up to rounding (eps=1e-05): the std depends on the precision",
    ),
    "variance 0 and an eps that the precision has not": (
        "batch_norm",
        lambda: set_to(nn.BatchNorm2d(C, eps=1e-60), running_var=0.0),
        "has 1 of 5 channels whose running_var + eps is not positive (eps=1e-60): no std to divide by",
    ),
    "subclass": (
        "batch_norm",
        lambda: ShiftedBatchNorm(C),
        "is a ShiftedBatchNorm, which overrides forward, so it may do more than normalize",
    ),
    "call": ("batch_norm", lambda: OwnCall(C), "is a OwnCall, which overrides __call__, so it may do more than normalize"),
    "object's forward": (
        "batch_norm",
        lambda: own_forward(nn.BatchNorm2d(C)),
        "has a forward of its own, set on the object, so it may do more than normalize",
    ),
    "parametrized": (
        "batch_norm",
        lambda: torch.nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", nn.Softplus()),
        "has a parametrized weight; remove it with torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    "weight_norm": (
        "batch_norm",
        lambda: old_weight_norm(nn.BatchNorm2d(C)),
        "has a weight that is computed (by spectral_norm or weight_norm?) and not stored; remove that first",
    ),
    "property": ("batch_norm", OwnWeight, "has a weight that is computed (by spectral_norm or weight_norm?)"),
    "more tensors": ("batch_norm", with_more, "holds temperature besides the tensors of a BatchNorm, so it may do more than normalize"),
    "fused for QAT": (
        "batch_norm",
        fused,
        "sits in a quantised or quantisation-aware ConvBn2d; convert the float model and quantise the result",
    ),
    "QAT": ("batch_norm", qat, "sits in a quantised or quantisation-aware ConvBn2d"),
    "quantised": ("batch_norm", quantised, "is a quantised or quantisation-aware BatchNorm2d"),
    "frozen, NaN": (
        "frozen_batch_norm",
        lambda: set_to(frozen(), running_var=torch.nan),
        "has 1 of 5 values of running_var that are not finite",
    ),
    "frozen, forward": ("frozen_batch_norm", lambda: own_forward(frozen()), "has a forward of its own, set on the object"),
    "norm-act, no statistics": (
        "batch_norm_act",
        lambda: timm_act("BatchNormAct2d", track_running_stats=False),
        "has no running statistics to start from",
    ),
    "norm-act, forward": ("batch_norm_act", lambda: own_forward(timm_act("BatchNormAct2d")), "has a forward of its own, set on the object"),
    "layer norm": (
        "layer_norm",
        lambda: nn.LayerNorm(W),
        "LayerNorm takes its statistics from each sample, so an exact swap does not exist; "
        "ask for an approximate one with approximate=True and calibration=... (--approximate, --data)",
    ),
    "group norm": ("group_norm", lambda: nn.GroupNorm(1, C), "GroupNorm takes its statistics from each sample"),
    "instance norm": ("instance_norm", lambda: nn.InstanceNorm2d(C), "InstanceNorm2d takes its statistics from each sample"),
    "rms norm": ("rms_norm", lambda: nn.RMSNorm(W), "RMSNorm takes its statistics from each sample"),
    "a flavour": ("flavour", Flavour_RMSNorm, "Flavour_RMSNorm takes its statistics from each sample"),
    "a norm of one's own": (
        "unknown",
        Custom_RMSNorm,
        f"{__name__}.Custom_RMSNorm is not a normalization that normswap knows; to swap it, "
        "pass a rule of your own (--rule, docs/writing_rules.md)",
    ),
    "a norm without parameters": ("unknown", NoForwardNorm, f"{__name__}.NoForwardNorm is not a normalization that normswap knows"),
    "a gate that is still off": ("unknown", GateStillOff, f"{__name__}.GateStillOff is not a normalization that normswap knows"),
    "not frozen": ("unknown", TrainsNorm, f"{__name__}.TrainsNorm is not a normalization that normswap knows"),
    "not frozen in eval mode": ("unknown", EvaluatesNorm, f"{__name__}.EvaluatesNorm is not a normalization that normswap knows"),
    "not frozen, updates": ("unknown", UpdatesNorm, f"{__name__}.UpdatesNorm is not a normalization that normswap knows"),
    "frozen, and more": ("unknown", ResidualNorm, f"{__name__}.ResidualNorm is not a normalization that normswap knows"),
    "frozen, another formula": ("unknown", VarianceNorm, f"{__name__}.VarianceNorm is not a normalization that normswap knows"),
    "frozen, a factor": ("unknown", TemperedNorm, f"{__name__}.TemperedNorm is not a normalization that normswap knows"),
    "frozen, its subclass": ("frozen_batch_norm", frozen_and_more, "is a FrozenAndMore, which overrides forward"),
    "without a size": (
        "flavour",
        NanoChatRMSNorm,
        "is a NanoChatRMSNorm without a weight or a size of its own, so only its input tells how many channels it has; "
        "give it a weight of ones, or pass a rule of your own (--rule, docs/writing_rules.md)",
    ),
    "what calls itself one": (
        "affine",
        CallsItselfNorm,
        "is a CallsItselfNorm, which multiplies and adds and takes no statistics, so there is nothing to replace",
    ),
    "a gate": (
        "conditioned_norm",
        GatedNorm,
        "is a GatedNorm, which takes gate besides its input, as BatchlessNorm does not; leave it, or split",
    ),
    "Mamba 2's gate": ("conditioned_norm", lambda: MambaRMSNormGated(12, 4), "is a MambaRMSNormGated, which takes gate besides its input"),
    "two outputs": ("reshaping_norm", PairNorm, "is a PairNorm, which returns a tuple, and not one tensor as BatchlessNorm does"),
    "another shape": (
        "reshaping_norm",
        lambda: xLSTMMultiHeadLayerNorm(4, 6),
        "is a xLSTMMultiHeadLayerNorm, which returns a tensor of another shape than its input's, as BatchlessNorm does not",
    ),
    "ConvNeXt V2's response norm": (
        "response_norm",
        lambda: timm_layer("GlobalResponseNorm"),
        "is a GlobalResponseNorm, which multiplies each channel by its share in the response of all channels over space: a gate on each "
        "sample, and no mean and std",
    ),
    "torch's response norm": (
        "local_response_norm",
        lambda: nn.LocalResponseNorm(3),
        "is a LocalResponseNorm, which divides by a power of the energy of neighbouring channels at the same place: no mean and std of a "
        "channel",
    ),
    "EvoNorm": (
        "evo_norm",
        lambda: timm_layer("EvoNorm2dB0"),
        "is a EvoNorm2dB0, which normalizes and activates in one formula, so that what is left without the statistics is no multiplication "
        "and addition",
    ),
    "filter response norm with its threshold": (
        "filter_response_norm",
        lambda: timm_layer("FilterResponseNormTlu2d"),
        "is a FilterResponseNormTlu2d, which ends in a threshold of its own parameters",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:torch.ao.quantization is deprecated", "ignore:Lazy modules")
@pytest.mark.parametrize("what", DECLINES)
def test_declines(what: str) -> None:
    kind, make, reason = DECLINES[what]
    decided = normswap.plan(Container(make()).eval())  # its forward needs what nobody has: the names are enough
    assert decided.swaps == ()
    (skip,) = decided.skips
    assert skip.kind == kind
    assert skip.reason.startswith(reason)
    assert says_what_to_do(skip.reason), skip.reason


class Container(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, *needs: Tensor) -> Tensor:
        return cast(Tensor, self.part(x)) if needs[0] else x


def old_weight_norm(norm: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(norm)


# -- not a norm ----------------------------------------------------------------------------------------------------------------


class ConvNormAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, C, 1), nn.ReLU()


class PreNorm(nn.Module):
    """A block that holds a norm: the norm is listed, the block is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.Identity(), nn.Linear(W, W)


class Normalize(nn.Module):
    pass


class NormalizedEmbedding(nn.Module):
    pass


NOT_A_NORM: dict[str, Callable[[], nn.Module]] = {
    "container": ConvNormAct,
    "pre-norm block": PreNorm,
    "preprocessing": Normalize,
    "normalized": NormalizedEmbedding,
    "batchless": lambda: normswap.BatchlessNorm(C),
    "spectral norm of a conv": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, C, 1)),
    "weight norm of a conv": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, C, 1)),
    "softmax": lambda: nn.Softmax(dim=1),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("what", NOT_A_NORM)
def test_not_a_norm(what: str) -> None:
    decided = normswap.plan(Container(NOT_A_NORM[what]()).eval())
    assert (decided.swaps, decided.skips) == ((), ())


def test_at_least_as_many_must_not_fire_as_must() -> None:
    assert len(DECLINES) + len(NOT_A_NORM) >= len(FIRES)
    spoken_for = {kind for kind, *_ in (*FIRES.values(), *DECLINES.values())} | {"hand_written"}  # test_handwritten.py
    assert spoken_for == {rule.kind for rule in DEFAULT_RULES}


# -- calls in graphs -----------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, Any] = {
    "running_mean": torch.zeros(C),
    "running_var": torch.ones(C),
    "weight": torch.ones(C),
    "bias": torch.zeros(C),
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}
NODE = "computed"  # stands for a node of the graph


def call(change: dict[str, Any]) -> Site:
    """A graph that calls F.batch_norm with ARGUMENTS and this change, as the site that `handwritten.find` makes of it."""
    graph, root = torch.fx.Graph(), nn.Module()
    nodes = {name: graph.placeholder(name) for name in ("input", NODE)}
    arguments = {}
    for name, value in {**ARGUMENTS, **change}.items():
        if isinstance(value, torch.Tensor):
            root.register_buffer(name, value)
        arguments[name] = graph.get_attr(name) if isinstance(value, torch.Tensor) else nodes[NODE] if value is NODE else value
    graph.output(graph.call_function(torch.nn.functional.batch_norm, (nodes["input"],), arguments))
    (found,) = find(graph, root)
    return Site("batch_norm", (), found.layer, 1, function=found.function, obstacle=found.obstacle)


CALLS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"eps": 0}, None),
    ({"weight": None, "bias": None}, None),
    ({"weight": None}, None),
    ({"training": 0}, None),
    ({"training": True}, "normalizes by each batch's own statistics (training=True was traced); trace the model in eval mode"),
    (
        {"training": NODE},
        "takes a training flag that the graph computes (computed), so it is not a constant; leave it, or make that a parameter or a number",
    ),
    ({"training": True, "running_mean": None, "running_var": None}, "has no running statistics to start from (track_running_stats=False)"),
    (
        {"running_mean": NODE},
        "takes a running_mean that the graph computes (computed), so it is not a constant; leave it, or make that a parameter or a number",
    ),
    (
        {"weight": NODE},
        "takes a weight that the graph computes (computed), so it is not a constant; leave it, or make that a parameter or a number",
    ),
    (
        {"eps": NODE},
        "takes an eps that the graph computes (computed), so it is not a constant; leave it, or make that a parameter or a number",
    ),
    ({"running_var": torch.zeros(C), "eps": 0.0}, "has 5 of 5 channels whose running_var + eps is not positive"),
    ({"running_mean": torch.full((C,), torch.nan)}, "has 5 of 5 values of running_mean that are not finite"),
]
CALLS_DECLINED = [reason for _, reason in CALLS if reason]


@pytest.mark.parametrize(("change", "reason"), CALLS)
def test_calls_in_a_graph(change: dict[str, Any], reason: str | None) -> None:
    site = call(change)
    rule = next(rule for rule in DEFAULT_RULES if rule.recognises(site))
    assert rule.kind == "batch_norm"
    found = rule.check(site) or (rule.inexact(site) if rule.inexact is not None else None)
    assert found is None if reason is None else found is not None and found.startswith(reason)
    # What is approximate alone gets the rest from `match`, which knows what was given.
    assert found is None or says_what_to_do(found) or (rule.inexact is not None and rule.check(site) is None)
    if reason is None:
        assert rule.build is not None
        torch.testing.assert_close(rule.build(site, "log")(torch.ones(N, C)), torch.full((N, C), (1 + 1e-5) ** -0.5), rtol=1e-4, atol=0)


# reasons that need more than one layer to come about: tested in test_trace.py, test_match.py, test_apply.py and test_users_models.py
OTHER_REASONS = [
    "is a call of torch.batch_norm in the code of Net, which cannot be rewritten because its forward sets last; make it a layer",
    "is code that looks like a normalization (it scales by the root of a mean or variance) and is not one that normswap knows; leave it, "
    "or make it a layer of its own and pass a rule of your own (--rule, docs/writing_rules.md)",
    "is code that looks like a normalization (it scales by the root of a mean or variance), whose number of channels only its input tells; "
    "give example inputs of fixed sizes that reach it",
    "is a call of torch.instance_norm without weight and bias, so only its input says how many channels there are; give example inputs",
    "is an instance norm that was decomposed for one batch size; convert the program before run_decompositions()",
    "normalizes a view of all samples as the channels of one, so that its channels depend on the batch size; write it as F.group_norm or "
    "F.instance_norm",
    "shares a parameter: left.weight and right.weight are one tensor, so calibration would change all; leave them, or untie them",
    "returns batch statistics that the graph reads; leave it, or change the code that reads them",
    "has an input of shape (3, s0), which leaves the number of channels open; export it with a fixed number",
    "is never called, so no data can reach it; leave it, or give calibration data that do",
    "has tensors that batch_norm reads directly instead of calling the layer; call the layer there, or leave it",
    "was excluded by name or kind; take it out of exclude to swap it",
    "is not among those that were asked for; add it to include to swap it",
    "is TorchScript (BatchNorm2d), which cannot be replaced; convert the model before it is scripted",
    "no rule recognises BatchNorm2d; add *normswap.DEFAULT_RULES to your rules",
]


def test_every_reason_is_documented(repository: Path) -> None:
    """docs/rules.md quotes each reason up to where it speaks of one layer only."""
    page = (repository / "docs" / "rules.md").read_text()
    quotes = re.findall(r"^\| `([^`]+)` \|", page.partition("| reason |")[2].partition("\n\n")[0], re.MULTILINE)
    quoted = [re.compile(re.escape(quote).replace(re.escape("..."), ".*") + ".*", re.DOTALL) for quote in quotes]
    every = [reason for _, _, reason in DECLINES.values()] + list(CALLS_DECLINED)
    undocumented = [reason for reason in every if not any(quote.match(reason) for quote in quoted)]
    assert undocumented == []
    assert [reason for reason in OTHER_REASONS if not says_what_to_do(reason)] == []
    assert [quote.pattern for quote in quoted if not any(quote.match(reason) for reason in (*every, *OTHER_REASONS))] == []


def test_a_container_of_quantised_layers_is_not_a_norm() -> None:
    class ConvNormAct(nn.Sequential):
        pass

    quantised = type("Conv2d", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.conv"})
    assert not normswap.plan(nn.Sequential(ConvNormAct(quantised()), nn.Linear(3, 5))).skips
    assert [s.name for s in normswap.plan(nn.Sequential(ConvNormAct(nn.Identity()), nn.Linear(3, 5))).skips] == ["0"]


@pytest.mark.parametrize(("cls", "rest"), [(nn.InstanceNorm1d, (C,)), (nn.InstanceNorm2d, (C, 3)), (nn.InstanceNorm3d, (C, 3, 2))])
def test_an_instance_norm_of_one_sample_is_not_taken_for_a_batch(cls: type[nn.Module], rest: tuple[int, ...]) -> None:
    """InstanceNorm takes (C, *space), too, and here axis 1 has as many numbers as there are channels."""
    norm = cls(C, track_running_stats=True)
    norm.running_mean = torch.arange(float(C))
    model = nn.Sequential(norm).eval()
    x = torch.randn(C, *rest)
    conversion = normswap.convert(model, x[None])
    torch.testing.assert_close(conversion.model(x[None])[0], model(x))
    with pytest.raises(ValueError, match=rf"^{cls.__name__} takes an input of shape \(5, 5.*for one sample.*give it x\[None\]"):
        conversion.model(x)
