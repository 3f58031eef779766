"""From a model with BatchlessNorm layers to an ONNX file.

1. In a copy that shares the model's tensors, every call of a BatchlessNorm becomes one node `normswap::Affine` that says which norm it is
   (`marks.py`).
2. torch.onnx.export makes a graph of that copy. Every use of every tensor is explicit in it, whatever the model's Python looks like
   (`graph.py`).
3. Each Affine is folded into the layers around it where that is exact (`normswap.folding`), and becomes one operator elsewhere. Both are
   computed in float64 from the parameters and rounded once (`norms.py`).
4. The graph gets the names and the opset that were asked for (`finish.py`), and the file appears by rename, whole or not at all
   (`file.py`).

An ExportedProgram cannot be changed in step 1; there, the Mul and Add that torch makes of a BatchlessNorm are found in step 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import nn
from torch.export import ExportedProgram

from normswap.errors import UsageError, one_of
from normswap.export import cuda, file
from normswap.export.cuda import Cuda
from normswap.export.finish import at_opset, check, tidy
from normswap.export.float16 import arguments, halved, remember
from normswap.export.float16 import check as check_half
from normswap.export.fused_conv import fuse
from normswap.export.graph import Dynamic as Dynamic
from normswap.export.graph import Graph, graph_of
from normswap.export.marks import Site, copied, mark
from normswap.export.norms import alike, fold_norms, operators, shorten
from normswap.export.opset import DEFAULT_OPSET, TORCH_OPSET, newer_if_better, wants_newer
from normswap.export.simplify import norms_stay, simplify
from normswap.files.converted import unwrapped
from normswap.layer import weight_norm
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.result import Comparisons, Parity
from normswap.versions import version_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from normswap.folding import Outcome as Outcome

Target = Literal["portable", "cuda"]


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written.

    nodes     how often each operator occurs, by its type ("domain::type" outside of ai.onnx)
    sites     one `normswap.folding.Outcome` per call of a norm: by which rewrite it was folded, into which layers, what is left and why
    folded    the names of the norms of which nothing is left; residue: of the others
    skeleton  the operators of the same model without its norms
    extra     the operators that the file has beyond the skeleton: a Max counts as the Relu whose place it took, a Gemm as a MatMul
    dynamic   whether the batch size is free; if it was asked for and is not, `notes` says why
    free      for each input, its free axes: their numbers and names
    parity    the result of comparing the file with the model, None before that
    target    what the file was written for
    cuda      which floating-point nodes have a CUDA kernel, and whether the file ran on CUDA
    comparisons  the results of all comparisons of the file
    biases    one `Outcome` per bias of an RMSNorm, which goes into the layers after it where it can; the RMSNorm stays
    """

    path: Path
    opset: int
    nodes: Mapping[str, int]
    sites: tuple[Outcome, ...]
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
    comparisons: Comparisons = field(default_factory=Comparisons, repr=False)
    biases: tuple[Outcome, ...] = ()

    @property
    def folded(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites if not site.left)

    @property
    def residue(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites if site.left)


