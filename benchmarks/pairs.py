"""How many of the norms that read a conv or linear directly does normswap pair with it? timm's families, random weights.

    python -m benchmarks.pairs                measures what is missing, then writes results/pairs.json and the table in docs/coverage.md
    python -m benchmarks.pairs --redo NAME    measures the models whose name contains NAME again

The denominator has a witness that shares no code with normswap: in one forward pass, which norms get the very tensor that a conv or linear
function of torch has returned, whatever module called it, with whatever weight. A result is appended to build/pairs.jsonl as soon as it is
there, and the next run goes on where this one stopped. A model is given LIMIT seconds.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks import coverage, timm_families  # the first imports torchvision, which timm imports, after the shim
from benchmarks.libraries import Case
from normswap.api.convert import plan
from normswap.swap.apply import swap
from normswap.training.couple import couple

ROOT = coverage.ROOT
RAW, RESULT, PAGE = ROOT / "build/pairs.jsonl", ROOT / "benchmarks/results/pairs.json", ROOT / "docs/coverage.md"
BEGIN, END = "<!-- begin: python -m benchmarks.pairs -->", "<!-- end -->"
LIMIT = 60  # seconds
FUNCTIONS = {f"conv{transposed}{rank}d" for transposed in ("", "_transpose") for rank in (1, 2, 3)} | {"linear"}

Record = dict[str, Any]


class Witness(TorchFunctionMode):
    """Remembers what conv and linear functions return, with the weight that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in FUNCTIONS:
            self.weights[result] = args[1] if len(args) > 1 else kwargs["weight"]
        return result


def witnessed(model: nn.Module, arguments: Any, names: list[str]) -> dict[str, Any]:
    """name -> the weight of the conv or linear function whose result the norm reads; norms that read something else are left out."""
    found: dict[str, Any] = {}
    witness = Witness()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0] in witness.weights:
                found[name] = witness.weights[args[0]]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        with torch.no_grad(), witness:
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(case: Case) -> Record:
    start = time.perf_counter()
    model, arguments = case.make()
    decided = plan(model, arguments)
    sites = {s.name: s.site for s in decided.swaps if s.site.call is None}
    direct = witnessed(model, arguments, list(sites))
    weights = {name: getattr(model.get_submodule(s.producer), "weight", None) for name, s in sites.items() if s.producer is not None}
    coupled = {p.name: p for p in couple(swap(model, decided, std="log"), (s.site for s in decided.swaps), arguments, {})}
    unpaired: dict[str, list[str]] = {}
    for name in direct:
        if (reason := sites[name].why_no_producer or coupled[name].reason) is not None:
            unpaired.setdefault(reason, []).append(name)
    return {
        "family": case.family,
        "name": case.name,
        "backend": decided.backend,
        "swaps": len(decided.swaps),
        "direct": len(direct),
        "paired": len(direct) - sum(map(len, unpaired.values())),
        "wrong": [name for name, weight in weights.items() if direct.get(name) is not weight],  # paired with another layer than they read
        "unpaired": unpaired,
        "seconds": round(time.perf_counter() - start, 1),
    }


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(redo: str | None) -> list[Record]:
    lines = RAW.read_text().splitlines() if RAW.exists() else []
    done: dict[str, Record] = {record["family"]: record for record in map(json.loads, lines)}
    for case in sorted(timm_families.cases(), key=lambda case: case.parameters):
        if case.family in done and not (redo is not None and redo in case.name):
            continue
        try:
            with limited(LIMIT):
                record = measure(case)
        except Exception as error:
            record = {"family": case.family, "name": case.name, "skipped": f"{type(error).__name__}: {error}"[:200]}
        done[case.family] = record
        RAW.parent.mkdir(exist_ok=True)
        with RAW.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    return sorted(done.values(), key=lambda record: record["family"])


def summary(records: list[Record]) -> Record:
    measured = [record for record in records if "skipped" not in record]
    with_norms = [record for record in measured if record["direct"]]
    direct, paired = (sum(record[key] for record in measured) for key in ("direct", "paired"))
    return {
        "families": len(records),
        "measured": len(measured),
        "with such norms": len(with_norms),
        "swaps": sum(record["swaps"] for record in measured),
        "direct": direct,
        "paired": paired,
        "share": round(paired / max(direct, 1), 4),
        "families all paired": sum(record["direct"] == record["paired"] for record in with_norms),
        "wrong": sum(len(record["wrong"]) for record in measured),
    }


def table(found: Record, records: list[Record]) -> list[str]:
    lines = [
        "| families | measured | with such norms | norms swapped exactly | right after a conv or linear | paired | share | wrongly |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
        f"| {found['families']} | {found['measured']} | {found['with such norms']} | {found['swaps']:,} | {found['direct']:,} "
        f"| {found['paired']:,} | {found['share']:.2%} | {found['wrong']} |",
        "",
    ]
    rest = [
        f"| {record['family']} | {record['paired']} of {record['direct']} | {len(names)} | {names[0]}: {reason} |"
        for record in records
        for reason, names in _by_kind(record.get("unpaired", {})).items()
    ]
    return [*lines, "| family | paired | not paired | the first of them, and why |", "|---|--:|--:|---|", *rest] if rest else lines


def _by_kind(unpaired: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The reasons with the names of layers taken out of the key, as one reason may be about many layers."""
    kinds: dict[str, tuple[str, list[str]]] = {}
    for reason, names in unpaired.items():
        kinds.setdefault(reason.partition(", ")[2] or reason, (reason, []))[1].extend(names)
    return dict(kinds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redo", help="measure the models whose name contains this again")
    records = run(parser.parse_args().redo)
    found = summary(records)
    lines = ",\n".join(json.dumps(record) for record in records)
    RESULT.write_text(f'{{"torch": "{torch.__version__}",\n"summary": {json.dumps(found)},\n"families": [\n{lines}\n]}}\n')
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join((before + BEGIN, *table(found, records), END + rest.partition(END)[2])))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
