"""Every model of torchvision, converted and held against the original: what was found, what was swapped, what was not and why.

    python -m benchmarks.coverage                 measures what is missing, then writes results/coverage.json and docs/coverage.md
    python -m benchmarks.coverage --redo          measures again what was not clean
    python -m benchmarks.coverage --only 'resnet*' --redo
    python -m benchmarks.coverage --fresh         measures everything again
    python -m benchmarks.coverage --table         only writes the table of benchmarks/results/coverage.json again

Each model runs in a process of its own, so its memory is given back and a crash costs one row. A result is appended to
build/coverage.jsonl as soon as it is there; interrupted with Ctrl-C, the next run goes on where this one stopped.

Weights are random and statistics randomised (`fixtures.nets.randomise`), so that a swap that mixes up two channels or drops an eps cannot
hide. Inputs are as small as the model takes. A detector ends in a non-maximum suppression, whose output is discrete: it is converted
whole, and then its backbone and heads are held against the original's on one image (`Heads`), under the ordinary rule.
"""

# ruff: noqa: E402  torchvision can only be imported after the shim

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib
import inspect
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/support")] if str(ROOT / "tests/support") not in sys.path else []
importlib.import_module("torchvision_shim")  # before torchvision, which does not import without it on a CPU build of torch

from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from benchmarks import libraries
from benchmarks.libraries import LIBRARIES
from fixtures.nets import randomise
from normswap.api.convert import Conversion, convert_unchecked, plan
from normswap.api.request import Request
from normswap.detect.sites import Plan, Site, Skip, Swap
from normswap.parity.judge import compare, judge
from normswap.parity.result import Difference, Parity
from normswap.swap.apply import swap

RESULTS = ROOT / "build/coverage.jsonl"
RAW = ROOT / "benchmarks/results/coverage.json"
PAGE = ROOT / "docs/coverage.md"
BEGIN, END = "<!-- begin: python -m benchmarks.coverage -->", "<!-- end -->"
TIMEOUT = 900  # seconds for one model

Record = dict[str, Any]
Shape = tuple[int, ...]

# --- the models ------------------------------------------------------------------------------------------------------------------------

RCNN = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
ONE_STAGE = {"topk_candidates": 20, "detections_per_img": 5}
# By family, then by the first pattern that fits the name: the shapes of the inputs without their batch, and what the constructor needs
# to take them. A family's own entry stands for the rest of it.
FAMILIES: Mapping[str, tuple[Shape, ...]] = {
    "classification": ((3, 64, 64),),
    "quantization": ((3, 64, 64),),
    "segmentation": ((3, 64, 64),),
    "video": ((3, 4, 48, 48),),
    "detection": ((3, 64, 96),),
    "optical flow": ((3, 128, 128), (3, 128, 128)),  # 128 at least
}
SPECIAL: tuple[tuple[str, tuple[Shape, ...] | None, Mapping[str, Any]], ...] = (
    ("*inception_v3", ((3, 96, 96),), {}),  # 75 at least
    ("vit_h_14", ((3, 56, 56),), {"image_size": 56}),
    ("vit_*", None, {"image_size": 64}),
    ("maxvit_t", ((3, 224, 224),), {}),  # its windows of 7 divide 224 / 32 and nothing smaller
    ("s3d", ((3, 16, 224, 224),), {}),  # ends in a fixed average pool of (2, 7, 7)
    ("mvit_*", ((3, 16, 224, 224),), {}),  # its position embeddings have this size
    ("ssd*", None, ONE_STAGE),  # resizes to 300 or 320 whatever comes in
    ("*rcnn*", None, RCNN),
    ("fcos*", None, {"min_size": 64, "max_size": 96, **ONE_STAGE}),
    ("retinanet*", None, {"min_size": 64, "max_size": 96, **ONE_STAGE}),
)
# With trained weights torchvision builds these with FrozenBatchNorm2d in the backbone; without, with BatchNorm2d. Both are measured.
FROZEN_WHEN_TRAINED = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)
# Converted in train mode too: the plan and the parity have to be the same, every flag kept, and a training step possible at batch 1.
ALSO_IN_TRAIN_MODE = (
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "lraspp_mobilenet_v3_large",
    "maxvit_t",
    "mobilenet_v3_small",
    "r3d_18",
    "raft_large",
    "resnet18",
    "shufflenet_v2_x0_5",
    "vgg11_bn",
)
FROZEN, INT8 = " with frozen BatchNorm", " in int8"


