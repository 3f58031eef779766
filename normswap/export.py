"""From a model with BatchlessNorm layers to an ONNX file.

1. In a copy that shares the model's tensors, every call of a BatchlessNorm becomes one node `normswap::Affine` that says which norm it is.
2. torch.onnx.export makes a graph of that copy. Every use of every tensor is explicit in it, whatever the model's Python looks like.
3. Each Affine is folded into the layers around it where that is exact (`normswap.folding`), and becomes one operator elsewhere. Both are
   computed in float64 from the parameters and rounded once.
4. The file is checked, and appears under its name by rename, whole or not at all.

An ExportedProgram cannot be changed in step 1; there, the Mul and Add that torch makes of a BatchlessNorm are found in step 3.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from normswap import cuda, onnx_file
from normswap.attention import ATTENTION_OPSET, attends
from normswap.batchless import BatchlessNorm, _laid_out
from normswap.cuda import Cuda
from normswap.errors import ExportError, SwapError, UsageError
from normswap.fused import fuse
from normswap.half import arguments, halved, remember
from normswap.injection import inject_operator
from normswap.lean import lean, norms_stay
from normswap.parity import Legs, Parity
from normswap.quiet import quiet
from normswap.sharing import shadow
from normswap.taps import Tap
from normswap.versions import version_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from normswap.folding import Affine, Constants, Fate

Target = Literal["portable", "ort-cpu", "ort-fused"]
Dynamic = Literal["batch", "spatial", "none"]
DEFAULT_OPSET = 20
_TORCH_OPSET = 18  # the lowest that torch.onnx.export writes by itself
_DOMAIN = "normswap"
_NO_ONNX = "`--no-onnx` writes the converted model without an ONNX file"


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written.

    nodes     how often each operator occurs, by its type ("domain::type" outside of ai.onnx)
    sites     where each norm went, one `normswap.folding.Fate` per call: by which rewrite, into which layers, what is left of it and why
    folded    the names of those of which nothing is left; residue: the others
    skeleton  the operators of the same model without its norms
    extra     the operators that the file has on top of those: a Max counts as the Relu whose place it took, a Gemm as a MatMul
    dynamic   whether the batch size is free; if it was asked for and is not, `notes` says why
    free      for each input, its free axes: their numbers and names
    parity    what comparing the file to the model gave, once somebody did
    target    what the file was written for
    cuda      which floating-point nodes have a CUDA kernel, and whether it ran on CUDA
    legs      everything that it was held against
    taps      where in the file the outputs of the norms are to be found
    """

    path: Path
    opset: int
    nodes: Mapping[str, int]
    sites: tuple[Fate, ...]
    skeleton: Mapping[str, int]
    extra: Mapping[str, int]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic: bool = True
    free: tuple[Mapping[int, str], ...] = ()
    notes: tuple[str, ...] = ()
    parity: Parity | None = None
    target: Target = "portable"
    cuda: Cuda | None = None
    legs: Legs = field(default_factory=Legs, repr=False)
    taps: tuple[Tap, ...] = field(default=(), repr=False)

    @property
    def folded(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites if not site.left)

    @property
    def residue(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites if site.left)


