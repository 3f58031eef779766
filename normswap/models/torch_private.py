"""The private names of torch that normswap needs, and why: the first place to look when a new torch is out.

`tests/models/test_torch_private.py` has a test for each, which says what a torch that lacks it broke. The packages `layer` and `training`
still have some of their own, and so has `wellformed.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

# The reader of zip archives that torch.load itself uses, so that both see the same records of a file.
from torch._C import PyTorchFileReader

# The class of an aten operator in a graph: to recognise it, to bind its arguments, to count its outputs.
from torch._ops import OpOverload

# Compiles the code of a torch.fx.Graph to a function, as GraphModule does, for a class that is not a GraphModule.
from torch.fx.graph_module import _format_import_block as format_import_block
from torch.fx.graph_module import _forward_from_src as forward_from_source

# A weak reference that keeps the address of a storage from being reused, without keeping its data.
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

# The classes that all BatchNorm and all InstanceNorm layers of torch are derived from, whatever their rank.
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as AnyInstanceNorm
from torch.package.importer import sys_importer

# Sees every operator that torch dispatches.
from torch.utils._python_dispatch import TorchDispatchMode

# Walks through nested containers, to find the tensors in the inputs and outputs of a model: torch has no public function for it.
from torch.utils._pytree import (
    MappingKey,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "CONV_FORWARD",
    "DYNAMO",
    "HOOKS",
    "MODULE_STATE",
    "PYTHON2_MODULES",
    "PYTHON2_NAMES",
    "STORAGE_CLASSES",
    "AnyBatchNorm",
    "AnyInstanceNorm",
    "MappingKey",
    "OpOverload",
    "PyTorchFileReader",
    "StorageWeakRef",
    "TorchDispatchMode",
    "base_of_view",
    "format_import_block",
    "forward_from_source",
    "in_bfloat16",
    "is_functorch_wrapped",
    "keystr",
    "multiplies_bfloat16",
    "name_in_aten",
    "parameters_of",
    "returned_by",
    "storage_key",
    "sys_importer",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "writes_into",
    "written",
]

# The attributes in which nn.Module keeps hooks: they are copied to a replacement of the module. Hook handles still refer to the source.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

# The attributes that nn.Module sets on every object, like `_parameters`, `_buffers` and `_modules`: any other is the layer's own.
MODULE_STATE = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}

# The method that a convolution's `forward` calls: a class that overrides it computes something else.
CONV_FORWARD = "_conv_forward"

# The module that torch.compile imports: if it is not loaded, nothing is compiled; importing it takes seconds.
DYNAMO = "torch._dynamo"


# The storage classes that the pickle of a model may name; and the Python 3 names for those in a pickle of Python 2.
STORAGE_CLASSES = frozenset(torch._storage_classes)
PYTHON2_NAMES, PYTHON2_MODULES = torch._utils.NAME_MAPPING, torch._utils.IMPORT_MAPPING


def parameters_of(operator: OpOverload) -> list[Any]:
    """The parameters of an aten operator, in order, each with its name and default. `inspect` finds no signature of built-ins."""
    return list(operator._schema.arguments)


def name_in_aten(operator: OpOverload) -> str:
    """ "add" of aten.add.Tensor: without its namespace and overload."""
    return str(operator._schema.name.rpartition("::")[2])


def returned_by(operator: OpOverload) -> int:
    """How many values an aten operator returns."""
    return len(operator._schema.returns)


def writes_into(operator: OpOverload, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    """The arguments of a call that the operator writes into."""
    written = [(number, a.name) for number, a in enumerate(parameters_of(operator)) if a.alias_info is not None and a.alias_info.is_write]
    return [args[number] if number < len(args) else kwargs.get(name) for number, name in written]


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor exists only inside a torch.vmap, grad or the like, so that its values cannot be read or kept."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def base_of_view(tensor: Tensor) -> Tensor | None:
    """The tensor of which this one is a view, or None."""
    return tensor._base


def written(tensor: Tensor) -> int:
    """The version counter: how often the tensor, or a view of it, was written in place."""
    return tensor._version


def storage_key(tensor: Tensor) -> int:
    """A number that all tensors over one storage have in common, so that views of an output can be recognised."""
    return cast(int, tensor.untyped_storage()._cdata)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16, twice to many times as fast as float32. All with AMX have them, too."""
    return torch.cpu._is_avx512_bf16_supported()


@contextlib.contextmanager
def in_bfloat16() -> Iterator[None]:
    """Autocast of float32 on a CPU to bfloat16, with attention as written out: torch's fused form takes four times as long backward."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield
