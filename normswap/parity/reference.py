"""The outputs of a comparison's reference at each probe: in float64, which is the truth, and in its own dtype, whose error is its noise."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.models.copying import copy_for_running, to_float64
from normswap.parity.limits import CHOICE, SCALE_SHARE, Precision
from normswap.parity.measure import equal, error, largest
from normswap.parity.probes import Probe, Runner, Values
from normswap.parity.result import NO_NOISE
from normswap.parity.rounding import float64_runner, rounded_by
from normswap.parity.run_onnx import BY_POSITION, NO_KERNEL, draws, onnx_float64_runner, onnx_runner
from normswap.parity.run_onnx import REFERENCE as EVALUATOR
from normswap.parity.run_torch import DtypeRecorder, float64_mode, module_runner, tensors_of


class Key(NamedTuple):
    """One tensor at one probe: an output of the model, or, if `site`, the output of one call of a compared layer ("name@call")."""

    probe: str
    name: str
    site: bool = False


Tensors = dict[Key, Tensor]


def keyed(probe: Probe, found: tuple[Values, Values]) -> Tensors:
    """The tensors that a runner returned at a probe, by Key."""
    return {Key(probe.name, name, site): value for site, values in zip((False, True), found, strict=True) for name, value in values.items()}


@dataclass(frozen=True)
class Truth:
    """One tensor of the reference at one probe.

    value        the tensor in float64
    dtype        its dtype when the reference runs in its own dtype
    noise        the error of the reference in its own dtype
    scale_floor  the smallest scale to which an error is relative
    overflow     mask of the elements that are finite here, but not in the reference's own dtype; None if there are none
    unjudged     why the run in its own dtype cannot be compared with float64, or None
    """

    value: Tensor
    dtype: torch.dtype
    noise: float
    scale_floor: float = 0.0
    overflow: Tensor | None = None
    unjudged: str | None = None

    @functools.cached_property
    def scale(self) -> float:
        """What an error is relative to."""
        return max(largest(self.value), self.scale_floor)

    @property
    def is_rounded(self) -> bool:
        """Whether rounding can change it: it is floating or complex, not of integers or booleans."""
        return self.dtype.is_floating_point or self.dtype.is_complex


def truth_of(value: Tensor, own: Tensor | None, scale_floor: float) -> Truth:
    """The Truth of one tensor. value: in float64; own: the same tensor in the reference's own dtype."""
    if own is None or own.shape != value.shape:
        shape = None if own is None else tuple(own.shape)
        unjudged = f"its shape is {tuple(value.shape)} in float64 and {shape} in the model's own dtype"
        return Truth(value, value.dtype if own is None else own.dtype, math.nan, scale_floor, None, unjudged)
    # An output that is nothing but rounding in its own dtype (a difference of equal values) has no size in float64 to compare with.
    scale_floor = max(scale_floor, SCALE_SHARE * largest(own))
    overflow = ~own.isfinite().cpu() & ~equal(own.cpu(), value.cpu())
    noise = error(own, value, overflow, scale_floor).max_rel
    return Truth(value, own.dtype, noise, scale_floor, overflow if bool(overflow.any()) else None)