def export(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    target: Target = "portable",
    opset: int | None = None,
    dynamic: bool | Dynamic = True,
    half: bool = False,
    external_data: bool | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
    undone: Mapping[str, str] | None = None,
) -> Export:
    """Write `model`, in eval mode, to `path`. The model is not touched, nor is torch's random state.

    Args:
        args, kwargs: example inputs. The graph is that of any input of these shapes, or of these shapes at any batch size.
        target: "portable", operators of ai.onnx alone, as few as there can be; "ort-cpu", the same in the form that is fastest in
            onnxruntime on a CPU: a BatchNormalization and a ReLU between convolutions instead of a maximum; "ort-fused", also those of
            onnxruntime that are in `normswap.fused`.
        opset: of the file. Unless given, DEFAULT_OPSET, or ATTENTION_OPSET if the model calls scaled_dot_product_attention.
        half: whether weights, inputs and outputs are float16. The folds are computed from the weights as they are, and rounded once.
        external_data: whether the weights go to a file beside it, `<path>.data`; None: if they are more than one file can hold.
        metadata: what else to write into the file, by key.
        dynamic: what to leave free. "batch" (True): dimension 0 of every input tensor that agrees there with the first one. "spatial": also
            the dimensions after the channels, or the length of a sequence. "none" (False).
        undone: norms that are not to be folded, by name, and why.

    Raises ExportError if torch cannot make a graph of the model, or ONNX cannot express it in `opset`.
    """
    import onnx

    if target not in get_args(Target):
        raise UsageError(f"the target is {target!r}; expected one of {', '.join(map(repr, get_args(Target)))}")
    if target == "ort-fused" and opset is not None and opset < _TORCH_OPSET:
        raise UsageError(f"the target 'ort-fused' cannot be converted to opset {opset}", hint=f"opset {_TORCH_OPSET} and above can be")
    freedom = dynamic if isinstance(dynamic, str) else "batch" if dynamic else "none"
    if freedom not in get_args(Dynamic):
        raise UsageError(f"dynamic is {dynamic!r}; expected True, False or one of {', '.join(map(repr, get_args(Dynamic)))}")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 7 <= opset <= newest:
        raise UsageError(f"there is no opset {opset} to export to; expected one from 7 to {newest}")
    sites: tuple[_Site, ...] = ()
    precise: nn.Module | None = None
    if half and isinstance(model, ExportedProgram):
        raise UsageError(
            "an ExportedProgram computes in the dtypes that it was exported with", hint="convert the module it came from to float16"
        )
    attention = opset is None and isinstance(model, ExportedProgram) and attends(model, args, kwargs)
    if isinstance(model, nn.Module):
        model = _copy(model)
        if half:
            precise, model, (args, kwargs) = model, halved(model), arguments((args, dict(kwargs)))
        attention = opset is None and attends(model, args, kwargs)
        sites = _mark(model)
    if precise is not None:
        norms = dict(precise.named_modules())
        sites = tuple(_Site(site.name, cast(BatchlessNorm, norms[site.name])) for site in sites)
    make = functools.partial(_make, model, sites, args, kwargs, freedom, precise, target, undone)
    del model, sites
    made = _with_attention(make) if attention else make(DEFAULT_OPSET if opset is None else opset)
    del make
    made.proto.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in metadata.items())
    onnx_file.write(made.proto, made.tensors, Path(path), external=external_data)
    made.tensors.clear()
    gc.collect()  # a graph refers to itself all over; with it go the folded weights
    return dataclasses.replace(made.export, path=Path(path), target=target)


@dataclass
class _Made:
    """A file that was not written yet, and what there is to say about it."""

    proto: onnx.ModelProto
    tensors: dict[str, ir.TensorProtocol]
    export: Export


def _make(
    model: nn.Module | ExportedProgram,
    sites: Sequence[_Site],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Dynamic,
    precise: nn.Module | None,
    target: Target,
    undone: Mapping[str, str] | None,
    opset: int,
) -> _Made:
    from normswap.folding import taps

    graph, names, notes = _graph_of(model, args, dict(kwargs), max(opset, _TORCH_OPSET), dynamic)
    del model
    if precise is not None:
        remember(graph.graph, precise)
    weights = list(graph.graph.initializers.values())
    found, skeleton = _fold(graph, sites, undone, blocked=target == "ort-cpu")
    del sites
    _tidy(graph, *names)
    fates, places = taps(found)
    del found
    extra = _alike(_operators(graph.graph)) - _alike(skeleton)
    if target == "ort-fused" and not fuse(graph):
        notes = (*notes, "nothing was fused: there is no two-dimensional Conv in float32 that a Relu alone reads")
    inputs, outputs = (tuple(str(value.name) for value in values) for values in (graph.graph.inputs, graph.graph.outputs))
    free = tuple(
        {axis: str(size) for axis, size in enumerate(value.shape or ()) if not isinstance(size, int)} for value in graph.graph.inputs
    )
    proto, tensors = onnx_file.skeleton(graph)
    for value in weights:
        value.const_value = None  # onnxscript's rewrite rules hold on to the last graph that they have seen, and it to every value
    del graph, weights
    proto = _at_opset(proto, opset)
    _check(proto)
    export = Export(
        path=Path(),
        opset=opset,
        nodes=onnx_file.census(proto.graph),
        sites=fates,
        skeleton=dict(skeleton.most_common()),
        extra=dict(extra.most_common()),
        input_names=inputs,
        output_names=outputs,
        dynamic=any(0 in axes for axes in free),
        free=free,
        notes=notes,
        cuda=cuda.of_file(proto),
        taps=places,
    )
    del proto.graph.value_info[:]  # shapes of inner values: whoever wants them can infer them
    return _Made(proto, tensors, export)