class Case(NamedTuple):
    """One row of the table."""

    name: str
    family: str

    @property
    def model(self) -> str:
        """The name under which torchvision knows it."""
        return self.name.removesuffix(FROZEN).removesuffix(INT8)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def make(self) -> nn.Module:
        """The model in eval mode, with random weights and randomised statistics; the same every time."""
        builder = models.get_model_builder(self.model)
        _, options = self._inputs()
        options = dict(options)
        if "weights_backbone" in inspect.signature(builder).parameters:
            options["weights_backbone"] = None
        if self.name.endswith(INT8):
            options["quantize"] = True
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            model = cast(nn.Module, builder(weights=None, **options))
        if self.name.endswith(FROZEN):
            freeze(model.backbone.body)  # type: ignore[arg-type,union-attr]
        randomise(model, self.seed)
        return fill_zeros(model, self.seed).eval()

    def inputs(self) -> tuple[Any, ...]:
        """The arguments of one call: a batch of one, or a list of one image for a detector."""
        shapes, _ = self._inputs()
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.family == "detection":
            return ([torch.rand(shapes[0], generator=generator)],)
        tensors = tuple(torch.randn((1, *shape), generator=generator) for shape in shapes)
        return (*tensors, 2) if self.family == "optical flow" else tensors  # RAFT: two refinements instead of twelve

    def _inputs(self) -> tuple[tuple[Shape, ...], Mapping[str, Any]]:
        special = ((shapes, options) for pattern, shapes, options in SPECIAL if fnmatch.fnmatchcase(self.model, pattern))
        shapes, options = next(special, (None, {}))
        return shapes or FAMILIES[self.family], options


def cases() -> list[Case]:
    """Every model that torchvision lists, in its order within a family; then the variants that its builders hide."""
    found = []
    for name in models.list_models():
        package = models.get_model_builder(name).__module__.split(".")[2]  # torchvision.models.<package>...
        family = package.replace("_", " ") if package.replace("_", " ") in FAMILIES else "classification"
        found.append(Case(name, family))
        if name in FROZEN_WHEN_TRAINED:
            found.append(Case(name + FROZEN, family))
        if family == "quantization":
            found.append(Case(name + INT8, family))
    return sorted(found, key=lambda case: list(FAMILIES).index(case.family))