@dataclass(frozen=True)
class Settings:
    """The options of an ONNX file.

    target    "portable": operators of ai.onnx alone, in the form that was fastest wherever it was measured. "cuda": also fused operators of
              onnxruntime, which the file defines as functions (`fused_conv.py`), and a maximum with a constant in the place of a
              BatchNormalization and its ReLU between convolutions
    opset     of the file. Unless given, DEFAULT_OPSET, or NEWER_OPSET if the model calls attention or rms_norm of torch, or computes
              in bfloat16
    dynamic   which axes are free. "batch" (True): dimension 0 of every input tensor that has there the size of the first one. "spatial":
              also the dimensions after the channels, or the length of a sequence. "none" (False)
    half      whether weights, inputs and outputs are float16. The folds are computed from the unrounded weights, and rounded once
    external_data  whether the weights go to a file beside it, `<path>.data`; None: if they are more than one file can hold
    metadata  what else to write into the file, by key
    """

    target: Target = "portable"
    opset: int | None = None
    dynamic: bool | Dynamic = True
    half: bool = False
    external_data: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError for an unknown or impossible setting."""
        import onnx

        one_of("the target", self.target, get_args(Target))
        newest = onnx.defs.onnx_opset_version()
        if self.opset is not None and not (isinstance(self.opset, int) and 7 <= self.opset <= newest):
            raise UsageError(f"there is no opset {self.opset!r} to export to; expected one from 7 to {newest}")
        if self.target == "cuda" and self.opset is not None and self.opset < TORCH_OPSET:
            raise UsageError(f"the target 'cuda' cannot be converted to opset {self.opset}", hint=f"opset {TORCH_OPSET} and above can be")
        if self.freedom not in get_args(Dynamic):
            raise UsageError(f"dynamic is {self.dynamic!r}; expected True, False or one of {', '.join(map(repr, get_args(Dynamic)))}")

    @property
    def freedom(self) -> Dynamic:
        """`dynamic` as a word."""
        return self.dynamic if isinstance(self.dynamic, str) else "batch" if self.dynamic else "none"


def export(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    kept: Mapping[str, str] | None = None,
    **options: Any,
) -> Export:
    """Write `model`, in eval mode, to `path`. kept: norms that are not to be folded, by name, and why. options: those of `Settings`."""
    return Program(model, args, kwargs, Settings(**options)).write(path, kept)


class Program:
    """The graph that torch.onnx.export makes of a model in eval mode, to write any number of files. The model is not touched.

    args, kwargs: example inputs. The graph takes inputs of these shapes, with other sizes on the free axes.

    Raises ExportError if torch cannot make a graph of the model, or ONNX cannot express it in the opset.
    """

    def __init__(
        self, model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any], settings: Settings | None = None
    ) -> None:
        self.settings = settings = settings or Settings()
        self.sites: tuple[Site, ...] = ()
        precise: nn.Module | None = None
        if settings.half and isinstance(model, ExportedProgram):
            raise UsageError(
                "an ExportedProgram computes in the dtypes that it was exported with", hint="convert the module it came from to float16"
            )
        if isinstance(model, nn.Module):
            model = unwrapped(copied(model))
            weight_norm.put_away(model)
            if settings.half:
                precise, model, (args, kwargs) = model, halved(model), arguments((args, dict(kwargs)))
        newer = settings.opset is None and wants_newer(model, args, kwargs)
        if isinstance(model, nn.Module):
            self.sites = mark(model)
        if precise is not None:
            norms = dict(precise.named_modules())
            self.sites = tuple(Site(site.name, cast(BatchlessNorm, norms[site.name])) for site in self.sites)
        marked = bool(self.sites)
        self.opset: int | None = None if newer else DEFAULT_OPSET if settings.opset is None else settings.opset
        self._note: str | None = None

        @functools.cache
        def graph(opset: int) -> Graph:
            """The graph before anything is folded in it."""
            made = graph_of(model, args, dict(kwargs), opset, settings.freedom)
            if precise is not None and isinstance(model, nn.Module):
                check_half(made.reads, precise, model)
                remember(made.model.graph, precise)
            shorten(made.model, marked=marked)
            return made

        self._graph = graph

    def write(self, path: Path, kept: Mapping[str, str] | None = None) -> Export:
        """Fold what can be and write the file. kept: norms that are not to be folded, by name, and why."""
        if self.opset is None:
            made, self.opset, self._note = newer_if_better(lambda opset: self._made(opset, kept), _without_kernel)
        else:
            made = self._made(self.opset, kept)
        if self._note is not None:
            made.export = dataclasses.replace(made.export, notes=(*made.export.notes, self._note))
        self._write(made, path)
        return dataclasses.replace(made.export, path=Path(path), target=self.settings.target)

    def write_baseline(self, path: Path) -> None:
        """Write the baseline, a file in which no norm is folded: its error is the measure for the folded file. Call it after `write`."""
        assert self.opset is not None
        self._write(self._made(self.opset, None, folded=False), path)

    def _made(self, opset: int, kept: Mapping[str, str] | None, *, folded: bool = True) -> _Made:
        from onnx_ir.passes.common._c_api_utils import call_onnx_api

        original, cuda_target = self._graph(max(opset, TORCH_OPSET)), self.settings.target == "cuda"
        model, notes = original.model.clone(), original.notes
        weights = list(model.graph.initializers.values())
        outcomes, biases, skeleton = fold_norms(model, self.sites, kept, spatial_thresholds=cuda_target, folded=folded)
        if folded:
            with norms_stay(model):
                simplify(model)  # a second time, as more can be shortened without the norms
        tidy(model, original.input_names, original.output_names)
        extra = alike(operators(model.graph)) - alike(skeleton)
        if cuda_target and folded and not fuse(model):
            notes = (*notes, "nothing was fused: there is no two-dimensional Conv in float32 that a Relu alone reads")
        inputs, outputs = (tuple(str(value.name) for value in values) for values in (model.graph.inputs, model.graph.outputs))
        free = tuple(
            {axis: str(size) for axis, size in enumerate(value.shape or ()) if not isinstance(size, int)} for value in model.graph.inputs
        )
        model = at_opset(model, opset)
        check(model)
        for value in weights:
            if value.graph is not model.graph:
                value.const_value = None  # free the memory: onnxscript's rewrite rules keep the last graph that they saw, with every value
        export = Export(
            path=Path(),
            opset=opset,
            nodes=dict(operators(model.graph).most_common()),
            sites=tuple(outcomes),
            biases=tuple(biases),
            skeleton=dict(skeleton.most_common()),
            extra=dict(extra.most_common()),
            input_names=inputs,
            output_names=outputs,
            dynamic=any(0 in axes for axes in free),
            free=free,
            notes=notes,
            cuda=call_onnx_api(cuda.of_file, model),
        )
        return _Made(model, export)

    def _write(self, made: _Made, path: Path) -> None:
        made.model.metadata_props.update({"normswap_version": version_of("normswap"), **self.settings.metadata})
        file.write(made.model, Path(path), external=self.settings.external_data, edit=_without_shapes)


@dataclass
class _Made:
    """A graph that is ready to be written, and the Export that describes its file."""

    model: ir.Model
    export: Export


def _without_shapes(proto: onnx.ModelProto) -> None:
    """Leave out the shapes of inner values, which can be inferred."""
    del proto.graph.value_info[:]


def _without_kernel(made: _Made) -> tuple[cuda.Missing, ...]:
    return () if made.export.cuda is None else made.export.cuda.without_kernel