def _with_attention(make: Callable[[int], _Made]) -> _Made:
    """In the opset that has an operator for attention, unless torch cannot, or more of the rest would be without a CUDA kernel there."""
    try:
        made = make(ATTENTION_OPSET)
    except ExportError as error:
        why, made = f"torch cannot write attention as one operator: {error.message.partition(': ')[2]}", make(DEFAULT_OPSET)
    else:
        missing = _without_kernel(made)
        if not missing:
            return made
        other = make(DEFAULT_OPSET)
        if len(_without_kernel(other)) >= len(missing):
            return made
        lost = Counter(node.op for node in missing) - Counter(node.op for node in _without_kernel(other))
        why, made = f"in opset {ATTENTION_OPSET}, {' and '.join(sorted(lost))} would be without a CUDA kernel", other
    return dataclasses.replace(made, export=dataclasses.replace(made.export, notes=(*made.export.notes, f"opset {DEFAULT_OPSET}: {why}")))


def _without_kernel(made: _Made) -> tuple[cuda.Missing, ...]:
    return () if made.export.cuda is None else made.export.cuda.without_kernel


# 1. A copy of the model with a mark for every norm --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    name: str
    norm: BatchlessNorm


class _Mark(BatchlessNorm):
    """A BatchlessNorm that leaves a mark in the graph instead of computing: `number` says which of the sites it is."""

    number: int

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.normswap.onnx_affine(input, self.number))


@functools.cache
def _mark_op() -> Any:
    # An operator of its own, as torch.onnx.ops.symbolic forgets the device and the strides, which a later `view` may rely on.
    _LIBRARY.define("onnx_affine(Tensor x, int site) -> Tensor")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{_DOMAIN}::onnx_affine", lambda x, site: _laid_out(torch.empty_like(x)), lib=_LIBRARY)
    return torch.ops.normswap.onnx_affine.default


_LIBRARY = torch.library.Library(_DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]  # its operators live as long as it does


def _copy(model: nn.Module) -> nn.Module:
    try:
        return shadow(model)
    except SwapError as error:
        raise ExportError(error.message, hint=_NO_ONNX) from error


def _mark(twin: nn.Module) -> tuple[_Site, ...]:
    """Put a mark in the place of every norm of a model that is nobody else's."""
    sites = tuple(_Site(name, module) for name, module in twin.named_modules() if isinstance(module, BatchlessNorm))
    for number, site in enumerate(sites):
        # The copy keeps its attributes, children and hooks, and every name that leads to it. What a subclass does around
        # BatchlessNorm.forward it still does, as _Mark comes right before BatchlessNorm in the order of resolution.
        cls = type(site.norm)
        site.norm.__class__ = _Mark if cls is BatchlessNorm else type(cls.__name__, (cls, _Mark), {})
        cast(_Mark, site.norm).number = number
    return sites


# 2. The graph, by torch -------------------------------------------------------------------------------------------------------------