def freeze(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by a FrozenBatchNorm2d, as torchvision's builders do when they load weights."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(child.num_features, eps=child.eps))


def fill_zeros(model: nn.Module, seed: int) -> nn.Module:
    """Draw the weights that are initialised to zero (the head of a ViT): behind one, every input gives the same output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


class Heads(nn.Module):
    """A detector from a batch of images to what its heads compute, before anything discrete: no resizing, no top-k, no suppression.

    The box, mask and keypoint heads look at the same boxes, whatever the rest of the model proposes.
    """

    BOXES = ((0.1, 0.1, 0.6, 0.7), (0.3, 0.2, 0.9, 0.9), (0.0, 0.0, 1.0, 1.0))  # as fractions of width and height

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Any]:
        detector = cast(Any, self.detector)
        features = detector.backbone(images)
        features = {"0": features} if isinstance(features, Tensor) else dict(features)
        found: dict[str, Any] = {"features": features}
        if hasattr(detector, "head"):  # RetinaNet, FCOS, SSD
            found["head"] = detector.head(list(features.values()))
        if hasattr(detector, "rpn"):
            found["rpn"] = detector.rpn.head(list(features.values()))
            height, width = images.shape[-2:]
            boxes = images.new_tensor(self.BOXES) * images.new_tensor([width, height, width, height])
            per_image, sizes = [boxes] * len(images), [(height, width)] * len(images)
            roi = detector.roi_heads
            found["box"] = roi.box_predictor(roi.box_head(roi.box_roi_pool(features, per_image, sizes)))
            for part in ("mask", "keypoint"):
                if getattr(roi, f"{part}_head", None) is not None:
                    pooled = getattr(roi, f"{part}_roi_pool")(features, per_image, sizes)
                    found[part] = getattr(roi, f"{part}_predictor")(getattr(roi, f"{part}_head")(pooled))
        return found


# --- one model -------------------------------------------------------------------------------------------------------------------------

# The independent count: which classes are norms, and which kernel of torch each kind ends in.
BATCH_NORMS = (_BatchNorm, FrozenBatchNorm2d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.RMSNorm)
KINDS = {"batch": _BatchNorm, "layer": nn.LayerNorm, "group": nn.GroupNorm, "instance": _InstanceNorm, "rms": nn.RMSNorm}
KERNELS = {
    torch.ops.aten.native_batch_norm.default: "batch",
    torch.ops.aten._native_batch_norm_legit.default: "batch",
    torch.ops.aten._native_batch_norm_legit_no_training.default: "batch",
    torch.ops.aten.native_layer_norm.default: "layer",
    torch.ops.aten.native_group_norm.default: "group",
    torch.ops.aten._fused_rms_norm.default: "rms",
}


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the normalization kernels that a forward pass really runs, below every module and function."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if kind := KERNELS.get(func):
            # an instance norm is a batch norm kernel in training mode over the batch's channels
            self.counts["instance" if kind == "batch" and args[5] is True else kind] += 1
        return func(*args, **(kwargs or {}))


def kernels(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, int]:
    with torch.no_grad(), Kernels() as counter:
        model(*arguments)
    return dict(sorted(counter.counts.items()))


def kernel_of(site: Site) -> str | None:
    """The kernel that a site ends in; None for FrozenBatchNorm2d, which is arithmetic."""
    for kind, cls in KINDS.items():
        if isinstance(site.module, cls) or (site.function or "").endswith(f"{kind}_norm"):
            return kind
    return None


def measure(case: Case) -> Record:
    """Convert one model and hold it against the original. `findings` is empty if nothing at all is amiss."""
    started = time.monotonic()
    torch.manual_seed(0)
    model, arguments = case.make(), case.inputs()
    before = time.monotonic()
    record: Record = {"name": case.name, "family": case.family, "input": _shapes(arguments), "findings": []}
    findings: list[str] = record["findings"]
    decided, converted = _convert(case, model, arguments, record)
    record["seconds"] = round(time.monotonic() - before, 1)

    record |= _counted(model, decided, findings)
    ran, planned = kernels(model, arguments), _planned_calls(decided)
    record |= {"kernels": ran, "calls": planned}
    if ran != planned:
        findings.append(f"a forward pass runs the normalization kernels {ran}, the plan has {planned}")
    if converted is not None:
        kept = {id(s.site.module) for s in decided.skips}
        names = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in kept}
        left = [name for name, m in converted.named_modules(remove_duplicate=False) if isinstance(m, BATCH_NORMS) and name not in names]
        if left:
            findings.append(f"{len(left)} BatchNorms are still there after the swap, {left[0]} the first")
        record["kernels after"] = kernels(converted, arguments)
        if record["kernels after"].get("batch", 0) > sum(s.calls or 0 for s in decided.skips if kernel_of(s.site) == "batch"):
            findings.append(f"a forward pass of the converted model still runs batch norm kernels: {record['kernels after']}")
    del converted
    gc.collect()
    if case.model in ALSO_IN_TRAIN_MODE and case.model == case.name:
        record["train mode"] = _in_train_mode(model, arguments, decided, findings)
    return record | {
        "clean": not findings,
        "seconds in all": round(time.monotonic() - started, 1),
        "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def _convert(case: Case, model: nn.Module, arguments: tuple[Any, ...], record: Record) -> tuple[Plan, nn.Module | None]:
    findings: list[str] = record["findings"]
    parity: Record | None = None
    try:
        conversion = convert_unchecked(model, Request(example_inputs=arguments, coupling="none"))
    except Exception as error:  # whatever it is, it is the finding, unless a detector is merely undecided
        decided = plan(model, arguments)
        if case.family == "detection" and "in float64 and" in str(error):  # the original finds another number of boxes in float64
            converted, whole = swap(model, decided), {"passed": False, "why not": [str(error)]}
        else:
            findings.append(f"convert raised {type(error).__name__}: {error}")
            converted = None
    else:
        decided, converted, parity = conversion.plan, conversion.model, measured(conversion.parity)
        if case.family == "detection":
            whole = parity | {"why not": [] if conversion.parity else _explained(model, conversion, findings)}
    if case.family == "detection" and converted is not None:
        record["whole"] = whole
        resized = cast(Any, model).transform(arguments[0])[0].tensors
        heads, sites = Heads(model).eval(), [f"detector.{s.name}" for s in decided.swaps]
        if unseen := _unseen(heads, resized):
            findings.append(f"the comparison of the heads does not reach {len(unseen)} layers, {unseen[0]} the first")
        parity = measured(compare(judge(heads, (resized,), {}, sites=sites), Heads(converted).eval()))
        parity["of"] = f"backbone and heads on {_shapes((resized,))}"
    if parity is not None and not parity["passed"]:
        findings.append(f"parity failed, first at {parity['first bad']}")
    record |= {"backend": decided.backend, "notes": list(decided.notes), "parity": parity}
    return decided, converted


def _unseen(heads: Heads, images: Tensor) -> list[str]:
    """The layers with parameters or statistics that `heads` does not run."""
    own = {m: name for name, m in heads.named_modules() if any(True for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False)))}
    seen: set[nn.Module] = set()
    handles = [module.register_forward_hook(lambda module, *_: seen.add(module)) for module in own]
    with torch.no_grad():
        heads(images)
    for handle in handles:
        handle.remove()
    return [name for module, name in own.items() if module not in seen]


def _explained(model: nn.Module, conversion: Conversion[nn.Module], findings: list[str]) -> list[str]:
    """Why a whole detector fails: for each output and layer, how far off the original itself is there. Where it is not: a finding."""
    probes = {p.name: p for p in conversion.judgement.probes}
    explanations = []
    for bad in (*conversion.parity.outputs, *conversion.parity.sites):
        if bad.passed:
            continue
        what = f"{bad.name} at the probe {bad.probe!r}: error {bad.max_rel:.1e}"
        if bad.problem is None and bad.non_finite == 0 and bad.max_rel <= 10 * bad.noise:
            explanations.append(f"{what}; the original in float32 is {bad.noise:.1e} from itself in float64")
        elif (moved := _moved(model, probes[bad.probe].args[0])) is None or moved >= bad.max_rel / 10:
            by = "the number of its boxes" if moved is None else f"{moved:.1e}"
            explanations.append(f"{what}; the original changes by {by} when the image changes by 1e-6")
        else:
            findings.append(f"whole model: {what} ({bad.problem}), but the original moves by {moved:.1e} only")
    if conversion.parity.failure:
        findings.append(f"whole model: {conversion.parity.failure}")
    return explanations


def _moved(model: nn.Module, images: list[Tensor]) -> float | None:
    """The most that an output of a detector changes, relative to its largest value, when the image changes by 1e-6; None for a shape."""

    def run(factor: float) -> list[Tensor]:
        with torch.no_grad():
            return [leaf.double() for leaf in tree_leaves(model([image * factor for image in images]))]

    first, most = run(1.0), 0.0
    for factor in (1 + 1e-6, 1 - 1e-6, 1 + 3e-7, 1 - 3e-7):
        second = run(factor)
        if [t.shape for t in first] != [t.shape for t in second]:
            return None
        most = max([most, *(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(first, second, strict=True) if a.any())])
    return most


def measured(parity: Parity) -> Record:
    """What a Parity says, in one row: the output that uses most of its limit, and the layer that does."""

    def share(difference: Difference) -> float:
        if difference.max_rel <= difference.tolerance == 0:  # integers are equal or wrong
            return 0.0
        limited = difference.tolerance > 0 and difference.max_rel == difference.max_rel
        return difference.max_rel / difference.tolerance if limited else float("inf")

    def row(differences: Sequence[Difference]) -> Record | None:
        if not differences:
            return None
        d = max(differences, key=share)
        numbers = {k: _number(v) for k, v in (("max_rel", d.max_rel), ("tolerance", d.tolerance), ("noise", d.noise))}
        return {"name": d.name, "probe": d.probe, **numbers, "non_finite": d.non_finite, "problem": d.problem}

    return {
        "passed": parity.passed,
        "outputs": len(parity.outputs),
        "worst output": row(parity.outputs),
        "worst layer": row(parity.sites),
        "first bad": parity.first_bad,
        "failure": parity.failure,
        "dropped": list(parity.dropped),
        "forward passes": parity.forward_passes,
    }


def everything(decided: Plan) -> list[Swap | Skip]:
    return [*decided.swaps, *decided.skips]


def _counted(model: nn.Module, decided: Plan, findings: list[str]) -> Record:
    """The plan against an independent count of the model's norms, by identity."""
    planned = {id(d.site.module): d for d in everything(decided) if d.site.module is not None}
    names = {id(m): name for name, m in model.named_modules()}
    norms = {id(m): m for m in model.modules() if isinstance(m, NORMS)}
    missing = [names[key] for key in norms if key not in planned]
    if missing:
        findings.append(f"{len(missing)} norms are not in the plan, {missing[0]} the first")
    batch = [key for key, m in norms.items() if isinstance(m, BATCH_NORMS)]
    swapped = {id(s.site.module) for s in decided.swaps}
    if left := [names[key] for key in batch if key not in swapped]:
        findings.append(f"{len(left)} BatchNorms are not swapped, {left[0]} the first")
    other = [d for key, d in planned.items() if key not in norms]
    if other:
        findings.append(f"{len(other)} modules in the plan are not norms, {other[0].name} the first: {type(other[0].site.module).__name__}")
    return {
        "norms": dict(sorted(Counter(type(m).__name__ for m in norms.values()).items())),
        "batch norms": len(batch),
        "swapped": len(swapped),
        "skipped": dict(sorted(Counter(f"{s.kind}: {s.reason}" for s in decided.skips).items())),
        "producers": sum(s.producer is not None for s in decided.swaps),
        "missing": missing,
    }


def _planned_calls(decided: Plan) -> dict[str, int]:
    calls: Counter[str] = Counter()
    for d in everything(decided):
        if (kind := kernel_of(d.site)) and d.calls:
            calls[kind] += d.calls
    return dict(sorted(calls.items()))


def _in_train_mode(model: nn.Module, arguments: tuple[Any, ...], in_eval: Plan, findings: list[str]) -> Record:
    model.train()
    conversion = convert_unchecked(model, Request(example_inputs=arguments, coupling="none"))
    flags = {name: m.training for name, m in model.named_modules()} == {
        name: m.training for name, m in conversion.model.named_modules() if name in dict(model.named_modules())
    }
    same = [s.name for s in conversion.plan.swaps] == [s.name for s in in_eval.swaps]
    loss = sum(t.float().mean() for t in tree_leaves(conversion.model(*arguments)) if isinstance(t, Tensor))
    cast(Tensor, loss).backward()  # type: ignore[no-untyped-call]
    finite = all(bool(p.grad.isfinite().all()) for p in conversion.model.parameters() if p.grad is not None)
    result = {"passed": conversion.parity.passed, "same plan": same, "flags kept": flags, "a step at batch 1 has finite gradients": finite}
    findings += [f"in train mode: not {what}" for what, holds in result.items() if not holds]
    return result


def _number(value: float) -> float | None:
    return float(f"{value:.3g}") if abs(value) < float("inf") else None


def _shapes(arguments: Iterable[Any]) -> str:
    return ", ".join("x".join(map(str, leaf.shape)) if isinstance(leaf, Tensor) else str(leaf) for leaf in tree_leaves(tuple(arguments)))


# --- all of them -----------------------------------------------------------------------------------------------------------------------


def recorded() -> dict[str, Record]:
    """The last result of each model; a line that was cut short counts as none."""
    found: dict[str, Record] = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["name"]] = record
    return found


