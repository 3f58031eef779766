"""The models of other libraries, converted whole: exact swaps held against the original, approximate ones calibrated on random data.

    python -m benchmarks.coverage timm                measures what is missing, then writes results/coverage_timm.json and docs/coverage.md
    python -m benchmarks.coverage transformers        likewise
    python -m benchmarks.coverage timm --redo         measures again what was not clean
    python -m benchmarks.coverage timm --only '*/vit*' --redo
    python -m benchmarks.coverage timm --table        only writes the table again
    python -m benchmarks.coverage timm --choose       looks for the smallest model of each family again (some minutes)

Each model runs in a process of its own, forked from one that has imported the library, and is given TIMEOUT seconds. A result is appended
to build/coverage_<library>.jsonl as soon as it is there; interrupted with Ctrl-C, the next run goes on where this one stopped.

The plan has a witness that shares no code with normswap (`Witness`): every module whose class calls itself a norm, every normalization
kernel that one forward pass really runs, and whatever takes a variance or a reciprocal root by hand, with the module that does.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import gc
import importlib
import json
import multiprocessing
import re
import resource
import signal
import statistics
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fixtures.nets import randomise
from normswap.api.convert import convert_unchecked, plan
from normswap.api.request import Request
from normswap.detect.sites import Plan, Skip, Swap
from normswap.models.batches import arguments_of
from normswap.models.copying import copy_for_running
from normswap.parity.judge import compare, judge
from normswap.parity.probes import Probe
from normswap.parity.result import Difference, Parity
from normswap.swap.apply import swap
from normswap.swap.calibrate import calibrate

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds of processor time for one model: a busy machine changes nothing
CALM = 0.3
BATCHES, BATCH = 2, 2  # of calibration data
LIBRARIES: Mapping[str, str] = {"timm": "benchmarks.timm_families", "transformers": "benchmarks.transformers_models"}

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: a model with random weights and the arguments of one call, of a batch of 2."""

    family: str
    name: str
    build: Callable[[], tuple[nn.Module, Any]] = dataclasses.field(repr=False, compare=False)
    parameters: int = 0  # if it is known; the small ones are measured first

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def make(self) -> tuple[nn.Module, Any]:
        """The model in eval mode, with random weights and no constant left in it, and its arguments; the same every time."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            model, arguments = self.build()
        return fill_constants(randomise(model, self.seed), self.seed).eval(), arguments


def fill_constants(model: nn.Module, seed: int) -> nn.Module:
    """Move the parameters that are initialised to one value (a layer scale of 1e-6, a bias of 0): behind them nothing would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == parameter.reshape(-1)[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return model


def redrawn(arguments: Any, seed: int) -> Any:
    """Arguments of the same shapes with other values: floats from a normal distribution, integers as they were but along another order."""
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = tree_flatten(arguments)

    def redraw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype is torch.bool or not leaf.dim():
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf.flip(-1)

    return tree_unflatten([redraw(leaf) for leaf in leaves], spec)


# --- the witness -----------------------------------------------------------------------------------------------------------------------

BATCH_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.RMSNorm, nn.LocalResponseNorm)
CALLED_SO = re.compile(r"norm(?!al)|(batch|layer|group)_?norm|(BN|LN|GN|FRN|GRN)(\d[dD])?$", re.IGNORECASE)
aten = torch.ops.aten
KERNELS = {
    aten.native_batch_norm.default: "batch",
    aten._native_batch_norm_legit.default: "batch",
    aten._native_batch_norm_legit.no_stats: "batch",
    aten._native_batch_norm_legit_no_training.default: "batch",
    aten.native_layer_norm.default: "layer",
    aten.native_group_norm.default: "group",
    aten._fused_rms_norm.default: "rms",
}
BY_HAND = {aten.rsqrt.default, aten.var.correction, aten.var_mean.correction, aten.std.correction, aten.std_mean.correction}
# What is called a norm, or takes a variance or a reciprocal root, and is no normalization of activations: by the class of the module.
NO_NORM = {
    "NormFreeBlock": "is a block without norms, with a gain of its own",
    "Gemma3nTextModel": "scales the parallel streams to the rms of the first",
    "Qwen3NextGatedDeltaNet": "divides queries and keys by their length",
    "RecurrentGemmaRglru": "computes sqrt(1 - a^2), the weight of the input beside a gate a",
    "PatchTSTStdScaler": "scales each series by its own std, and the forecast back",
    "PatchTSMixerStdScaler": "scales each series by its own std, and the forecast back",
}


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is a norm by its class or by its name, containers left out: those that hold weights through their children only."""

    def is_one(module: nn.Module) -> bool:
        if isinstance(module, NORMS) or type(module).__name__ in BATCH_NORMS:
            return True
        if type(module).__name__ in NO_NORM:
            return False
        if type(module).__module__ == nn.utils.parametrizations.__name__:  # of a weight
            return False
        own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        return bool(CALLED_SO.search(type(module).__name__)) and (own or not any(True for _ in module.parameters()))

    return {name: module for name, module in model.named_modules() if is_one(module)}


class Witness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one forward pass from below. What depends on parameters and buffers alone, a weight that is standardised, does not count.

    calls    of each of the planned modules          outside  normalization kernels that run in none of them, by kind
    by_hand  variances and reciprocal roots that are taken in none of them, by the class of the module that takes them
    """

    def __init__(self, planned: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.planned = planned
        self.stack: list[nn.Module] = []
        self.calls: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self.by_hand: Counter[str] = Counter()
        self.names: dict[nn.Module, str] = {}

    def watch(self, model: nn.Module, arguments: Any, owners: Collection[str]) -> Witness:
        """owners: the names of modules with a hand-written norm that is in the plan."""
        self.names = {module: name for name, module in model.named_modules()}
        self.fixed: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        self.fixed.update(dict.fromkeys((*model.parameters(), *model.buffers())))
        self.owners = owners
        handles = [m.register_forward_pre_hook(self._enter) for m in model.modules()]
        handles += [m.register_forward_hook(self._leave, always_call=True) for m in model.modules()]
        try:
            with torch.no_grad(), self:
                call(model, arguments)
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _within(self) -> bool:
        return any(module in self.planned for module in self.stack)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self.planned and not self._within():
            self.calls[self.planned[module]] += 1
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fixed = bool(given) and all(t in self.fixed for t in given)
        result = func(*args, **(kwargs or {}))
        if fixed:
            self.fixed.update(dict.fromkeys(t for t in tree_leaves(result) if isinstance(t, Tensor)))
        elif not self._within():
            if kind := KERNELS.get(func):
                self.outside[kind] += 1
            half = func is aten.pow.Tensor_Scalar and args[1] == -0.5
            root = func is aten.sqrt.default and args[0].numel() > 1
            if (func in BY_HAND or half or root) and self.names[self.stack[-1]] not in self.owners:
                self.by_hand[f"{type(self.stack[-1]).__name__}: {func.__name__}"] += 1
        return result


def call(model: nn.Module, arguments: Any) -> Any:
    return model(**arguments) if isinstance(arguments, Mapping) else model(*arguments)


# --- one model -------------------------------------------------------------------------------------------------------------------------


def measure(case: Case) -> Record:
    """Convert one model, exactly and approximately. `findings` is empty if nothing at all is amiss."""
    started = time.monotonic()
    record: Record = {"family": case.family, "name": case.name, "findings": []}
    findings: list[str] = record["findings"]
    torch.manual_seed(0)
    model, arguments = case.make()
    record |= {"input": shapes(arguments), "parameters": sum(p.numel() for p in model.parameters())}
    decided = plan(model, arguments, approximate=True)
    record |= {"backend": decided.backend, "notes": list(decided.notes)} | _counted(model, arguments, decided, findings)
    calibration = [arguments, *(redrawn(arguments, case.seed + i) for i in range(1, BATCHES))]
    try:
        request = Request(example_inputs=arguments, calibration=calibration, approximate=True, coupling="none")
        conversion = convert_unchecked(model, request)
    except Exception as error:  # whatever it is, it is the finding
        findings.append(f"convert raised {type(error).__name__}: {error}")
    else:
        if [s.name for s in conversion.plan.swaps] != [s.name for s in decided.swaps]:
            findings.append("plan and convert do not decide the same")
        record["parity"] = parity_of(conversion.parity, case, findings)
        fits, drift = conversion.fits, conversion.drift
        approximate = [s.name for s in decided.swaps if s.preserves == "approximate"]
        if approximate and "rounding" in record["parity"]:  # where convert stops
            converted = swap(model, decided)
            fits = calibrate(converted, copy_for_running(model), approximate, calibration)
            asked = [Probe("example", *arguments_of(batch, model)) for batch in calibration[:1]]
            drift = compare(judge(model, (), {}, asked=asked), converted, tolerance=float("inf"), original=model)
        if drift is not None:
            record |= _calibrated(fits, drift, len(approximate), findings)
        elif approximate and conversion.parity:
            findings.append(f"{len(approximate)} approximate swaps were not calibrated")
    gc.collect()
    return record | {
        "clean": not findings,
        "seconds": round(time.monotonic() - started, 1),
        "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def _counted(model: nn.Module, arguments: Any, decided: Plan, findings: list[str]) -> Record:
    """What is in the plan, against the witness."""
    entries: list[Swap | Skip] = [*decided.swaps, *decided.skips]
    layers = [d for d in entries if d.site.function is None and d.site.module is not None]
    code = [d for d in entries if d.site.function is not None]
    planned = {cast(nn.Module, d.site.module): d.name for d in layers}
    owners = {d.name.rpartition(".")[0] for d in code if d.calls}
    found = norms(model)
    missing = [n for n, module in found.items() if module not in planned and n not in owners and not _inside(module, planned)]
    if missing:
        findings.append(f"{len(missing)} norms are not in the plan, {missing[0]} the first: {type(found[missing[0]]).__name__}")
    by_hand_owners = {d.name.rpartition(".")[0] for d in code if d.calls and kernel_of(d) is None}
    witness = Witness(planned).watch(model, arguments, by_hand_owners)
    if wrong := [d for d in layers if d.calls is not None and d.calls != witness.calls[d.name]]:
        first = wrong[0]
        findings.append(
            f"{len(wrong)} norms are called another number of times, {first.name} {witness.calls[first.name]} and not {first.calls}"
        )
    calls = Counter(kernel for d in code if (kernel := kernel_of(d)) for _ in range(d.calls or 0))
    if dict(calls) != dict(witness.outside):
        findings.append(
            f"a forward pass runs the kernels {dict(witness.outside)} outside of the planned layers, the plan has {dict(calls)}"
        )
    by_hand = {who: n for who, n in witness.by_hand.items() if who.partition(":")[0] not in NO_NORM}
    if by_hand:
        findings.append(f"hand-written? {by_hand}")
    if unknown := sorted({f"{type(d.site.module).__name__}: {d.reason}" for d in decided.skips if d.kind == "unknown"}):
        findings.append(f"of unknown kind: {'; '.join(unknown)}")
    # Without running statistics it is a BatchNorm of each batch, or of a weight that code standardises.
    batch = [d for d in entries if is_batch_norm(d.site.module) and cast(Any, d.site.module).running_mean is not None]
    if left := [d for d in batch if isinstance(d, Skip) or d.preserves != "exact"]:
        findings.append(f"{len(left)} BatchNorms are not swapped exactly, {left[0].name} the first")
    exact = [s for s in decided.swaps if s.preserves == "exact"]
    return {
        "norms": dict(sorted(Counter(str(d.site.function or type(d.site.module).__name__) for d in entries).items())),
        "batch norms": len(batch),
        "exact": len(exact),
        "approximate": len(decided.swaps) - len(exact),
        "skipped": dict(sorted(Counter(f"{s.kind}: {s.reason}" for s in decided.skips).items())),
        "by hand": dict(sorted(witness.by_hand.items())),
        "calls": sum(witness.calls.values()),
    }


def _inside(module: nn.Module, planned: Mapping[nn.Module, str]) -> bool:
    return any(part is module for outer in planned for part in outer.modules())


def is_batch_norm(module: nn.Module | None) -> bool:
    return isinstance(module, _BatchNorm) or type(module).__name__ in BATCH_NORMS


def kernel_of(entry: Swap | Skip) -> str | None:
    """The kernel that a call ends in; an instance norm ends in that of a batch norm, and a hand-written norm in none."""
    function = str(entry.site.function).lower().replace("_", "")
    kind = next((kind for kind in ("batch", "instance", "layer", "group", "rms") if f"{kind}norm" in function), None)
    return "batch" if kind == "instance" else kind


def parity_of(parity: Parity, case: Case, findings: list[str]) -> Record:
    """The exact swaps. Where values differ by more than the limit, the calmed model decides whether rounding alone did it: `rounding`."""
    failed = [d for d in (*parity.sites, *parity.outputs) if not d.passed]
    broken = [d for d in failed if d.problem is not None or d.non_finite]
    if parity.failure or not parity.outputs:
        findings.append(f"parity failed: {parity.failure or 'no output'}")
    elif broken:
        findings.append(f"parity failed at {len(broken)} places, {numbers(broken[0])} the first")
    record: Record = {
        "passed": parity.passed,
        "output": numbers(max(parity.outputs, key=_share, default=None)),
        "layer": numbers(max(parity.sites, key=_share, default=None)),
        "dropped": list(parity.dropped),
    }
    if failed and not broken:
        calm, worst = calmed(case), max(failed, key=lambda d: d.max_rel)
        nearest = max((*calm.sites, *calm.outputs), key=_share)
        record["rounding"] = {"places": len(failed), "worst": numbers(worst), "calmed": numbers(nearest) | {"passed": calm.passed}}
        if not calm.passed:
            findings.append(f"parity failed at {len(failed)} places, {numbers(failed[0])} the first, and with calmed weights, too")
    return record


def _share(d: Difference) -> float:
    return d.max_rel / d.tolerance if d.tolerance else d.max_rel


def calmed(case: Case) -> Parity:
    """The exact swaps of the same model with the weights of all its norms times CALM, at the same probes and under the same limits.

    What a wrong channel, eps or statistic does to the function does not go away with it; the chaos does, in which a network of a hundred
    layers with weights of variance 1 amplifies the rounding of any dtype.
    """
    model, arguments = case.make()
    with torch.no_grad():
        for module in norms(model).values():
            if isinstance(weight := getattr(module, "weight", None), Tensor):
                weight.mul_(CALM)
    return convert_unchecked(model, Request(example_inputs=arguments, coupling="none")).parity


def numbers(d: Difference | None) -> Record:
    if d is None:
        return {}
    found: Record = {"name": d.name, "probe": d.probe} | {k: rounded(getattr(d, k)) for k in ("max_rel", "tolerance", "noise")}
    return found | ({"problem": d.problem} if d.problem else {}) | ({"non_finite": d.non_finite} if d.non_finite else {})


def rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if abs(value) < float("inf") else None


def _calibrated(fits: Sequence[Any], drift: Parity, wanted: int, findings: list[str]) -> Record:
    if len(fits) != wanted:
        findings.append(f"{wanted} approximate swaps, but {len(fits)} were calibrated")
    if bad := [f.name for f in fits if not 0 <= f.error < float("inf")]:
        findings.append(f"{len(bad)} fits are not numbers, {bad[0]} the first")
    if drift.failure or not drift.outputs:
        findings.append(f"no drift could be measured: {drift.failure}")
    worst = max(fits, key=lambda f: f.error)
    outputs = [d for d in drift.outputs if d.max_rel == d.max_rel]
    if len(outputs) != len(drift.outputs) or any(d.problem or d.non_finite for d in drift.outputs):
        findings.append(
            f"the drift of {next(d.name for d in drift.outputs if d.max_rel != d.max_rel or d.problem or d.non_finite)} is no number"
        )
    layer = max(drift.sites, key=lambda d: d.max_rel, default=None)
    return {
        "fit": {
            "worst": worst.name,
            "error": rounded(worst.error),
            "median": rounded(statistics.median(f.error for f in fits)),
            "strata": max(f.stratum for f in fits),
            "flat channels": sum(f.flat_channels for f in fits),
        },
        "drift": {
            "output": rounded(max((d.max_rel for d in outputs), default=float("nan"))),
            "l2": rounded(max((d.rel_l2 for d in outputs), default=float("nan"))),
            "layer": layer.name if layer else None,
            "at layer": rounded(layer.max_rel) if layer else None,
        },
    }


def shapes(arguments: Any) -> str:
    return ", ".join("x".join(map(str, leaf.shape)) if isinstance(leaf, Tensor) else str(leaf) for leaf in tree_leaves(arguments))


# --- all of them -----------------------------------------------------------------------------------------------------------------------


class Suite:
    """The rows of one library, and where their results lie."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.module = importlib.import_module(LIBRARIES[library])
        self.cases: list[Case] = self.module.cases()
        self.results = ROOT / f"build/coverage_{library}.jsonl"
        self.raw = ROOT / f"benchmarks/results/coverage_{library}.json"
        self.begin, self.end = f"<!-- begin: python -m benchmarks.coverage {library} -->", "<!-- end -->"

    def recorded(self) -> dict[str, Record]:
        """The last result of each family: of those committed, then of those since; a line that was cut short counts as none."""
        found: dict[str, Record] = {}
        for line in self.results.read_text().splitlines() if self.results.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["family"]] = record
        return found

    def write(self) -> None:
        records = self.recorded()
        environment = {"torch": torch.__version__, **{n: metadata.version(n) for n in (self.library, "torchvision")}}
        kept = [records[case.family] for case in self.cases if case.family in records]
        lines = ",\n".join(json.dumps(record) for record in kept)
        _replace(self.raw, f'{{"environment": {json.dumps(environment)},\n"records": [\n{lines}\n]}}\n')
        self.write_table()

    def write_table(self) -> None:
        page = ROOT / "docs/coverage.md"
        body = table(json.loads(self.raw.read_text()))
        pattern = f"{re.escape(self.begin)}.*?{re.escape(self.end)}"
        _replace(page, re.sub(pattern, lambda _: f"{self.begin}\n{body}{self.end}", page.read_text(), flags=re.DOTALL))


def isolated(case: Case, threads: int, seconds: int, work: Callable[[Case], Record] = measure) -> Record:
    """`measure`, or other work, in a process of its own: whatever happens in there costs one row."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # then SIGXCPU
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")
        try:
            sender.send(work(case))
        except Exception as error:
            sender.send(failed(f"{type(error).__name__}: {error}"))

    def failed(why: str) -> Record:
        return {"family": case.family, "name": case.name, "findings": [why], "clean": False}

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        return cast(Record, receiver.recv())
    except EOFError:
        child.join()
        late = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        return failed(f"took more than {seconds} s" if late else f"the process ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()


def sweep(suite: Suite, todo: Sequence[Case], threads: int, seconds: int, commit: str, say: Callable[[str], None]) -> None:
    suite.results.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with suite.results.open("a") as results:
        for done, case in enumerate(todo, 1):
            record = isolated(case, threads, seconds)
            results.write(json.dumps(record | {"commit": commit}) + "\n")
            results.flush()
            left = (time.monotonic() - started) / done * (len(todo) - done)
            state = "clean" if record["clean"] else "; ".join(record["findings"])
            say(f"[{done}/{len(todo)}, {left / 60:.0f} min left] {case.family} {case.name}: {state[:600]} ({record.get('seconds', '-')} s)")


def run(library: str, asked: Any, commit: str, say: Callable[[str], None]) -> int:
    """What `python -m benchmarks.coverage <library>` does."""
    if asked.choose:
        importlib.import_module(LIBRARIES[library]).choose(say)
        return 0
    suite = Suite(library)
    if asked.one:
        torch.set_num_threads(asked.threads)
        print(json.dumps(measure(next(case for case in suite.cases if asked.one in (case.family, case.name))), indent=1))
        return 0
    if asked.table:
        suite.write_table()
        return 0
    if asked.fresh:
        suite.results.unlink(missing_ok=True)
    known = suite.recorded()
    named = [case for case in suite.cases if fnmatch.fnmatchcase(case.family, asked.only)]
    again = {f for f, record in known.items() if asked.redo and (asked.only != "*" or not record["clean"])}
    changed = {case.family for case in named if case.family in known and known[case.family]["name"] != case.name}
    todo = [case for case in named if case.family not in known or case.family in again | changed]
    todo.sort(key=lambda case: case.parameters)
    say(f"{len(todo)} of {len(named)} rows to measure")
    try:
        sweep(suite, todo, asked.threads, TIMEOUT, commit, say)
    except KeyboardInterrupt:
        return 130
    suite.write()
    return 0 if all(record["clean"] for record in suite.recorded().values()) else 1


TEXT = ("family", "model", "input", "back-end", "kept, why", "parity")  # the other columns are numbers
COLUMNS = (*TEXT[:4], "BatchNorms", "exact", "approximate", "worst fit", "drift", *TEXT[4:], "error", "limit", "s")


def table(raw: Record) -> str:
    """What stands between the marks of docs/coverage.md, from benchmarks/results/coverage_<library>.json."""
    records: list[Record] = raw["records"]
    where = ", ".join(f"{name} {version}" for name, version in raw["environment"].items())
    reasons = {reason: i + 1 for i, reason in enumerate(sorted({r for record in records for r in record.get("skipped", {})}))}
    batch, exact, approximate = (sum(r.get(key, 0) for r in records) for key in ("batch norms", "exact", "approximate"))
    kept = sum(sum(r.get("skipped", {}).values()) for r in records)
    noisy = [r for r in records if "rounding" in (r.get("parity") or {})]
    lines = [
        f"{sum(r['clean'] for r in records)} of {len(records)} rows are clean. {batch} BatchNorms; {exact} norms swapped exactly,",
        f"{approximate} approximately and calibrated, {kept} kept. In {len(noisy)} rows rounding decides (below). Measured at",
        f"{', '.join(sorted({r.get('commit', '?') for r in records}))} with {where}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---" if name in TEXT else "--:" for name in COLUMNS) + "|",
        *(_row(r, reasons) for r in records),
        "",
        "Kept, why:",
        "",
        *(f"{number}. {reason}" for reason, number in reasons.items()),
        "",
    ]
    by_hand = {who.partition(":")[0] for r in records for who in r.get("by hand", {})}
    if explained := {who: why for who, why in NO_NORM.items() if who in by_hand}:
        lines += ["Takes a variance or a reciprocal root and is no norm:", "", *(f"* `{who}` {why}" for who, why in explained.items()), ""]
    if noisy:
        lines += [
            "Rounding decides: with weights of variance 1 these models are chaotic and amplify it, many in float64 as well. There the",
            "error is above the limit, and no tolerance can tell rounding from a mistake. The last two columns can: the same model, probes",
            f"and limits with the weights of all norms times {CALM}. *Places*: outputs and layers above the limit; then the worst.",
            "",
            "| family | places | worst | probe | error | limit | noise | error, calmed | limit |",
            "|---|--:|---|---|--:|--:|--:|--:|--:|",
            *(_noise(r) for r in noisy),
            "",
        ]
    if findings := [r for r in records if not r["clean"]]:
        lines += ["Not clean:", "", *(f"* {r['family']} ({r['name']}): {'; '.join(r['findings'])}" for r in findings), ""]
    return "\n".join(lines)


def _row(record: Record, reasons: Mapping[str, int]) -> str:
    parity, fit, drift = (record.get(key) or {} for key in ("parity", "fit", "drift"))
    output = parity.get("output") or {}
    state = "-" if not parity else "passed" if parity["passed"] else "rounding" if "rounding" in parity else "failed"
    cells = (
        record["family"],
        record["name"],
        record.get("input", "-"),
        record.get("backend", "-"),
        *(record.get(key, "-") for key in ("batch norms", "exact", "approximate")),
        f"{fit['error']:.2f}" if fit.get("error") is not None else "",
        f"{drift['output']:.2f}" if drift.get("output") is not None else "",
        ", ".join(f"{count} ({reasons[reason]})" for reason, count in record.get("skipped", {}).items()),
        state,
        *(f"{output[key]:.1e}" if output.get(key) is not None else "-" for key in ("max_rel", "tolerance")),
        record.get("seconds", "-"),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _noise(record: Record) -> str:
    rounding = record["parity"]["rounding"]
    worst, calm = rounding["worst"], rounding["calmed"]
    values = (worst["max_rel"], worst["tolerance"], worst["noise"], calm["max_rel"], calm["tolerance"])
    texts = ("-" if value is None else f"{value:.1e}" for value in values)
    return "| " + " | ".join((record["family"], str(rounding["places"]), worst["name"], worst["probe"], *texts)) + " |"


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text)
    partial.replace(path)
