"""From a model with BatchlessNorm layers to an ONNX file.

1. In a copy that shares the model's tensors, every call of a BatchlessNorm becomes one node `normswap::Affine` that says which norm it is.
2. torch.onnx.export makes a graph of that copy. Every use of every tensor is explicit in it, whatever the model's Python looks like.
3. Each Affine is folded into the layers around it where that is exact (`normswap.folding`), and becomes one operator elsewhere. Both are
   computed in float64 from the parameters and rounded once.
4. The file is checked, and appears under its name by rename, whole or not at all.

An ExportedProgram cannot be changed in step 1; there, the Mul and Add that torch makes of a BatchlessNorm are found in step 3. The steps
are the modules of `normswap.exporting`, but for the last one, which is `normswap.onnx_file`.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import nn
from torch.export import ExportedProgram

from normswap.errors import ExportError, UsageError
from normswap.export import cuda, file
from normswap.export.cuda import Cuda
from normswap.export.finish import at_opset, check, tidy
from normswap.export.float16 import arguments, halved, remember
from normswap.export.float16 import check as check_half
from normswap.export.graph import READ, graph_of
from normswap.export.graph import Dynamic as Dynamic
from normswap.export.marks import Site, copied, mark
from normswap.export.norms import alike, fold_norms, operators, shorten
from normswap.export.opset import ATTENTION_OPSET, DEFAULT_OPSET, TORCH_OPSET, attends
from normswap.export.ort_fused import fuse
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.result import Comparisons, Parity
from normswap.parity.taps import Tap

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from normswap.folding import Fate

Target = Literal["portable", "ort-cpu", "ort-fused"]


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
    legs: Comparisons = field(default_factory=Comparisons, repr=False)
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
    undone: Mapping[str, str] | None = None,
    **options: Any,
) -> Export:
    """Write `model`, in eval mode, to `path`. undone: norms that are not to be folded, by name, and why. options: those of `Program`."""
    return Program(model, args, kwargs, **options).write(path, undone)


class Program:
    """What torch.onnx.export makes of a model, from which any number of files can be written. The model is not touched.

    Args:
        model: in eval mode here, whatever it is.
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

    Raises ExportError if torch cannot make a graph of the model, or ONNX cannot express it in `opset`.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        target: Target = "portable",
        opset: int | None = None,
        dynamic: bool | Dynamic = True,
        half: bool = False,
        external_data: bool | None = None,
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        freedom = _checked(target, opset, dynamic)
        self.sites: tuple[Site, ...] = ()
        precise: nn.Module | None = None
        if half and isinstance(model, ExportedProgram):
            raise UsageError(
                "an ExportedProgram computes in the dtypes that it was exported with", hint="convert the module it came from to float16"
            )
        attention = opset is None and isinstance(model, ExportedProgram) and attends(model, args, kwargs)
        if isinstance(model, nn.Module):
            model = copied(model)
            if half:
                precise, model, (args, kwargs) = model, halved(model), arguments((args, dict(kwargs)))
            attention = opset is None and attends(model, args, kwargs)
            self.sites = mark(model)
        if precise is not None:
            norms = dict(precise.named_modules())
            self.sites = tuple(Site(site.name, cast(BatchlessNorm, norms[site.name])) for site in self.sites)
        self.target, self.external, self.metadata = target, external_data, metadata
        self.opset: int | None = None if attention else DEFAULT_OPSET if opset is None else opset
        self._note: str | None = None
        self._graph = functools.cache(functools.partial(_graph, model, self.sites, args, dict(kwargs), freedom, precise))

    def write(self, path: Path, undone: Mapping[str, str] | None = None) -> Export:
        """Fold what can be and write the file. undone: norms that are not to be folded, by name, and why."""
        if self.opset is None:
            made, self.opset, self._note = _with_attention(lambda opset: self._made(opset, undone))
        else:
            made = self._made(self.opset, undone)
        if self._note is not None:
            made.export = dataclasses.replace(made.export, notes=(*made.export.notes, self._note))
        self._write(made, path)
        return dataclasses.replace(made.export, path=Path(path), target=self.target)

    def write_baseline(self, path: Path) -> bool:
        """Write the file with every norm as it is, if there is any: what a folded file is as precise as. After `write`."""
        assert self.opset is not None
        made = self._made(self.opset, None, folded=False)
        if made.export.sites:
            self._write(made, path)
        return bool(made.export.sites)

    def _made(self, opset: int, undone: Mapping[str, str] | None, *, folded: bool = True) -> _Made:
        graph, names, notes = self._graph(max(opset, TORCH_OPSET))
        return _make(graph.clone(), names, notes, self.sites, self.target, undone, opset, folded=folded)

    def _write(self, made: _Made, path: Path) -> None:
        import onnx

        made.proto.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in self.metadata.items())
        file.write(made.proto, made.tensors, Path(path), external=self.external)
        made.tensors.clear()
        gc.collect()  # a graph refers to itself all over; with it go the folded weights