def _graph_of(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int, dynamic: Dynamic
) -> tuple[ir.Model, tuple[list[str], list[str]], tuple[str, ...]]:
    """(the graph, the names that its inputs and outputs should have, notes)."""
    marks = {_mark_op(): _onnx_mark(), inject_operator(): _onnx_identity()}
    choices = [_Choice(None)]
    if dynamic != "none" and isinstance(model, nn.Module):
        choices = _dynamic_shapes(model, args, kwargs, spatial=dynamic == "spatial")
    failures: list[Exception] = []
    for choice in choices:
        try:
            with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                program: Any = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    dynamic_shapes=choice.shapes,
                    opset_version=opset,
                    custom_translation_table=marks,
                    dynamo=True,
                    verbose=False,
                )
            break
        except Exception as error:
            failures.append(error)
    else:
        raise ExportError(f"torch cannot make an ONNX graph of this model: {_reason(failures[-1])}", hint=_NO_ONNX) from failures[-1]
    notes = []
    if choices[0].spatial and not choice.spatial:
        notes.append(f"the spatial axes are fixed, as torch refuses free ones: {_reason(failures[0])}")
    if len(choices) > 1 and choice.shapes is None:
        notes.append(f"the batch size is fixed, as torch refuses a free one: {_reason(failures[sum(c.spatial for c in choices)])}")
    signature = program.exported_program.graph_signature
    inputs = [s.arg.name for s in signature.input_specs if s.kind is InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)]
    return program.model, (inputs, _output_names(program.exported_program)), tuple(notes)


@dataclass(frozen=True)
class _Choice:
    """What to try as torch's `dynamic_shapes`, and whether it frees more than the batch size."""

    shapes: Any
    spatial: bool = False


AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}  # by how many there are


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, spatial: bool = False) -> list[_Choice]:
    """What to try, best first."""
    arguments = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    leaves, structure = pytree.tree_flatten(arguments)
    sizes = [leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() > 0 else None for leaf in leaves]
    batch = next((size for size in sizes if size is not None), None)
    if batch is None:
        return [_Choice(None)]
    same = [size == batch for size in sizes]
    batches = [same]
    if batch == 1 and sum(same) > 1:  # a 1 may be anything: a mask that all samples share, say
        batches.append([i == same.index(True) for i in range(len(same))])
    choices = [_Choice(pytree.tree_unflatten([{0: "batch"} if free else None for free in choice], structure)) for choice in batches]
    wider: list[_Choice] = []
    for sequences in (False, True) if spatial else ():
        axes = _spatial_axes(leaves, sequences=sequences)
        both = [({0: "batch"} if free else {}) | more for free, more in zip(same, axes, strict=True)]
        shapes = pytree.tree_unflatten([found or None for found in both], structure)
        if any(axes) and shapes not in [choice.shapes for choice in wider]:
            wider.append(_Choice(shapes, spatial=True))
    return [*wider, *choices, _Choice(None)]


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
    """What torch.onnx makes of the auxiliary term of an exported program, which is for training: its first argument, as it is."""
    from onnxscript import opset20

    return lambda shift, *rest, **options: opset20.Identity(shift)


@functools.cache
def _onnx_mark() -> Callable[..., Any]:
    """What torch.onnx makes of a mark: a node that ONNX does not know, which `_fold` replaces."""
    import onnx
    from onnxscript import values

    schema = onnx.defs.OpSchema(
        "Affine",
        _DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter("x", "T")],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", [f"tensor({t})" for t in ("float16", "bfloat16", "float", "double")], "")],
        attributes=[onnx.defs.OpSchema.Attribute("site", onnx.defs.OpSchema.AttrType.INT)],
    )
    operator = values.Op(values.Opset(_DOMAIN, 1), "Affine", schema)
    return lambda x, site: operator(x, site=site)


