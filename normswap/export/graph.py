"""The graph that torch.onnx.export makes of a model, in which every use of every tensor is explicit, whatever the Python looks like."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from normswap.errors import ExportError, first_words
from normswap.export.marks import mark_operator, onnx_mark
from normswap.export.names import NO_ONNX, unused
from normswap.layer.export_operator import inject_operator
from normswap.models.quiet import quiet
from normswap.models.torch_private import MappingKey, tree_flatten, tree_flatten_with_path, tree_map, tree_map_only, tree_unflatten
from normswap.models.watching import held

if TYPE_CHECKING:
    import onnx_ir as ir

Dynamic = Literal["batch", "spatial", "none"]


@dataclass(frozen=True)
class Graph:
    """What torch.onnx.export made of a model.

    input_names, output_names  the names that the inputs and outputs are to get
    reads  the names of the model's tensors that the graph reads
    notes  which axes were to be free and are not, and why
    """

    model: ir.Model
    input_names: list[str]
    output_names: list[str]
    reads: frozenset[str]
    notes: tuple[str, ...]


def graph_of(model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int, dynamic: Dynamic) -> Graph:
    """The graph of a model in eval mode, from its example inputs. Raises ExportError if torch cannot make one."""
    translations = {
        mark_operator(): onnx_mark(),
        inject_operator(): _onnx_identity(),
        torch.ops.aten.rsub.Scalar: _onnx_rsub(),
        torch.ops.aten.scalar_tensor.default: _onnx_number(),
    }
    choices = [_Choice(None, args, kwargs)]
    if dynamic != "none" and isinstance(model, nn.Module):
        choices = _dynamic_shapes(model, args, kwargs, spatial=dynamic == "spatial")
    failures: list[Exception] = []
    for choice in choices:
        try:
            with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]), _with_outputs_of_onnx(model):
                program: Any = torch.onnx.export(
                    model,
                    choice.args if choice.kwargs else (*choice.args, {}),  # torch takes a dict at the end for the keyword arguments
                    kwargs=choice.kwargs,
                    dynamic_shapes=choice.shapes,
                    opset_version=opset,
                    custom_translation_table=translations,
                    dynamo=True,
                    verbose=False,
                )
            break
        except Exception as error:
            failures.append(error)
    else:
        raise ExportError(f"torch cannot make an ONNX graph of this model: {_reason(failures[-1])}", hint=NO_ONNX) from failures[-1]
    notes = []
    if choices[0].spatial and not choice.spatial:
        notes.append(f"the spatial axes are fixed, as torch refuses free ones: {_reason(failures[0])}")
    if len(choices) > 1 and choice.shapes is None:
        notes.append(f"the batch size is fixed, as torch refuses a free one: {_reason(failures[sum(c.spatial for c in choices)])}")
    exported = program.exported_program
    specs = exported.graph_signature.input_specs
    inputs = [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)]
    return Graph(program.model, inputs, _output_names(exported), _reads(exported), tuple(notes))


@contextlib.contextmanager
def _with_outputs_of_onnx(model: nn.Module | ExportedProgram) -> Iterator[None]:
    """Lets a model, within the context, return what ONNX can hold. (The outputs of a program are already what torch.export takes.)"""
    if isinstance(model, ExportedProgram):
        yield
        return
    handle = model.register_forward_hook(lambda module, args, output: _outputs_of_onnx(output))
    try:
        yield
    finally:
        handle.remove()


def _outputs_of_onnx(output: Any) -> Any:
    """The output with numbers as tensors, objects of other classes than torch's containers as dicts, and None for what is neither."""

    def one(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, Tensor):
            return leaf
        for kinds, dtype in _NUMBERS:
            if isinstance(leaf, kinds):
                return torch.scalar_tensor(cast(float, leaf), dtype=dtype)  # torch takes a SymInt there, too
        return {key: _outputs_of_onnx(value) for key, value in held(leaf).items()} or None

    return tree_map(one, output)


_NUMBERS = (
    ((bool, torch.SymBool), torch.bool),
    ((int, torch.SymInt), torch.int64),
    ((float, torch.SymFloat), torch.float64),
)  # as `parity.run_torch.named_tensors` has them


def _reads(program: ExportedProgram) -> frozenset[str]:
    users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
    specs = [s for s in program.graph_signature.input_specs if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)]
    return frozenset(str(s.target) for s in specs if users.get(s.arg.name))


@dataclass(frozen=True)
class _Choice:
    """One value to try for torch's `dynamic_shapes`, with the inputs to try it with; spatial: whether it frees more than the batch size."""

    shapes: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spatial: bool = False


AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}  # by how many there are


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, spatial: bool = False) -> list[_Choice]:
    """The choices of free axes to try, the one that frees the most first."""
    leaves, structure = tree_flatten(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))
    sizes = [leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() > 0 else None for leaf in leaves]
    batch = next((size for size in sizes if size is not None), None)
    fixed = _Choice(None, args, kwargs)
    if batch is None:
        return [fixed]
    same = [size == batch for size in sizes]
    batches = [same]
    if batch == 1 and sum(same) > 1:  # an axis of size 1 need not be the batch: all samples may share a mask, say
        batches.append([i == same.index(True) for i in range(len(same))])

    def choice(shapes: Any, free: Sequence[bool], *, spatial: bool = False) -> _Choice:
        # Of an axis of size 1 torch may take for granted that it broadcasts, so the graph is made of two samples.
        twice = {id(leaf): torch.cat([leaf, leaf]) for leaf, is_free in zip(leaves, free, strict=True) if batch == 1 and is_free}
        more_args, more_kwargs = tree_map_only(Tensor, lambda t: twice.get(id(t), t), (args, kwargs))
        return _Choice(shapes, more_args, more_kwargs, spatial)

    choices = [choice(tree_unflatten([{0: "batch"} if is_free else None for is_free in free], structure), free) for free in batches]
    wider: list[_Choice] = []
    for sequences in (False, True) if spatial else ():
        axes = _spatial_axes(leaves, sequences=sequences)
        both = [({0: "batch"} if is_free else {}) | more for is_free, more in zip(same, axes, strict=True)]
        shapes = tree_unflatten([found or None for found in both], structure)
        if any(axes) and shapes not in [known.shapes for known in wider]:
            wider.append(choice(shapes, same, spatial=True))
    return [*wider, *choices, fixed]


def _spatial_axes(leaves: Sequence[Any], *, sequences: bool) -> list[dict[int, str]]:
    """For each argument, its axes after the channels, by name. A tensor (N, a, b) is a sequence (N, L, D), or else (N, C, L)."""
    names: dict[tuple[str, int], str] = {}
    found = []
    for leaf in leaves:
        rank = leaf.dim() if isinstance(leaf, Tensor) else 0
        floating = rank and leaf.is_floating_point()
        axes = range(2, rank) if rank > 3 else {3: [1 if sequences else 2] if floating else [], 2: [] if floating else [1]}.get(rank, ())
        free = {}
        for axis, name in zip(axes, AXES.get(len(axes), ()), strict=False):
            size = leaf.shape[axis]
            again = sum(known == name for known, _ in names)
            free[axis] = names.setdefault((name, size), f"{name}_{again}" if again else name)
        found.append(free)
    return found


@functools.cache
def _onnx_identity() -> Callable[..., Any]:
    """The translation of the operator `normswap::inject`, which matters in training alone: an Identity of its first argument."""
    from onnxscript import opset20

    return lambda shift, *rest, **options: opset20.Identity(shift)


def _onnx_rsub() -> Callable[..., Any]:
    """The translation of other - alpha x, for a number. torch's own fails for a mask in integers and 1.0: it calls aten.sub of a number."""
    import onnx
    from onnxscript import opset20 as op

    def rsub(x: Any, other: Any, alpha: Any = 1) -> Any:
        dtype = int(x.dtype)
        if isinstance(other, float) and not x.dtype.is_floating_point():
            x, dtype = op.Cast(x, to=onnx.TensorProto.FLOAT), onnx.TensorProto.FLOAT
        number, factor = (op.Constant(value=onnx.helper.make_tensor("", dtype, (), [each])) for each in (other, alpha))
        return op.Sub(number, x if alpha == 1 else op.Mul(x, factor))

    return rsub


@functools.cache
def _onnx_number() -> Callable[..., Any]:
    """The translation of `scalar_tensor`, as which torch writes a number in a model's code: rounded once, to the dtype that is asked for.

    That of onnxscript rounds it to float32 first, so that the file of a float64 model computes with 0.10000000149 where the model has 0.1.
    """
    import onnx
    from onnxscript import opset20
    from onnxscript.function_libs.torch_lib.ops.core import aten_scalar_tensor

    def number(s: Any, dtype: int = 1, layout: str = "", device: str = "", pin_memory: bool = False) -> Any:
        if isinstance(s, (int, float)) and dtype == onnx.TensorProto.DOUBLE:
            return opset20.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.DOUBLE, (), [s]))
        return aten_scalar_tensor(s, dtype=dtype)

    return number


def _output_names(program: ExportedProgram) -> list[str]:
    """Keys where the model returns a dict or a named tuple, else "output", "output_1" and so on."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    structure = program.call_spec.out_spec
    try:
        paths = [path for path, _ in tree_flatten_with_path(tree_unflatten(list(range(len(specs))), structure))[0]]
    except Exception:  # the output is a container without names for its items
        paths = [()] * len(specs)
    names: list[str] = []
    for spec, path in zip(specs, paths, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            continue  # torch leaves out outputs that are no tensors
        words = [key.key if isinstance(key, MappingKey) else getattr(key, "name", None) for key in path]
        names.append(unused("_".join(str(word) for word in words if word is not None) or "output", names))
    return names


def _reason(error: BaseException) -> str:
    """The error of torch in one line: the operator that ONNX lacks, or the line of the model that cannot be traced."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(map(str, chain))
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>", text)
    if missing:
        return f"ONNX has no operator for {missing[1]}.{missing[2]}"
    line = next((line for e in chain if not type(e).__module__.startswith("torch.onnx") and (line := first_words(e))), first_words(error))
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    mine = [place for place in places if not any(package in place[0] for package in ("/torch/", "/onnxscript/", "<"))]
    where = f" ({mine[-1][0]}, line {mine[-1][1]}, in {mine[-1][2]})" if mine else ""
    return f"{line}{where}"
