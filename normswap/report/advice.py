"""The sentences at the top of the page: what the verdict rests on, why a conversion failed and what to do, and how to load the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from normswap.parity.result import Difference, Parity
from normswap.report.conversion import Report
from normswap.report.parity import USABLE, worst_of
from normswap.report.words import ROOT, figure

DRIFT = "drift"  # the comparison of an approximate model with its original
_BUILT_BY_NAME = ("torchvision:", "timm:", "hf:")


class Code(NamedTuple):
    """A block of code to copy, and what it is for."""

    title: str
    text: str


def basis(report: Report) -> str:
    """What the verdict rests on, in a sentence; empty if nothing was measured, or it failed."""
    if report.status != "converted":
        return ""
    drift = report.parities.get(DRIFT)
    if drift is not None:
        measured = "Measured on the calibration data, relative to the largest output."
        if report.healing is not None:
            before, after = (figure(distance) for distance in (report.healing.before, report.healing.after))
            healed = f"Healed: the distance to the original on held-out data went from {before} to {after} of what the outputs vary by."
            return f"{measured} {healed}"
        if drift.max_rel > USABLE:
            return f"{measured} That is too far to use it as it is: normswap heal trains it, normswap sensitivity finds layers to exclude."
        return f"{measured} It is another function than the original: judge it by what your model is for."
    worst = worst_of(d for parity in report.parities.values() for d in parity.outputs)
    if worst is None or not worst.tolerance:
        return ""
    places = " and ".join(dict.fromkeys(name.partition(" ")[0] for name in report.parities))
    error, noise = (max(numbers) for numbers in zip(*((parity.max_rel, parity.noise) for parity in report.parities.values()), strict=True))
    return (
        f"The same function. In {places}, no output is further from the original than {figure(error)} of its largest value; "
        f"the original's own rounding reaches {figure(noise)}. The closest to a limit uses {worst.max_rel / worst.tolerance:.0%} of it."
    )


def share(value: float) -> str:
    """An error as a percentage where that is easier to read than a power of ten."""
    return f"{value:.0%}" if 0.01 <= value < 10 else f"{value:.1%}" if 0.001 <= value < 10 else figure(value)


def causes(report: Report) -> list[str]:
    """Why the conversion failed: for each failed comparison what, where, expected against found."""
    return [f"{name}: {_cause(parity)}" for name, parity in report.parities.items() if not parity.passed]


def _cause(parity: Parity) -> str:
    if parity.failure is not None:
        return parity.failure
    bad = _first_bad(parity)
    if bad is None:
        return "nothing was compared"
    what = "output" if any(bad is d for d in parity.outputs) else "layer"
    where = f"first at the {what} {bad.name or ROOT}, at the input {bad.probe!r}"
    if bad.problem is not None:
        return f"{where}: {bad.problem}"
    if bad.non_finite:
        return f"{where}: {bad.non_finite} values are infinite or not a number in only one of the two models"
    ran = "run in float64, where rounding is no excuse, " if bad.float64 else ""
    noise = "" if bad.float64 or not math.isfinite(bad.noise) else f"; the original's own rounding is {figure(bad.noise)}"
    after = sum(not d.passed for d in parity.sites) - 1 if what == "layer" else 0
    also = (
        f"; {after} {'layer' if after == 1 else 'layers'} after it differ{'s' * (after == 1)} too, perhaps because of it" if after else ""
    )
    return f"{where}: {ran}the error is {figure(bad.max_rel)} of the largest value, where {figure(bad.tolerance)} is allowed{noise}{also}"


def _first_bad(parity: Parity) -> Difference | None:
    return next((d for d in (*parity.sites, *parity.outputs) if not d.passed), None)


def remedies(report: Report) -> list[str]:
    """What to do next about a conversion that failed."""
    return list(
        dict.fromkeys(advice for name, parity in report.parities.items() if not parity.passed for advice in _remedies(name, parity))
    )


def _remedies(name: str, parity: Parity) -> Iterator[str]:
    bad = _first_bad(parity)
    layer = None if bad is None or all(bad is not d for d in parity.sites) else bad.name
    if bad is not None and (bad.unjudged is not None or (bad.problem is not None and "judged" in bad.problem)):
        yield "Give inputs like those that the model was trained on: --input FILE, or example_inputs=... in Python."
        return
    if name == DRIFT:
        yield "Keep the layers that cost most: normswap sensitivity measures each, and --exclude leaves them out."
        yield "Calibrate on more data, or raise --max-drift if this distance is good enough for what the model is for."
        return
    if layer is not None:
        yield f"Convert without this layer: --exclude {layer!r}. It then stays as it is."
    if name != "torch":
        yield "Convert without an ONNX file: --no-onnx. The PyTorch model passed."
    yield "If the layer comes from a rule of your own, check its formula. If not, report this with the architecture of the model."


def loading(report: Report) -> list[Code]:
    """How to use what was written; empty if no model was."""
    files, directory = set(report.files), report.directory or "DIR"
    found = []
    if "recipe.json" in files:
        arguments = [repr(directory)]
        comment = ""
        if "model.pt2" in files or ("model.pt" in files and report.trust):
            arguments.append("trust=True")
        elif "model.pt" in files and report.trust_packages:
            arguments.append(f"trust_packages={list(report.trust_packages)!r}")
        elif "model.pt" not in files and not report.source.startswith(_BUILT_BY_NAME):
            arguments.append("factory")
            comment = "  # factory: the function that builds your architecture"
        found.append(Code("In Python", f"import normswap\n\nmodel = normswap.load({', '.join(arguments)}){comment}\n"))
    if "model.onnx" in files and report.onnx is not None:
        feeds = ", ".join(f"{name!r}: {name if name.isidentifier() else 'x'}" for name in report.onnx.input_names)
        path = repr(f"{directory.rstrip('/')}/model.onnx")
        session = f"session = onnxruntime.InferenceSession({path})\noutputs = session.run(None, {{{feeds}}})"
        found.append(Code("In onnxruntime", f"import onnxruntime\n\n{session}\n"))
    return found