def _output_names(program: ExportedProgram) -> list[str]:
    """Keys where the model returns a dict or a named tuple, else "output", "output_1" and so on."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    structure = program.call_spec.out_spec
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(specs))), structure))[0]]
    except Exception:  # a container that has no names for its items
        paths = [()] * len(specs)
    names: list[str] = []
    for spec, path in zip(specs, paths, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            continue  # torch leaves out what is no tensor
        words = [key.key if isinstance(key, pytree.MappingKey) else getattr(key, "name", None) for key in path]
        names.append(_unused("_".join(str(word) for word in words if word is not None) or "output", names))
    return names


def _unused(name: str, taken: Container[str]) -> str:
    return next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)


def _reason(error: BaseException) -> str:
    """What torch says, in one line: the operator that ONNX lacks, or the line of the model that cannot be traced."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(map(str, chain))
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>", text)
    if missing:
        return f"ONNX has no operator for {missing[1]}.{missing[2]}"
    line = next((line for e in chain if not type(e).__module__.startswith("torch.onnx") and (line := _first_line(e))), _first_line(error))
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    mine = [place for place in places if not any(package in place[0] for package in ("/torch/", "/onnxscript/", "<"))]
    where = f" ({mine[-1][0]}, line {mine[-1][1]}, in {mine[-1][2]})" if mine else ""
    return f"{line}{where}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), 0)
    return f"{type(error).__name__}: {' '.join(lines[: last + 1])[:300]}"


# 3. The norms ---------------------------------------------------------------------------------------------------------------------------


def _fold(model: ir.Model, sites: Sequence[_Site], undone: Mapping[str, str] | None, *, blocked: bool) -> tuple[list[Fate], Counter[str]]:
    """Fold every norm where that is exact: where each went, and the operators that there are without them."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    from normswap.folding import Constants, fold

    if not sites:  # an ExportedProgram: torch itself leaves the arithmetic on more than a few thousand channels to run time
        with quiet():
            optimizer.fold_constants_ir(model, should_fold=lambda node: True if _norm_around(node) is not None else None)
    lean(model)
    constants = Constants(model.graph)
    common.RemoveUnusedNodesPass()(model)
    found = (_marked(node, sites) or _spelled_out(node, constants) for node in model.graph.all_nodes())
    affines = [affine for affine in found if affine is not None]
    skeleton = _operators(model.graph, {node for affine in affines for node in affine.nodes})
    fates = fold(model.graph, affines, constants, undone, blocked=blocked)
    common.RemoveUnusedNodesPass()(model)
    constants.settle()
    return fates, skeleton


def _operators(graph: ir.Graph, without: Container[ir.Node] = ()) -> Counter[str]:
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.all_nodes() if n not in without)


def _alike(operators: Counter[str]) -> Counter[str]:
    """Max(x, a constant) costs what Relu costs, and a MatMul with a bias is a Gemm."""
    places = {"Max": "Relu", "Gemm": "MatMul"}
    counts: Counter[str] = Counter()
    for name, count in operators.items():
        counts[places.get(name, name)] += count
    return counts


def _marked(node: ir.Node, sites: Sequence[_Site]) -> Affine | None:
    """The affine of a normswap::Affine."""
    import onnx_ir as ir

    from normswap.folding import Affine

    x = node.inputs[0] if node.domain == _DOMAIN else None
    if x is None:
        return None
    site = sites[node.attributes.get_int("site")]
    assert x.shape is not None
    rank, norm = len(x.shape), site.norm
    scale, shift = (t.cpu().numpy() for t in norm.folded(rank))
    mean, std = (t.detach().expand(norm.mean.shape) for t in norm.statistics(torch.float64))
    size = (mean.square() + std.square()).sqrt().expand(norm.sizes).reshape(scale.shape).cpu().numpy()
    double = norm.mean.dtype == torch.float64 or x.dtype == ir.DataType.DOUBLE
    return Affine(site.name, (node,), scale, shift, size=size, wide=ir.DataType.DOUBLE if double else ir.DataType.FLOAT)


def _spelled_out(node: ir.Node, constants: Constants) -> Affine | None:
    """The affine that torch has written as (Cast,) Mul, Add (, Cast), if `node` is its Add: a BatchlessNorm of an ExportedProgram."""
    from normswap.folding import Affine
    from normswap.folding.affine import only_use

    name = _norm_around(node)
    if node.op_type != "Add" or name is None:
        return None
    product, shift = _and_constant(node, constants)
    multiply = None if product is None else product.producer()
    if multiply is None or multiply.op_type != "Mul":
        return None
    x, scale = _and_constant(multiply, constants)
    if x is None or x.shape is None:
        return None
    y, nodes, rank, index = node.outputs[0], [multiply, node], len(x.shape), list(multiply.inputs).index(x)
    casts = x.producer(), next(iter(y.consumers()), None)
    if only_use(x) and only_use(y) and all(c is not None and c.op_type == "Cast" and _norm_around(c) == name for c in casts):
        before, after = cast(tuple["ir.Node", "ir.Node"], casts)
        nodes, index = [before, *nodes, after], 0
    scale, shift = (a.astype(np.float64).reshape((1,) * (rank - a.ndim) + a.shape) for a in (scale, shift))
    return Affine(name, tuple(nodes), scale, shift, index, wide=x.dtype)


def _and_constant(node: ir.Node, constants: Constants) -> tuple[ir.Value | None, Any]:
    """The two inputs of a node, the constant one second and as an array; (None, None) unless one of them is constant."""
    for value, other in (node.inputs, node.inputs[::-1]):
        array = constants.of(other)
        if array is not None:
            return value, array
    return None, None


def _norm_around(node: ir.Node) -> str | None:
    """The qualified name of the BatchlessNorm that torch traced this node in."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    classes = node.metadata_props.get("pkg.torch.onnx.class_hierarchy")
    if not scopes or not classes:
        return None
    pairs = zip(ast.literal_eval(scopes), ast.literal_eval(classes), strict=False)
    return next((scope for scope, cls in pairs if cls.startswith(f"{BatchlessNorm.__module__}.BatchlessNorm")), None)