def _checked(target: str, opset: int | None, dynamic: bool | str) -> Dynamic:
    """What to leave free, if all of these are known words."""
    import onnx

    if target not in get_args(Target):
        raise UsageError(f"the target is {target!r}; expected one of {', '.join(map(repr, get_args(Target)))}")
    if target == "ort-fused" and opset is not None and opset < TORCH_OPSET:
        raise UsageError(f"the target 'ort-fused' cannot be converted to opset {opset}", hint=f"opset {TORCH_OPSET} and above can be")
    freedom = dynamic if isinstance(dynamic, str) else "batch" if dynamic else "none"
    if freedom not in get_args(Dynamic):
        raise UsageError(f"dynamic is {dynamic!r}; expected True, False or one of {', '.join(map(repr, get_args(Dynamic)))}")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 7 <= opset <= newest:
        raise UsageError(f"there is no opset {opset} to export to; expected one from 7 to {newest}")
    return cast(Dynamic, freedom)


@dataclass
class _Made:
    """A file that was not written yet, and what there is to say about it."""

    proto: onnx.ModelProto
    tensors: dict[str, ir.TensorProtocol]
    export: Export


def _graph(
    model: nn.Module | ExportedProgram,
    sites: Sequence[Site],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Dynamic,
    precise: nn.Module | None,
    opset: int,
) -> tuple[ir.Model, tuple[list[str], list[str]], tuple[str, ...]]:
    """(the graph before anything is folded in it, the names of its inputs and outputs, notes)."""
    graph, names, notes = graph_of(model, args, kwargs, opset, dynamic)
    if precise is not None and isinstance(model, nn.Module):
        check_half(graph.meta[READ], precise, model)
        remember(graph.graph, precise)
    shorten(graph, marked=bool(sites))
    return graph, names, notes


def _make(
    graph: ir.Model,
    names: tuple[list[str], list[str]],
    notes: tuple[str, ...],
    sites: Sequence[Site],
    target: Target,
    undone: Mapping[str, str] | None,
    opset: int,
    *,
    folded: bool,
) -> _Made:
    from normswap.folding import taps

    weights = list(graph.graph.initializers.values())
    found, skeleton = fold_norms(graph, sites, undone, blocked=target == "ort-cpu", folded=folded)
    del sites
    tidy(graph, *names)
    fates, places = taps(found)
    del found
    extra = alike(operators(graph.graph)) - alike(skeleton)
    if target == "ort-fused" and folded and not fuse(graph):
        notes = (*notes, "nothing was fused: there is no two-dimensional Conv in float32 that a Relu alone reads")
    inputs, outputs = (tuple(str(value.name) for value in values) for values in (graph.graph.inputs, graph.graph.outputs))
    free = tuple(
        {axis: str(size) for axis, size in enumerate(value.shape or ()) if not isinstance(size, int)} for value in graph.graph.inputs
    )
    proto, tensors = file.skeleton(graph)
    for value in weights:
        value.const_value = None  # onnxscript's rewrite rules hold on to the last graph that they have seen, and it to every value
    del graph, weights
    proto = at_opset(proto, opset)
    check(proto)
    export = Export(
        path=Path(),
        opset=opset,
        nodes=file.census(proto.graph),
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


def _with_attention(make: Callable[[int], _Made]) -> tuple[_Made, int, str | None]:
    """In the opset that has an operator for attention, unless torch cannot, or more of the rest would be without a CUDA kernel there.

    (the file, its opset, why it is not that with attention, if so).
    """
    try:
        made = make(ATTENTION_OPSET)
    except ExportError as error:
        why, made = f"torch cannot write attention as one operator: {error.message.partition(': ')[2]}", make(DEFAULT_OPSET)
    else:
        missing = _without_kernel(made)
        if not missing:
            return made, ATTENTION_OPSET, None
        other = make(DEFAULT_OPSET)
        if len(_without_kernel(other)) >= len(missing):
            return made, ATTENTION_OPSET, None
        lost = Counter(node.op for node in missing) - Counter(node.op for node in _without_kernel(other))
        why, made = f"in opset {ATTENTION_OPSET}, {' and '.join(sorted(lost))} would be without a CUDA kernel", other
    return made, DEFAULT_OPSET, f"opset {DEFAULT_OPSET}: {why}"


def _without_kernel(made: _Made) -> tuple[cuda.Missing, ...]:
    return () if made.export.cuda is None else made.export.cuda.without_kernel
