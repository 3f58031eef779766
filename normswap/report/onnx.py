"""The reports of `normswap export` and `normswap fold`: where each norm of an ONNX file was folded, and whether the file runs on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normswap.errors import listed
from normswap.report.parity import comparisons_json, comparisons_summary, parity_json
from normswap.report.tables import Listing, table
from normswap.report.words import attributes, by_text, text_of
from normswap.versions import versions

if TYPE_CHECKING:
    from normswap.export.any_file import Folded
    from normswap.export.cuda import Cuda
    from normswap.export.to_onnx import Export

FOLD_VERSION = 1
WAYS = {
    "": "stays",
    "into_producer": "into the layer before it",
    "into_consumers": "into what reads it",
    "stream_shift": "into what reads it and what comes before",
    "threshold": "through a ReLU into what reads it",
    "into_producers": "into all that comes before it",
    "rmsnorm": "its mean into all that comes before it",
}


# -- export ------------------------------------------------------------------------------------------------------------------


def export_facts(exported: Export) -> dict[str, Any]:
    """The part of a conversion's report about its ONNX file, as strict JSON. docs/report.md documents it."""
    return {
        **attributes(exported, "target", "opset"),
        "dynamic_batch": exported.dynamic,
        "free_axes": list(dict.fromkeys(name for axes in exported.free for name in axes.values())),
        **attributes(exported, "nodes", "folded", "residue"),
        "sites": outcomes_json(exported),
        **attributes(exported, "skeleton", "extra"),
        "cuda": cuda_json(exported.cuda),
        **attributes(exported, "notes"),
    }


def export_json(result: Export) -> dict[str, Any]:
    """The file of `normswap export` and its measurement, as strict JSON."""
    return {
        "path": str(result.path),
        **attributes(result, "target", "opset", "residue", "extra", "notes"),
        "cuda": cuda_json(result.cuda),
        "sites": outcomes_json(result),
        **_measured(result),
    }


def export_summary(result: Export) -> str:
    """The file that was written and its measurement, as plain text."""
    lines = [f"wrote {result.path}, opset {result.opset}", *comparisons_summary(result.comparisons.parities, result.comparisons.not_run)]
    lines += [f"  not folded: {site.name}, left as {' and '.join(site.left)}: {site.reason}" for site in result.sites if site.left]
    lines += [f"  cuda: {line}" for line in cuda_lines(result.cuda)]
    return text_of([*lines, *(f"  note: {note}" for note in result.notes)])


# -- fold --------------------------------------------------------------------------------------------------------------------


def fold_json(source: str, result: Folded) -> dict[str, Any]:
    """The result of folding one ONNX file, as strict JSON. docs/report.md documents it."""
    return {
        "version": FOLD_VERSION,
        "status": "folded" if result.changed else "rolled back" if result.rolled_back else "nothing to fold",
        "source": source,
        "path": str(result.path),
        "nodes_before": dict(result.before),
        **attributes(result, "nodes", "bytes_before", "bytes"),
        "sites": outcomes_json(result),
        "layer_norms": None if result.layer_norms is None else list(result.layer_norms),
        **attributes(result, "notes"),
        **_measured(result),
        "versions": versions(),
    }


def fold_summary(result: Folded) -> str:
    """The result of folding one ONNX file, as plain text."""
    asked = frozenset(result.layer_norms or ())
    sites = [site for site in result.sites if site.name not in asked]
    gone = sum(not site.left for site in sites)
    before, after = (sum(nodes.values()) for nodes in (result.before, result.nodes))
    unchanged = "nothing was folded: what could be was rolled back, as it did not pass" if result.rolled_back else "nothing to fold"
    lines = [f"folded {gone} of {len(sites)}: {before} nodes before, {after} after" if result.changed else unchanged]
    if result.layer_norms is not None:
        made = sum(site.name in asked and bool(site.how) for site in result.sites)
        lines.append(f"  {made} of {len(asked)} LayerNorms became RMSNorm")
    lines += comparisons_summary(result.comparisons.parities, result.comparisons.not_run)
    lines += [f"  note: {note}" for note in result.notes]
    return text_of([*lines, f"  {'wrote' if result.changed else 'copied to'} {result.path}"])


def fold_table(result: Folded) -> Listing:
    """A table with one row for each norm, and for each chain of products and sums with constants."""
    rows = ((site.name, WAYS[site.how], ", ".join(site.left), site.reason) for site in result.sites)
    return table(("site", "what", "left", "why"), rows, below=("why",))


def operators_table(result: Folded) -> Listing:
    """A table of how often each operator occurs before and after, like onnxslim's, even if nothing was changed."""
    both = (result.before, result.nodes)
    names = dict.fromkeys((*result.before, *result.nodes))
    rows = ((name, *(str(nodes.get(name, 0)) for nodes in both)) for name in names)
    totals = [
        ("all operators", *(str(sum(nodes.values())) for nodes in both)),
        ("file", *(f"{size / 1000:,.1f} kB" for size in (result.bytes_before, result.bytes))),
    ]
    return table(("operator", "before", "after"), rows, numbers=("before", "after"), totals=totals)


# -- both --------------------------------------------------------------------------------------------------------------------


def outcomes_json(result: Export | Folded) -> list[dict[str, Any]]:
    """The outcome of each norm of an ONNX file, as strict JSON. docs/report.md documents it."""
    return [attributes(site, "name", "how", "into", "left", "reason") for site in result.sites]


def residue_lines(exported: Export) -> list[str]:
    """The norms that are left in an ONNX file, and why, in words."""
    total, left = len(exported.sites), [site for site in exported.sites if site.left]
    gone = [f"{total - len(left)} of {total} calls of norms cost nothing"] if total else []
    remarks = [(f"in the file as {' and '.join(site.left)}: {site.reason}", site.name) for site in left]
    return [*gone, *(f"{names} {text}" for text, names in by_text(remarks))]


def cuda_json(cuda: Cuda | None) -> dict[str, Any] | None:
    """How an ONNX file runs on CUDA, as strict JSON. docs/report.md documents it."""
    if cuda is None:
        return None
    ran = {"elsewhere": [], "kernels": {}} if cuda.run is None else attributes(cuda.run, "elsewhere", "kernels")
    return {**attributes(cuda, "status", "why", "table", "floating", "without_kernel"), **ran}


def cuda_lines(cuda: Cuda | None) -> list[str]:
    """How an ONNX file runs on CUDA, in words."""
    if cuda is None:
        return []
    missing = [str(node) for node in cuda.without_kernel]
    has = f"{cuda.floating - len(missing)} of {cuda.floating} floating-point nodes have a CUDA kernel, by onnxruntime's table"
    if cuda.run is None:
        ran = f"not run: {cuda.why}"
    else:
        ran = "ran, every floating-point node on CUDA" if cuda.status == "passed" else f"ran, but not on CUDA: {listed(cuda.run.elsewhere)}"
    return [f"{ran}; {has}", *([f"without a kernel: {listed(missing)}"] if missing else [])]


def _measured(result: Export | Folded) -> dict[str, Any]:
    return {
        "parity": None if result.parity is None else parity_json(result.parity),
        "legs": comparisons_json(result.comparisons.parities, result.comparisons.not_run),
    }