# 4. The file ----------------------------------------------------------------------------------------------------------------------------


def _tidy(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Remove what nothing needs, and give the inputs and outputs their names."""
    from onnx_ir.passes import common

    graph = model.graph
    with norms_stay(model):
        lean(model)  # again: without the norms there is more to shorten
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)  # unused constants, too
    model.opset_imports.pop(_DOMAIN, None)

    inner = [value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    names = {*input_names, *graph.initializers}
    outputs: list[str] = []
    for name in output_names:
        outputs.append(_unused(name, {*names, *outputs}))
    taken = {*names, *outputs, *(str(value.name) for value in inner)}
    for value in inner:
        if value.name in {*input_names, *outputs}:
            value.name = _unused(f"{value.name}_", taken)
            taken.add(value.name)
    for value, name in zip((*graph.inputs, *graph.outputs), (*input_names, *outputs), strict=True):
        value.name = name

    # What torch notes holds the paths of this machine.
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs, *inner):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _at_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    import onnx

    if onnx_file.opset_of(proto) > opset:
        _drop_defaults(proto)
        try:
            proto = onnx.version_converter.convert_version(proto, opset)
        except Exception as error:
            raise ExportError(
                f"this model cannot be written in opset {opset}: {_first_line(error)}",
                hint=f"opset {_TORCH_OPSET} and above need no conversion; the default is {DEFAULT_OPSET}",
            ) from error
    if onnx_file.opset_of(proto) != opset:
        raise ExportError(
            f"opset {opset} was asked for, but this model came out in opset {onnx_file.opset_of(proto)}",
            hint=f"the default is opset {DEFAULT_OPSET}",
        )
    onnx.helper.set_model_props(proto, {"normswap_version": version_of("normswap")})
    return proto


def _drop_defaults(proto: onnx.ModelProto) -> None:
    """Remove attributes that say what is so without them: an older opset may not know their names."""
    import onnx

    for node in proto.graph.node:
        known = onnx.defs.get_schema(node.op_type, onnx_file.opset_of(proto), node.domain).attributes
        for attribute in [a for a in node.attribute if a.name in known and a == known[a.name].default_value]:
            node.attribute.remove(attribute)


def _check(proto: onnx.ModelProto) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        line = _first_line(error)
        hint = "most operators take bfloat16 from opset 22 on" if "bfloat16" in line else _NO_ONNX
        raise ExportError(f"the ONNX graph that torch made is not valid: {line}", hint=hint) from error
