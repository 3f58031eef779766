"""The private names of torch that normswap needs, and why: the first place to look when a new torch is out.

`tests/models/test_torch_private.py` has a test for each, which says what a torch that lacks it broke. The packages `layer` and `training`
still have some of their own, and so has `wellformed.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

# The reader of zip archives that torch.load itself uses, so that both see the same records of a file.
from torch._C import PyTorchFileReader

# An aten operator, as an exported program calls it: to know one, to bind its arguments, to tell how much it returns.
from torch._ops import OpOverload

# The code of a torch.fx.Graph, compiled to a function: what a GraphModule does with it, for a class that is no GraphModule.
from torch.fx.graph_module import _format_import_block as format_import_block
from torch.fx.graph_module import _forward_from_src as forward_from_source

# A reference that keeps the address of a storage from being used again, and not its data.
from torch.multiprocessing.reductions import StorageWeakRef

# The classes that all BatchNorm and all InstanceNorm layers of torch are derived from, whatever their rank.
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as AnyInstanceNorm
from torch.package.importer import sys_importer

# The tensors in whatever a model takes or returns: torch has no public walk through nested containers.
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
    "base_of_view",
    "format_import_block",
    "forward_from_source",
    "is_functorch_wrapped",
    "keystr",
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
    "written",
]

# The attributes in which nn.Module keeps hooks: they are copied to what takes a module's place. Their handles stay bound to the source.
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

# What nn.Module itself keeps on every object, `_parameters`, `_buffers` and `_modules` among it: all else is the layer's own.
MODULE_STATE = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}

# The method of a convolution that its `forward` calls: a class that overrides it computes something else.
CONV_FORWARD = "_conv_forward"

# The module that torch.compile imports: where it is not loaded nothing is compiled, and importing it takes seconds.
DYNAMO = "torch._dynamo"


# The classes of storages that the pickle of a model may name; and what became, in Python 3, of the names in a pickle of Python 2.
STORAGE_CLASSES = frozenset(torch._storage_classes)
PYTHON2_NAMES, PYTHON2_MODULES = torch._utils.NAME_MAPPING, torch._utils.IMPORT_MAPPING


def parameters_of(operator: OpOverload) -> list[Any]:
    """What an aten operator takes, in order, each with its name and default. Built-ins have no signature for `inspect`."""
    return list(operator._schema.arguments)


def name_in_aten(operator: OpOverload) -> str:
    """ "add" of aten.add.Tensor: without its namespace and overload."""
    return str(operator._schema.name.rpartition("::")[2])


def returned_by(operator: OpOverload) -> int:
    """How many values an aten operator returns."""
    return len(operator._schema.returns)


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a torch.vmap, grad or the like, and ends with that: its values cannot be kept or looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def base_of_view(tensor: Tensor) -> Tensor | None:
    """The tensor of which this one is a view: a copy of the view has to be a view of the copy."""
    return tensor._base


def written(tensor: Tensor) -> int:
    """How often the tensor, or a view of it, was written in place."""
    return tensor._version


def storage_key(tensor: Tensor) -> int:
    """The same number for all tensors over one storage: to know an output again, whatever view of it is written to."""
    return cast(int, tensor.untyped_storage()._cdata)
