"""What `normswap export` says: where the norms of an ONNX file went, and whether it runs on CUDA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normswap.report.parity import legs_json, legs_summary, parity_json
from normswap.report.words import by_text, listed

if TYPE_CHECKING:
    from normswap.export.cuda import Cuda
    from normswap.export.to_onnx import Export, Outcome


def export_facts(exported: Export) -> dict[str, Any]:
    """What the report of a conversion says of its ONNX file. docs/report.md documents it."""
    return {
        "target": exported.target,
        "opset": exported.opset,
        "dynamic_batch": exported.dynamic,
        "free_axes": list(dict.fromkeys(name for axes in exported.free for name in axes.values())),
        "nodes": dict(exported.nodes),
        "folded": list(exported.folded),
        "residue": list(exported.residue),
        "sites": fates_json(exported.sites),
        "skeleton": dict(exported.skeleton),
        "extra": dict(exported.extra),
        "cuda": None if exported.cuda is None else cuda_json(exported.cuda),
        "notes": list(exported.notes),
    }


def export_json(result: Export) -> dict[str, Any]:
    """What `normswap export` wrote and measured, as strict JSON."""
    return {
        "path": str(result.path),
        "target": result.target,
        "opset": result.opset,
        "residue": list(result.residue),
        "extra": dict(result.extra),
        "notes": list(result.notes),
        "cuda": None if result.cuda is None else cuda_json(result.cuda),
        "sites": fates_json(result.sites),
        "parity": None if result.parity is None else parity_json(result.parity),
        "legs": legs_json(result.legs.parities, result.legs.not_run),
    }


def export_summary(result: Export) -> str:
    """What was written, and what was measured. Plain text."""
    lines = [f"wrote {result.path}, opset {result.opset}", *legs_summary(result.legs.parities, result.legs.not_run)]
    lines += [f"  not folded: {site.name}, left as {' and '.join(site.left)}: {site.reason}" for site in result.sites if site.left]
    lines += [f"  cuda: {line}" for line in ([] if result.cuda is None else cuda_lines(cuda_json(result.cuda)))]
    return "\n".join([*lines, *(f"  note: {note}" for note in result.notes)])


def fates_json(sites: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Where each norm went. docs/report.md documents it."""
    return [{"name": site.name, "how": site.how, "into": list(site.into), "left": list(site.left), "reason": site.reason} for site in sites]


def residue_lines(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of the norms is left, and why. sites: as of `fates_json`."""
    left = [site for site in sites if site["left"]]
    gone = [f"{len(sites) - len(left)} of {len(sites)} calls of norms cost nothing"] if sites else []
    said = [(f"in the file as {' and '.join(site['left'])}: {site['reason']}", site["name"]) for site in left]
    return [*gone, *(f"{names} {text}" for text, names in by_text(said))]


def cuda_json(cuda: Cuda) -> dict[str, Any]:
    """What is known of the file on CUDA. docs/report.md documents it."""
    return {
        "status": cuda.status,
        "why": cuda.why,
        "table": cuda.table,
        "floating": cuda.floating,
        "without_kernel": [asdict(node) for node in cuda.without_kernel],
        "elsewhere": [] if cuda.run is None else list(cuda.run.elsewhere),
        "kernels": {} if cuda.run is None else dict(cuda.run.kernels),
    }


def cuda_lines(told: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    missing = [f"{node['op']} {node['node']} ({node['dtype']}, opset {node['opset']})" for node in told["without_kernel"]]
    has = f"{told['floating'] - len(missing)} of {told['floating']} floating-point nodes have a CUDA kernel, by onnxruntime's table"
    lines = {
        "not run": [f"not run: {told['why']}; {has}"],
        "passed": [f"ran, every floating-point node on CUDA; {has}"],
        "partly": [f"ran, but not on CUDA: {listed(told['elsewhere'])}; {has}"],
    }[told["status"]]
    return lines if not missing else [*lines, f"without a kernel: {listed(missing)}"]
