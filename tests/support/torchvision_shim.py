"""torchvision from PyPI on a CPU-only torch lacks its compiled operators: without these two schemas it cannot even be imported.

`import torchvision_shim` (before torchvision) declares them, once, and gives `nms` a plain-torch CPU kernel so that detectors run.
With a torchvision whose own operators load, this does nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys

import torch


def _greedy_nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """The definition: keep the best box, drop every other that overlaps it by more than the threshold, repeat."""
    areas = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while order.numel() > 0:
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(dets[rest, :2], dets[best, :2])
        high = torch.minimum(dets[rest, 2:], dets[best, 2:])
        overlap = (high - low).clamp(min=0).prod(1)
        order = rest[overlap / (areas[rest] + areas[best] - overlap) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)


def _install() -> torch.library.Library | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:  # a matching build brings its own operators
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _greedy_nms, "CPU")
    importlib.import_module("torchvision.ops")
    # Only nms: `torchvision.extension._has_ops` stays False, so roi_align goes on using torchvision's own plain-torch form, here
    # as it is written rather than sent through torch.compile, which wants a C++ compiler.
    sys.modules["torchvision.ops.boxes"].__dict__["_assert_has_ops"] = lambda: None
    align = sys.modules["torchvision.ops.roi_align"].__dict__
    align["_roi_align"] = inspect.unwrap(align["_roi_align"])
    return library


LIBRARY = _install()  # kept: a Library that is collected takes its operators with it