@dataclass(frozen=True)
class Reference:
    """The model or file with which candidates are compared, and the ways to run it.

    sites: names of modules whose outputs are compared, too. unrounded: the model from which `model` was rounded; it then runs in float64
    in place of `model`.
    """

    model: nn.Module | Path
    sites: Sequence[str] = ()
    unrounded: nn.Module | None = None

    def own_runner(self, dtypes: set[torch.dtype] | None = None) -> Runner:
        """Runs it in its own dtype. dtypes: a set to which the dtypes are added in which a module computes."""
        if isinstance(self.model, Path):
            try:
                return onnx_runner(self.model, "disabled")
            except Exception as error:
                if NO_KERNEL not in str(error):
                    raise
                return onnx_runner(self.model, EVALUATOR)  # onnxruntime has no Conv in float64 or bfloat16, for example
        mode = nullcontext if dtypes is None else functools.partial(DtypeRecorder, dtypes)
        return module_runner(copy_for_running(self.model), self.sites, mode)

    def float64_runner(self, probes: Sequence[Probe]) -> Runner:
        """Runs it in float64, with the numbers that it stores."""
        if isinstance(self.model, Path):
            if (why := draws(self.model)) is not None:
                raise UsageError(f"the model cannot be run in float64: {why}", hint=NO_NOISE)
            return onnx_float64_runner(self.model)
        module = self.unrounded or self.model
        return module_runner(copy_for_running(module, to_float64), self.sites, float64_mode(module, probes))

    def unrounded_runner(self, probes: Sequence[Probe], shared: Sequence[Tensor] | None = None, eps: float = 0.0) -> Runner:
        """Runs it in float64, with unrounded statistics where BatchlessNorm layers have stored them.

        shared: the tensors of a candidate; with it, each number is moved at random: by up to CHOICE of its size if the candidate has the
        same tensor, else by up to the rounding that it may contain, half of eps.
        """
        if isinstance(self.model, Path):
            return onnx_float64_runner(self.model, nudge=0.0 if shared is None else eps / 2)
        module = self.unrounded or self.model
        return float64_runner(module, self.sites, probes, None if shared is None else rounded_by(module, shared, eps, shared_by=CHOICE))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The parameters and buffers of a module; tensors that a candidate shares with them were not rounded by the candidate."""
        return tensors_of(self.model) if isinstance(self.model, nn.Module) else ()


@dataclass(frozen=True)
class Baseline:
    """The measurement of an ONNX file before any fold, in one runtime.

    noise   the error of each tensor
    wrong   why this file already computes another function than the reference, or None
    passes  number of forward passes
    """

    noise: Mapping[Key, float]
    wrong: str | None
    passes: int


@dataclass(frozen=True)
class Judgement:
    """The truths of a reference at every probe: made once, used for any number of candidates.

    dropped    probes at which the reference itself could not run, with the reason
    passes     number of forward passes
    flat       names of the probes that are for ONNX files only
    float64    whether the truths are from float64; else from the reference's own dtype, as it cannot run in float64
    baselines  (file, level) -> the baselines that were measured so far
    """

    reference: Reference
    probes: Sequence[Probe]
    truths: Mapping[Key, Truth] = field(repr=False)
    precision: Precision
    dropped: Sequence[str] = ()
    passes: int = 0
    flat: frozenset[str] = frozenset()
    float64: bool = True
    baselines: dict[tuple[Path, str], Baseline] = field(default_factory=dict, repr=False)

    def truths_at(self, probe: Probe) -> dict[Key, Truth]:
        return {key: truth for key, truth in self.truths.items() if key.probe == probe.name}

    def at(self, names: Collection[str], *, sites: bool = True) -> Judgement:
        """The judgement at some of its probes. sites: whether the outputs of layers are compared, or only those of the model."""
        truths = {key: truth for key, truth in self.truths.items() if key.probe in names and key.site <= sites}
        return replace(self, probes=[probe for probe in self.probes if probe.name in names], truths=truths)

    def passed_on(self, candidate: nn.Module) -> Judgement:
        """The judgement without its reference, to free memory: a candidate that passed is run in its place from now on."""
        return replace(self, reference=Reference(candidate, self.reference.sites), baselines={})

    def by_key(self, probe: Probe, found: tuple[Values, Values]) -> Tensors:
        """The tensors of a run at a probe, by Key. Outputs of an ONNX file, which are known by position, get the reference's names."""
        outputs, sites = found
        names = [key.name for key in self.truths_at(probe) if not key.site]
        if any(name.startswith(BY_POSITION) for name in (*names, *outputs)):
            outputs = dict(zip([*names, *list(outputs)[len(names) :]], outputs.values(), strict=False))
        return keyed(probe, (outputs, sites))

    def in_float64(self, run: Runner, probes: Sequence[Probe] | None = None) -> Tensors:
        """The tensors of a float64 runner at all probes. probes: used in place of the judgement's, under the same names."""
        found: Tensors = {}
        for probe in self.probes if probes is None else probes:
            found |= self.by_key(probe, run(probe.in_float64()))
        return found
