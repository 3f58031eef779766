"""Which conv or linear layer, if any, computes the input of a norm: its producer.

A producer is a module of one of torch's classes, or of a class derived from one, that computes W x + b by one call of the function of that
class, where W and b are its own parameters. Its code may do to its input what it wants (pad it, say): what counts is the call, not the
class. `why_unfit` says what speaks against a module before it has run, `why_other` what speaks against a call of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.detect.super_calls import own_names
from normswap.layer.hooks import others
from normswap.layer.producer import PRODUCERS, TRANSPOSED, groups_of
from normswap.models.torch_private import CONV_FORWARD, HOOKS

# The function that computes W x + b in the class, by which the back-ends know such calls.
FUNCTION_OF: Mapping[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
}
FUNCTIONS = frozenset(FUNCTION_OF.values())
# What code may read of a tensor without reading its values.
DESCRIPTIONS = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "size", "dim", "numel", "stride"})


class Source(NamedTuple):
    """Where the input of a norm comes from: the name of its producer, or why it has none, as a clause about the norm."""

    producer: str | None = None
    why_not: str | None = None


ELSEWHERE = Source(None, "its input does not come straight from a conv or linear layer")

OTHER_INPUT = Source(None, "it normalizes another tensor than it is called with, by its hooks or its code")


def source_of(maker: str, why_not: str | None) -> Source:
    """The Source of a norm that reads the output of `maker`. why_not: a clause about `maker`, "which ..." or "whose ..."."""
    return Source(maker) if why_not is None else Source(None, f"its input is the output of {maker or 'the model itself'}, {why_not}")


class Product(NamedTuple):
    """What a call of a conv or linear function multiplies with and adds, and in how many groups: tensors, or nodes of a graph."""

    function: str
    weight: Any
    bias: Any
    groups: Any


def product_of(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """The arguments of a call of a conv or linear function; None for another function. function: its name, of an operator with overload."""
    name = function.partition(".")[0]
    if name not in FUNCTIONS:
        return None
    # All of these functions have the weight, the bias and the groups at the same places; `linear` has no groups.
    weight, bias, groups = (
        args[place] if place < len(args) else kwargs.get(key) for place, key in ((1, "weight"), (2, "bias"), (6, "groups"))
    )
    return Product(name, weight, bias, 1 if groups is None else groups)


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class among `PRODUCERS` that the class of `module` is or is derived from; None if there is none."""
    return next((base for base in PRODUCERS if isinstance(module, base)), None)


def is_plain(module: nn.Module) -> bool:
    """Whether a layer runs the code of torch's conv or linear class, as a subclass does that only has another __init__."""
    base = base_of(module)
    same = base is not None and all(getattr(type(module), f, None) is getattr(base, f, None) for f in ("forward", CONV_FORWARD))
    return same and "forward" not in module.__dict__


def why_unfit(module: nn.Module) -> str | None:
    """Why a conv or linear layer is no producer, whatever it will be seen to call, as a clause about it; None if nothing is against it."""
    if others(module):
        return "which has forward hooks, and they may change its output"
    weight = module._parameters.get("weight")
    if hasattr(module, "parametrizations") or weight is None:
        return "whose weight is computed from other parameters"
    if "forward" in module.__dict__:
        return "whose forward is set on the object"
    if is_plain(module):
        return None
    if is_lazy(weight) or not _as_built(module, weight):
        return "whose weight and attributes are not those that its class gives it"
    return _why_not_in_training(type(module))


def _as_built(module: Any, weight: Tensor) -> bool:
    """Whether the attributes of a conv or linear layer are as torch's class sets them, and describe its weight."""
    try:
        if isinstance(module, nn.Linear):
            return weight.shape == (module.out_features, module.in_features)
        first, second = (
            (module.in_channels, module.out_channels) if isinstance(module, TRANSPOSED) else (module.out_channels, module.in_channels)
        )
        expected = (first, second // module.groups, *module.kernel_size)
        rank = weight.dim() - 2
        return weight.shape == expected and all(len(each) == rank for each in (module.kernel_size, module.stride, module.dilation))
    except (AttributeError, TypeError):  # an attribute is missing, or is one number
        return False


def _why_not_in_training(cls: type[nn.Module]) -> str | None:
    """Why a class with code of its own may compute something else in train mode than a pass in eval mode shows; None if it does not."""
    names = own_names(cls, next(base for base in PRODUCERS if issubclass(cls, base)))
    if names is None:
        return "whose forward is no function of Python"
    return "whose code reads `training`, so that it may compute something else in train mode" if "training" in names else None


def why_other(module: nn.Module, product: Product) -> str | None:
    """Why a call in the code of `module` does not compute its W x + b, as a clause about the module; None if it does.

    product: of the call, with the attributes of the module that a graph reads as the tensors that they are.
    """
    base = base_of(module)
    if base is None:
        return f"which is no conv or linear layer, but whose code calls {product.function}"
    if product.weight is not module._parameters.get("weight"):
        return "whose weight is computed in its code"
    if product.bias is not module._parameters.get("bias"):
        return "whose bias is not what its code adds"
    if product.function != FUNCTION_OF[base] or product.groups != groups_of(module):
        return f"whose code calls {product.function} in another way than its class"
    return None


def why_holding(module: nn.Module, norm: nn.Module) -> str | None:
    """Why a layer is no producer of `norm`, or of a norm in the code of it, as a clause about the layer: if it holds it; else None."""
    return "which holds this norm itself" if any(part is norm for part in module.modules()) else None


def why_hooked(name: str, module: nn.Module) -> str | None:
    """Why a norm is not coupled to its producer `name`, as a clause about the norm: the producer has hooks of the user; else None.

    A fold puts up with hooks that run before the producer. Coupling takes what the producer is called with for its input.
    """
    hooked = any(getattr(module, hooks) for hooks in HOOKS if hooks != "_is_full_backward_hook")
    return f"its producer {name} has hooks, which may change what it computes" if hooked else None


def why_several(runs: int, other_reads: int, readers: int) -> str | None:
    """Why the output of a conv or linear is not for one norm alone, as a clause about the layer; None if it is.

    runs: of the layer in one forward pass. other_reads: how often code reads its weight or bias besides. readers: of its output.
    """
    if runs != 1:
        return f"which computes {runs} outputs in one forward pass"
    if other_reads:
        return "whose weight or bias other code reads as well"
    return None if readers == 1 else "whose output other code reads as well"
