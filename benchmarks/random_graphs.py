"""Random networks (fixtures/random_graphs.py), planned and converted: is every norm in the plan, and is every BatchNorm exact?

    python -m benchmarks.random_graphs                 2,000 graphs from seed 0, then benchmarks/results/random_graphs.json and coverage.md
    python -m benchmarks.random_graphs --seed 1 --count 500
    python -m benchmarks.random_graphs --show 17       prints graph 17 of the seed, and what is found

A result is appended to build/random_graphs.jsonl as soon as it is there; interrupted with Ctrl-C, the next run goes on where this one
stopped, and tries again what had a finding.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fixtures.random_graphs import Expected, RandomGraph, generate
from normswap.api.convert import convert_unchecked, plan
from normswap.api.request import Request
from normswap.detect.sites import Plan, Site, Skip, Swap
from normswap.models.programs import as_module
from normswap.parity.limits import NOISE_FACTOR
from normswap.parity.result import Difference, Parity
from normswap.swap.apply import swap
from normswap.swap.revert import revert

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build/random_graphs.jsonl"
RAW = ROOT / "benchmarks/results/random_graphs.json"
PAGE = ROOT / "docs/coverage.md"
BEGIN, END = "<!-- begin: python -m benchmarks.random_graphs -->", "<!-- end -->"
COUNT = 2000
EXACT = 1e-10  # relative, in float64: what may be left where the statistics are float64 too


# -- one graph ----------------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """findings: what is wrong, in words; nothing if all is well. ill_conditioned: the original rounds beyond the cap, or above EXACT."""

    findings: list[str]
    ill_conditioned: bool = False


def check(graph: RandomGraph) -> Outcome:
    """Plan and convert a graph, and hold both against what the generator knows and against the original in float64."""
    try:
        return _check(graph)
    except Exception as error:  # whatever it raises, it is a finding
        where = [f for f in traceback.extract_tb(error.__traceback__) if "normswap" in f.filename]
        return Outcome([f"{type(error).__name__} at {where[-1].name if where else '?'}: {str(error)[:400]}"])


def _check(graph: RandomGraph) -> Outcome:
    model, inputs = graph.make(), graph.inputs()
    before = [tensor.clone() for tensor in _state(model)]
    reference = _outputs(model, inputs)
    found = list(_differences(graph, plan(model, inputs, approximate=True)))
    # A norm of almost constant numbers may turn rounding into 1e-4 of its output: then its own precision says nothing, and float64 decides.
    conversion = convert_unchecked(model, Request(example_inputs=inputs, coupling="none"))
    found += _unless_asked_for(graph, conversion.plan)
    ill_conditioned = bool(conversion.parity.unjudged)
    if not conversion.parity:
        found.append(f"parity: {conversion.parity.failure or _failed(conversion.parity)[0]}")
    if any(not torch.equal(old, new) for old, new in zip(before, _state(model), strict=True)):
        found.append("the original's tensors changed")
    if any(not torch.equal(old, new) for old, new in zip(reference, _outputs(model, inputs), strict=True)):
        found.append("the original's outputs changed")
    # What the judge says is not taken for granted: in float64 there is next to no rounding to hide behind.
    wide, doubled = graph.make(torch.float64), graph.inputs(torch.float64)
    module = as_module(wide)
    candidate = swap(module, plan(module, doubled))
    expected = _outputs(module, doubled)
    # The mean of an InstanceNorm's output is 0 but for rounding, as is its output for a channel that does not vary. What is made of those
    # moves with the last bit of the input and of the weights.
    nudged = [_nudged(graph, sign * torch.finfo(torch.float64).eps) for sign in (1, -1)]
    for number, (old, new) in enumerate(zip(expected, _outputs(candidate, doubled), strict=True)):
        error, noise = _distance(old, new), max(_distance(old, outputs[number]) for outputs in nudged)
        ill_conditioned |= noise > EXACT
        if not error <= max(EXACT, NOISE_FACTOR * noise):
            found.append(f"output {number} is {error:.1e} off in float64")
    if isinstance(conversion.model, nn.Module):
        returned = revert(conversion.model)
        if any(not torch.allclose(old, new, rtol=1e-4, atol=1e-4) for old, new in zip(reference, _outputs(returned, inputs), strict=True)):
            found.append("revert does not bring the function back")
    return Outcome(found, ill_conditioned)


def _nudged(graph: RandomGraph, by: float) -> tuple[Tensor, ...]:
    """The outputs if every number of the input and of the model is larger by this share of itself."""
    model = graph.make(torch.float64)
    with torch.no_grad():
        for tensor in _state(model):
            if tensor.is_floating_point():
                tensor.mul_(1 + by)
    return _outputs(model, tuple(x * (1 + by) for x in graph.inputs(torch.float64)))


def _distance(old: Tensor, new: Tensor) -> float:
    """Relative to the largest value; infinity for another shape."""
    return float((old - new).abs().max() / old.abs().max().clamp(min=1e-30)) if old.shape == new.shape else float("inf")


def _failed(parity: Parity) -> list[Difference]:
    return [d for d in (*parity.sites, *(parity.all_outputs or parity.outputs)) if not d.passed]


def _differences(graph: RandomGraph, found: Plan) -> Iterator[str]:
    """What the plan has and the generator did not put in, and the other way round."""
    in_graph = graph.mode in ("graph", "export")
    decided: tuple[Swap | Skip, ...] = (*found.swaps, *found.skips)
    sites = Counter(_seen(d.site, d.kind, d.preserves if isinstance(d, Swap) else "kept", in_graph) for d in decided)
    for site, count in (graph.expected - sites).items():
        yield f"missing from the plan: {count} x {site}"
    for site, count in (sites - graph.expected).items():
        yield f"too much in the plan: {count} x {site}"


def _seen(site: Site, kind: str, verdict: Any, in_graph: bool) -> Expected:
    place = "" if in_graph else site.name if site.function is None else site.name.rpartition(".")[0]
    return Expected(place, kind, verdict, -1 if site.calls is None else site.calls, 0 if in_graph else len(site.aliases))


def _unless_asked_for(graph: RandomGraph, found: Plan) -> Iterator[str]:
    """Unless it is asked for, an approximate swap is a skip with its reason; the same sites all the same."""
    exact = sum(count for site, count in graph.expected.items() if site.verdict == "exact")
    if len(found.swaps) != exact or len(found.swaps) + len(found.skips) != graph.expected.total():
        yield f"without approximate: {len(found.swaps)} swaps and {len(found.skips)} skips; expected {exact} of {graph.expected.total()}"
    if any(s.preserves != "exact" for s in found.swaps) or any(not s.reason for s in found.skips):
        yield "without approximate: an approximate swap, or a skip without a reason"


def _state(model: Any) -> list[Tensor]:
    module = as_module(model)
    return [*module.parameters(), *module.buffers()]


def _outputs(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    module = as_module(model)
    with torch.no_grad():
        found = module(*(tensor.clone() for tensor in inputs))
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


# -- many of them -------------------------------------------------------------------------------------------------------------------------


def numbered(seed: int, number: int) -> RandomGraph:
    return generate(random.Random(f"{seed}-{number}"))


def measure(seed: int, number: int) -> dict[str, Any]:
    graph = numbered(seed, number)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        found, ill_conditioned = check(graph)
    kinds = Counter[str]()
    for site, count in graph.expected.items():
        kinds[f"{site.kind}, {site.verdict}"] += count
    seconds = round(time.perf_counter() - started, 2)
    return {
        "seed": seed,
        "number": number,
        "mode": graph.mode,
        "norms": dict(kinds),
        "findings": found,
        "ill-conditioned": ill_conditioned,
        "seconds": seconds,
    }


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    norms = Counter[str]()
    for record in records:
        norms.update(record["norms"])
    return {
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
        "seed": records[0]["seed"],
        "graphs": len(records),
        "clean": sum(not r["findings"] for r in records),
        "ill-conditioned": sum(r["ill-conditioned"] for r in records),
        "modes": dict(sorted(Counter(r["mode"] for r in records).items())),
        "norms": dict(sorted(norms.items())),
        "findings": [{"number": r["number"], "findings": r["findings"]} for r in records if r["findings"]],
    }


def line(found: dict[str, Any]) -> str:
    """What docs/coverage.md says of a summary."""
    modes = ", ".join(f"{count:,} {mode}" for mode, count in found["modes"].items())
    return (
        f"{found['clean']:,} of {found['graphs']:,} graphs with {sum(found['norms'].values()):,} norms (seed {found['seed']}) are clean:\n"
        f"{modes}; {found['ill-conditioned']:,} of them turn rounding into outputs of their own, so that `convert` may refuse them.\n"
        f"Measured on {found['environment']['machine']}, python {found['environment']['python']}, torch {found['environment']['torch']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--show", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.show is not None:
        print(numbered(asked.seed, asked.show), *measure(asked.seed, asked.show)["findings"], sep="\n")
        return
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {r["number"]: r for r in map(json.loads, lines) if r["seed"] == asked.seed}
    with RESULTS.open("a") as file:
        for number in range(asked.count):
            if number in done and not done[number]["findings"]:
                continue
            done[number] = measure(asked.seed, number)
            file.write(json.dumps(done[number]) + "\n")
            file.flush()
            if done[number]["findings"]:
                print(number, done[number]["mode"], *done[number]["findings"], sep="\n    ", flush=True)
    records = [done[number] for number in range(asked.count)]
    RAW.write_text(json.dumps(summary(records), indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{line(summary(records))}\n{END}{rest.partition(END)[2]}")
    print(f"{sum(not r['findings'] for r in records)} of {len(records)} graphs are clean")


if __name__ == "__main__":
    main()