class Sweep:
    """Measures cases in `jobs` processes at a time, and can be stopped."""

    def __init__(self, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self.running: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def one(self, case: Case) -> Record | None:
        with self.lock:
            if self.stopped:
                return None
            # A group of its own: Ctrl-C reaches this process only, which then ends its children itself.
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.coverage", "--one", case.name, "--threads", str(self.threads)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self.running.add(child)
        try:
            out, err = child.communicate(timeout=TIMEOUT)
            why = f"the process ended with {child.returncode}: {(err.strip().splitlines() or ['nothing on stderr'])[-1]}"
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
            why = f"took more than {TIMEOUT} s"
        finally:
            with self.lock:
                self.running.discard(child)
        if self.stopped:
            return None
        if child.returncode == 0 and out.strip():
            return cast(Record, json.loads(out.strip().splitlines()[-1]))
        return {"name": case.name, "family": case.family, "findings": [why], "clean": False}

    def run(self, todo: Sequence[Case]) -> None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        started, done = time.monotonic(), 0
        with ThreadPoolExecutor(self.jobs) as pool, RESULTS.open("a") as results:
            pending: set[Future[Record | None]] = {pool.submit(self.one, case) for case in todo}
            try:
                while pending:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for record in (future.result() for future in finished):
                        if record is None:
                            continue
                        results.write(json.dumps(record | {"commit": commit()}) + "\n")
                        results.flush()
                        done += 1
                        spent = time.monotonic() - started
                        left = spent / done * (len(todo) - done)
                        state = "clean" if record["clean"] else "; ".join(record["findings"])
                        took = record.get("seconds in all", "-")
                        say(f"[{done}/{len(todo)}, {left / 60:.0f} min left] {record['name']}: {state} ({took} s)")
            except KeyboardInterrupt:
                self.stop()
                for future in pending:
                    future.cancel()
                say(f"stopped after {done} of {len(todo)}; the next run goes on from there")
                raise

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.send_signal(signal.SIGKILL)


def commit() -> str:
    """The commit that is measured, with a + if the package was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "normswap") else "")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the page --------------------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "machine": f"{platform.system()} {platform.machine()}, {cpu}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "torchvision")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(raw: Record) -> str:
    """The table of docs/coverage.md, from benchmarks/results/coverage.json."""
    records: list[Record] = raw["records"]
    where = ", ".join(f"{key} {value}" if key != "machine" else value for key, value in raw["environment"].items())
    numbers = {reason: i + 1 for i, reason in enumerate(sorted({r for record in records for r in record.get("skipped", {})}))}
    swapped, found = (sum(r.get(key, 0) for r in records) for key in ("swapped", "batch norms"))
    kept = sum(sum(r.get("skipped", {}).values()) for r in records)
    clean = sum(r["clean"] for r in records)
    lines = [
        f"{clean} of {len(records)} rows are clean: {swapped} of {found} BatchNorms swapped, {kept} other norms listed and kept, parity",
        f"within the rule. Measured at {', '.join(sorted({r.get('commit', '?') for r in records}))} on {where}.",
        "",
    ]
    for family in FAMILIES:
        rows = [r for r in records if r["family"] == family]
        if not rows:
            continue
        lines += [
            f"### {family[0].upper()}{family[1:]}",
            "",
            "| model | input | back-end | BatchNorms | swapped | kept, why | parity | error | limit | noise | s |",
            "|---|---|---|--:|--:|---|---|--:|--:|--:|--:|",
            *(_row(r, numbers) for r in rows),
            "",
            *_whole(rows),
        ]
    lines += ["Kept, why:", "", *(f"{number}. {reason}" for reason, number in numbers.items()), ""]
    findings = [r for r in records if not r["clean"]]
    if findings:
        lines += ["Not clean:", "", *(f"* {r['name']}: {'; '.join(r['findings'])}" for r in findings), ""]
    return "\n".join(lines)


def _whole(rows: Sequence[Record]) -> list[str]:
    """How detectors compare with their discrete output and all."""
    whole = {r["name"]: r["whole"] for r in rows if "whole" in r}
    if not whole:
        return []
    passed = sum(w["passed"] for w in whole.values())
    others = [f"* {name}: {w['why not'][0]}" for name, w in whole.items() if not w["passed"]]
    return [
        f"As a whole, to the boxes that come out, {passed} of {len(whole)} pass. For the others, the first output that differs:",
        "",
        *others,
        "",
    ]


def _row(record: Record, numbers: Mapping[str, int]) -> str:
    parity = record.get("parity") or {}
    worst = parity.get("worst output") or {}
    kept = ", ".join(f"{count} ({numbers[reason]})" for reason, count in record.get("skipped", {}).items())
    state = "-" if not parity else ("passed" if parity["passed"] else "failed")
    if "of" in parity:
        state += " (heads)"
    if any(text.startswith("float64") for text in parity.get("dropped", ())):
        state += " (own dtype)"
    cells = (
        record["name"],
        record.get("input", "-"),
        record.get("backend", "-"),
        record.get("batch norms", "-"),
        record.get("swapped", "-"),
        kept,
        state,
        *(f"{worst[key]:.1e}" if worst.get(key) is not None else "-" for key in ("max_rel", "tolerance", "noise")),
        record.get("seconds", "-"),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def write(records: Mapping[str, Record]) -> None:
    """Write benchmarks/results/coverage.json, one record per line, and the table into docs/coverage.md."""
    order = [case.name for case in cases()]
    raw: Record = {"environment": environment(), "records": [records[name] for name in order if name in records]}
    lines = ",\n".join(json.dumps(record) for record in raw["records"])
    _replace(RAW, f'{{"environment": {json.dumps(raw["environment"])},\n"records": [\n{lines}\n]}}\n')
    write_table()


def write_table() -> None:
    page = PAGE.read_text()
    body = table(json.loads(RAW.read_text()))
    _replace(PAGE, re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{body}{END}", page, flags=re.DOTALL))


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text)
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", nargs="?", default="torchvision", choices=("torchvision", *LIBRARIES), help="whose models")
    parser.add_argument("--choose", action="store_true", help="look for the smallest model of each family again (timm)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="the rows to measure")
    parser.add_argument("--redo", action="store_true", help="measure again what was not clean; with --only, all that it names")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results first")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads for each model")
    parser.add_argument("--table", action="store_true", help="write the table of benchmarks/results/coverage.json again, measure nothing")
    parser.add_argument("--one", metavar="ROW", help="measure one row in this process and print its record")
    asked = parser.parse_args(arguments)
    if asked.library != "torchvision":
        return libraries.run(asked.library, asked, commit(), say)
    if asked.one:
        torch.set_num_threads(asked.threads)
        print(json.dumps(measure(next(case for case in cases() if case.name == asked.one))))
        return 0
    if asked.table:
        write_table()
        return 0
    if asked.fresh:
        RESULTS.unlink(missing_ok=True)
    known = recorded()
    named = [case for case in cases() if fnmatch.fnmatchcase(case.name, asked.only)]
    again = {name for name, record in known.items() if asked.redo and (asked.only != "*" or not record["clean"])}
    todo = [case for case in named if case.name not in known or case.name in again]
    say(f"{len(todo)} of {len(named)} rows to measure")
    try:
        Sweep(asked.jobs, asked.threads).run(todo)
    except KeyboardInterrupt:
        return 130
    write(recorded())
    return 0 if all(record["clean"] for record in recorded().values()) else 1


if __name__ == "__main__":
    sys.exit(main())
