"""What the command line does, and the part of the Python surface that deals with files: `load` in front of the pipeline, `save`, `export`
and `report` behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap import cuda, effort, graphs, interrupts, outputs, pipeline
from normswap.calibrate import Reestimate
from normswap.errors import ExportError, LoadError, ParityError, UnsafePickleError, UsageError
from normswap.export import Dynamic, Export, Target, export
from normswap.exported import as_module
from normswap.fold import Folded, fold
from normswap.half import arguments, halved
from normswap.inputs import Inputs, as_inputs, infer, make, parse
from normswap.landscape import STEPS, Landscape, Mode, called_with, check_plot, landscape
from normswap.load import Loaded, build
from normswap.load import load as load_source
from normswap.parity import Legs, Parity
from normswap.plan import Rule
from normswap.probes import LARGE, Probe, probes, resized
from normswap.report import Report, cuda_json, fates_json, report
from normswap.rollback import Attempt, settle
from normswap.rules import DEFAULT_RULES
from normswap.rules.own import named
from normswap.runners import REFERENCE, onnx_inputs
from normswap.save import Recipe, load_weights, read_recipe, recipe_hash, sites_of
from normswap.save import save as save_directory
from normswap.sensitivity import By, Sensitivity, sensitivity
from normswap.specs import SPEC, imported
from normswap.swap import revert, swap
from normswap.taps import Tap
from normswap.verify import CAP, LEVELS, Judgement, compare, held_at, judge, runtime

if TYPE_CHECKING:
    from normswap.folding import Fate

Model = nn.Module | ExportedProgram
Advance = Callable[[int, int], None]
Progress = Callable[[str], AbstractContextManager[Advance]]
R = TypeVar("R")
EVALUATOR_SECONDS = 10.0  # how long onnx's evaluator may take for one file, by estimate
REPORT, PAGE, ONNX = "report.json", "report.html", "model.onnx"


def _silent(stage: str) -> AbstractContextManager[Advance]:
    return contextlib.nullcontext(lambda done, total: None)


# --- Python -------------------------------------------------------------------------------------------------------------------------


def verify(
    reference: Model | str | Path, candidate: Model | str | Path, inputs: Any = None, *, tolerance: float | None = None, **loading: Any
) -> Parity:
    """Measure whether `candidate` computes what `reference` computes. Never raises on a mismatch: ask `bool(parity)`.

    Each side is a module, an ExportedProgram, a model file, a converted directory or an .onnx file. inputs: a tensor, a tuple, or a dict of
    keyword arguments; None takes those of a converted directory, or infers them. tolerance: the largest max|difference| / max|reference|
    that passes, in place of the limits described in `verify.py`.

    Raises LoadError if a side cannot be read, UsageError if the reference cannot run on the inputs or none are known.
    """
    sides = [_open(side, **loading) for side in (reference, candidate)]
    known = as_inputs(inputs) if inputs is not None else next(filter(None, map(_inputs_of, (reference, candidate), sides)), None)
    if known is None:
        raise UsageError("no inputs are known that both models take", hint="give them: --input 1x3x224x224, or inputs=... in Python")
    a, b = sides
    sites = []
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        ours = dict(a.named_modules(remove_duplicate=False))
        sites = [site["name"] for site in sites_of(b) if site["name"] in ours]
    return compare(judge(a, known.args, known.kwargs, sites=sites), b, sites=sites, tolerance=tolerance)


def export_onnx(
    model: Model | pipeline.Conversion[Any],
    example_inputs: Any = None,
    path: str | Path = "model.onnx",
    *,
    target: Target = "portable",
    opset: int | None = None,
    dynamic: bool | Dynamic = True,
    half: bool = False,
    external_data: bool | None = None,
) -> Export:
    """Write an ONNX file in which BatchlessNorm layers are folded into their convs and linears, verified in onnxruntime.

    example_inputs: as for `convert`; not needed for a Conversion. target: "portable", operators of ONNX alone; "ort-cpu", the same in the
    form that is fastest in onnxruntime on a CPU; "ort-fused", also those of onnxruntime in which two are one, each with its meaning for
    other runtimes (`normswap.fused`). opset: that of the file; None: 20, or 23 if the model calls scaled_dot_product_attention, which is
    one operator there. dynamic: what to leave free: "batch" (True), "spatial" (also height and width, or the length; verified at other
    sizes than the example's), or "none" (False). half: weights, inputs and outputs in float16. external_data: the weights in a file beside
    it, `<path>.data`; None: if one file cannot hold them.

    Raises ExportError if no file can be made of the model, ParityError if the file computes something else. Neither leaves a file.
    """
    conversion = model if isinstance(model, pipeline.Conversion) else None
    source: Model = conversion.module if conversion else model  # type: ignore[assignment]
    inputs: Inputs | None
    if example_inputs is not None:
        inputs = as_inputs(example_inputs)
    else:
        inputs = conversion.inputs if conversion else _inputs_of(source, as_module(source))
    if inputs is None:
        raise UsageError("no example inputs that the model takes could be inferred", hint="give them: example_inputs=..., or --input")
    with outputs.file(Path(path)) as partial:
        result, legs = _export(source, inputs, partial, target=target, opset=opset, dynamic=dynamic, half=half, external_data=external_data)
        try:
            _check(legs)
        except ParityError as error:
            if half and legs.failed is not None:
                noise = max((d.noise for d in legs.failed.outputs), default=float("nan"))
                error.hint = f"torch's own model.half() is {noise:.1e} away there: if that is as much, write this model in float32"
            raise
    return dataclasses.replace(result, path=Path(path), parity=_last_word(legs), legs=legs)


def save(model: nn.Module | pipeline.Conversion[Any], directory: str | Path) -> Path:
    """Write recipe.json and model.safetensors into `directory`, whole or not at all; `load` reads them."""
    conversion = model if isinstance(model, pipeline.Conversion) else None
    module = conversion.module if conversion else as_module(model)  # type: ignore[arg-type]
    with outputs.directory(Path(directory)) as partial:
        save_directory(module, partial, inputs=_describe(conversion.inputs) if conversion else ())
    return Path(directory)


def load(
    directory: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    *,
    rules: Sequence[Rule] | None = None,
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
) -> Model:
    """The converted model in `directory`.

    factory: builds the original architecture, with any weights. None takes the pickled model in the directory, or the spec that the model
    was made from (`torchvision:resnet18`). rules: those that the model was converted with; None imports your own ones from where the
    directory says they were. Raises LoadError if the directory, or the architecture, is not the one that was saved, or a rule is needed
    that cannot be imported.
    """
    directory = Path(directory)
    recipe = read_recipe(directory)
    if factory is None and recipe.module is not None:
        try:
            return load_source(str(directory / recipe.module), trust_packages=trust_packages, trust_pickle=trust_pickle).model
        except UnsafePickleError as error:
            if f"{graphs.__name__}.{graphs._rebuild.__name__}" not in error.wanted:
                raise
            raise UnsafePickleError(
                f"{directory / recipe.module} carries code, as a norm was replaced in the code of one of its modules",
                hint="--arch package.module:factory (factory=... in Python) with what builds the original model reads the weights instead; "
                "or --trust-pickle, if you trust whoever made this file with everything on this account",
                wanted=error.wanted,
            ) from error
    if factory is None and recipe.factory is None:
        raise LoadError(
            f"{directory} holds weights but no architecture", hint="pass what builds the original model: factory=..., or --arch SPEC"
        )
    model = as_module(build(recipe.factory) if factory is None else factory())  # type: ignore[arg-type]
    wanted = {site["name"]: site["std"] for site in recipe.sites}
    if wanted:
        known = _rules_of(recipe, directory) if rules is None else rules
        # Which weights it has does not matter: they are about to be loaded. The inputs tell the shapes that no weight tells.
        decided = pipeline.plan(model, _described(recipe.inputs), approximate=True, rules=known)
        chosen = dataclasses.replace(decided, swaps=tuple(s for s in decided.swaps if s.name in wanted))
        model = swap(model, chosen, std=wanted)
    load_weights(model, directory, recipe)
    return model


# --- the commands -------------------------------------------------------------------------------------------------------------------


def convert_files(
    source: str,
    output: Path | None,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    std: str = "log",
    data: str | None = None,
    approximate: bool = False,
    max_drift: float | None = None,
    reestimate: Reestimate | None = None,
    onnx: bool = True,
    export_options: Mapping[str, Any] = MappingProxyType({}),
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
    progress: Progress = _silent,
) -> tuple[Report, Path]:
    """Convert SRC into a directory. export_options: those of `export_onnx`, for its model.onnx.

    Raises ParityError after writing a directory that holds the report alone.
    """
    if output is not None:
        outputs.check(output)
    given = parse(inputs) if inputs else None
    known = _rules(rules)
    batches = None if data is None else _batches(data)
    clock = _Clock(progress)
    with clock("load"):
        loaded = load_source(source, arch=arch, trust_packages=trust_packages, trust_pickle=trust_pickle)
    output = output or Path(f"{loaded.stem}.normswap")
    with outputs.directory(output) as partial:
        with clock("convert and verify") as advance:
            conversion = pipeline.attempt(
                loaded.model,
                given,
                calibration=batches,
                approximate=approximate,
                max_drift=max_drift,
                include=include,
                exclude=exclude,
                rules=known,
                std=std,
                reestimate=reestimate,
                progress=advance,
                # A program is to load where there is no normswap, and without modes it cannot say that it is not for training.
                aux="none" if isinstance(loaded.model, ExportedProgram) else "auto",
            )
        form, factory = loaded.form, loaded.factory
        del loaded  # the original is not needed any more, and there is to be room for the exporter's copies
        gc.collect()
        parities = {"torch": conversion.parity}
        if conversion.drift is not None:
            parities["drift"] = conversion.drift
        facts: dict[str, Any] | None = None
        not_run: Mapping[str, str] = {"onnxruntime": "the model failed before" if onnx else "no ONNX file was asked for"}
        if all(parities.values()):
            with clock("save"):
                _save(conversion, partial, form=form, source=source, factory=factory)
            if onnx:
                # An approximate model is held against itself: how far it is from the original is what the drift says.
                judgement = conversion.judgement if conversion.drift is None else None
                with clock("export and verify"):
                    exported, of_file = _export(conversion.module, conversion.inputs, partial / ONNX, judgement=judgement, **export_options)
                parities.update(of_file.parities)
                not_run = of_file.not_run
                facts = _onnx_facts(exported)
        legs = Legs(parities, not_run)
        if legs.failed is not None:
            for file in partial.iterdir():
                file.unlink()
        files = sorted({file.name for file in partial.iterdir()} | {REPORT, PAGE})
        result = report(
            source,
            conversion.plan,
            legs.parities,
            not_run=legs.not_run,
            onnx=facts,
            seconds=clock.seconds,
            files=files,
            fits=map(dataclasses.asdict, conversion.fits),
        )
        (partial / REPORT).write_text(json.dumps(result.json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (partial / PAGE).write_text(result.html(), encoding="utf-8")
    if legs.failed is not None:
        try:
            pipeline.check(legs.failed)
        except ParityError as error:
            error.hint = f"{output / PAGE} has every measurement; nothing else was written"
            raise
    return result, output


def inspect(
    source: str,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
) -> Report:
    """The plan for SRC, and what is known of each norm."""
    known = _rules(rules)
    loaded = load_source(source, arch=arch, trust_packages=trust_packages, trust_pickle=trust_pickle)
    given = parse(inputs) if inputs else None
    plan, facts = pipeline.inspect(loaded.model, given, include=include, exclude=exclude, rules=known)
    return report(source, plan, facts=map(dataclasses.asdict, facts))


def verify_files(
    reference: str,
    candidate: str,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    tolerance: float | None = None,
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
) -> Parity:
    """`verify` for the command line."""
    given = parse(inputs) if inputs else None
    return verify(
        reference,
        candidate,
        given,
        tolerance=tolerance,
        arch=arch,
        trust_packages=trust_packages,
        trust_pickle=trust_pickle,
    )


def export_files(
    source: str,
    output: Path,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
    **options: Any,
) -> Export:
    """`export_onnx` for the command line: SRC is a converted directory, or any model. options: as of `export_onnx`."""
    given = parse(inputs) if inputs else None
    model = _load_any(source, arch=arch, trust_packages=trust_packages, trust_pickle=trust_pickle)
    known = given or _inputs_of(source, as_module(model))
    return export_onnx(model, known, output, **options)


def fold_file(source: str, output: Path, *, inputs: Sequence[str] = ()) -> Folded:
    """Fold the ONNX file SRC into `output`, after both were run on the same inputs and are the same function."""
    given = parse(inputs) if inputs else None
    path = Path(source)

    @functools.cache
    def judged(taps: tuple[Tap, ...]) -> Judgement:
        declared = None if given is not None else onnx_inputs(path)
        known = given or (None if declared is None else Inputs(declared))
        if known is None:
            raise UsageError(f"{source} does not say how large its inputs are", hint="give them: --input 1x3x224x224")
        return judge(path, known.args, known.kwargs, taps=taps)

    def attempt(undone: Mapping[str, str]) -> Attempt[tuple[Folded, Legs]]:
        try:
            shorter = measured(undone, shorten=True)
            if shorter.passed:
                return shorter
            why = shorter.why
        except ExportError as error:
            why = error.message
        found = measured(undone, shorten=False)
        result, legs = found.result
        if not found.passed:
            return found
        result = dataclasses.replace(result, notes=(*result.notes, f"the rest of the graph stays as it is: {why}"))
        return dataclasses.replace(found, result=(result, legs))

    def measured(undone: Mapping[str, str], *, shorten: bool) -> Attempt[tuple[Folded, Legs]]:
        _clear(partial)
        result = fold(path, partial, undone=undone, shorten=shorten)
        if not result.changed:
            return Attempt((result, Legs()), True)
        legs, _ = _legs(judged(()), partial)
        return _attempt((result, legs), result.sites, undone, result.taps, partial, lambda: judged(result.original_taps))

    with outputs.file(output) as partial:
        result, legs = settle(attempt).result
        _check(legs)
    return dataclasses.replace(result, path=output, parity=_last_word(legs), legs=legs)


def revert_files(
    source: str,
    output: Path,
    *,
    skip: bool = False,
    arch: str | None = None,
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
) -> Path:
    """Give the model of a converted directory its BatchNorm back, prove it, and write it to `output`.

    skip: leave the layers as they are that cannot be reverted.
    A name that ends in .safetensors gets the state dict; any other a pickled module if the directory holds one, else a state dict.
    """
    directory = Path(source)
    recipe = read_recipe(directory)
    converted = load(directory, _factory(arch), trust_packages=trust_packages, trust_pickle=trust_pickle)
    if isinstance(converted, ExportedProgram):
        raise UsageError(f"{source} holds an exported program, which has no layers to give back", hint="keep the .pt2 it was made from")
    model = revert(converted, skip=skip)
    pipeline.check(verify(converted, model, _inputs_of(source, converted)))
    with outputs.file(output) as partial:
        if output.suffix == ".safetensors":
            from safetensors.torch import save_model

            save_model(model, str(partial), metadata={"format": "pt"})
        else:
            torch.save(model if recipe.module else model.state_dict(), partial)
    return output


def _batches(spec: str) -> Sequence[Any]:
    """Calibration data: a .pt, .npz or .npy file, which is one batch; a directory of such files; or package.module:factory,
    which returns or yields batches."""
    path = Path(spec)
    files = sorted(p for p in path.iterdir() if p.suffix in (".pt", ".pth", ".npz", ".npy")) if path.is_dir() else [path]
    if path.exists():
        if not files:
            raise UsageError(f"--data {spec} holds no .pt, .npz or .npy file", hint="each file is one batch")
        return [found.kwargs or found.args for found in (parse([str(file)]) for file in files)]
    if SPEC.fullmatch(spec) is None:
        raise UsageError(f"--data {spec} is no file, no directory and no package.module:factory", hint="a factory returns batches")
    factory = imported(spec, "--data", "a function that returns batches")
    try:
        return list(factory())
    except Exception as error:  # it is the user's code
        raise UsageError(f"--data {spec}: the factory raised {type(error).__name__}: {error}") from error


def _rules(specs: Sequence[str]) -> tuple[Rule, ...]:
    """People's own rules, by package.module:NAME, before the default ones."""
    return (*(named(spec) for spec in specs), *DEFAULT_RULES)


def _rules_of(recipe: Recipe, directory: Path) -> tuple[Rule, ...]:
    """The rules that a converted directory was made with: those that it says are not normswap's, imported again."""
    own = []
    for entry in recipe.rules:
        where = f"{directory} has layers that a rule of its author built ({entry['kind']}: {', '.join(entry['sites'])})"
        hint = "pass the rules that it was converted with: normswap.load(directory, rules=(MY_RULE, *normswap.DEFAULT_RULES))"
        if entry["rule"] is None:
            raise LoadError(f"{where}, and does not say where that rule can be imported", hint=hint)
        try:
            own.append(named(entry["rule"], "the rule"))
        except UsageError as error:
            raise LoadError(f"{where}: {error.message}", hint=f"make it importable under this name again, or {hint}") from error
    return (*own, *DEFAULT_RULES)


# --- parts --------------------------------------------------------------------------------------------------------------------------


def _check(legs: Legs) -> None:
    if legs.failed is not None:
        pipeline.check(legs.failed)


def _last_word(legs: Legs) -> Parity | None:
    """That of onnxruntime as people use it, or of whatever could run the file."""
    return legs.parities.get(runtime(LEVELS[-1])) or next(iter(reversed(list(legs.parities.values()))), None)


class _Clock:
    """Announces a stage while it runs, gives the function to tell how far it is, and keeps how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seconds = progress, dict[str, float]()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[Advance]:
        interrupts.check()
        start = time.perf_counter()
        with self.progress(stage) as advance:
            yield advance
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _export(
    model: Model, inputs: Inputs, path: Path, *, judgement: Judgement | None = None, half: bool = False, **options: Any
) -> tuple[Export, Legs]:
    """Write the file, and hold it against the model it was made from, or what that was made from. Folds that break it are undone.

    half: in float16, held against the model in float64 by the limits of float16. Inputs are not scaled by 1000: its range is small.
    """
    judged = functools.partial(_judged, model, inputs, half=half)
    held = judged() if judgement is None or half else judgement
    notes = list[str]()
    if half:
        noise = max((truth.noise for outputs in held.outputs.values() for truth in outputs.values()), default=0.0)
        if not noise <= CAP[torch.float16]:
            notes.append(f"run by torch in float16, the model itself is {noise:.1e} away from float64")
    if isinstance(model, nn.Module):
        options["metadata"] = {"normswap_recipe": recipe_hash(model), **options.get("metadata", {})}
    sizes: list[tuple[Judgement, list[str]]] = []  # judged once: which axes are free does not depend on the folds

    def write(undone: Mapping[str, str]) -> Export:
        _clear(path)
        return export(model, inputs.args, inputs.kwargs, path, half=half, undone=undone, **options)

    def attempt(undone: Mapping[str, str]) -> Attempt[tuple[Export, Legs]]:
        result = write(undone)
        if not sizes and _is_free(result):
            sizes.append(_other_sizes(judged, result))
            if sizes[0][1] and isinstance(model, nn.Module):
                notes.append(f"fixed: {', '.join(sizes[0][1])}; the model itself runs at no other size that was tried")
                options["dynamic"] = "batch"
                result = write(undone)
        legs, said = _legs(held, path, dynamic=result.dynamic)
        level = LEVELS[-1] if runtime(LEVELS[-1]) in legs.parities else REFERENCE
        if _is_free(result) and sizes[0][1]:
            said = (*said, f"not verified: other sizes of {', '.join(sizes[0][1])}; the model runs at none that was tried")
        elif _is_free(result):
            other = {f"{runtime(level)}, other sizes": compare(sizes[0][0], path, level=level)}
            legs = dataclasses.replace(legs, parities={**other, **legs.parities})
        result = dataclasses.replace(result, notes=(*result.notes, *notes, *said))
        result, legs = _with_provider(result, legs, held)
        names = list(dict.fromkeys(site.name for site in result.sites))
        tapped = functools.partial(judged, sites=names, inputs_too=True)
        return _attempt((result, legs), result.sites, undone, result.taps, path, tapped, dynamic=result.dynamic)

    return settle(attempt).result


def _judged(
    model: Model,
    inputs: Inputs,
    asked: Callable[[tuple[Any, ...], Mapping[str, Any]], list[Probe]] | None = None,
    *,
    half: bool,
    sites: Sequence[str] = (),
    inputs_too: bool = False,
) -> Judgement:
    """What the model gives, or what it gives in float16. asked: makes the probes, in place of the usual ones."""
    module, given, wide = as_module(model), (inputs.args, dict(inputs.kwargs)), None
    if half:
        module, given, wide = halved(module), arguments(given), module
    usual = [probe for probe in probes(*given) if not (half and probe.name.endswith(LARGE))] if asked is None else asked(*given)
    return judge(module, *given, wide=wide, asked=usual, sites=sites, inputs=inputs_too)


def _is_free(result: Export) -> bool:
    """Whether more than the batch size is."""
    return any(axis for found in result.free for axis in found)


def _other_sizes(judged: Callable[..., Judgement], result: Export) -> tuple[Judgement, list[str]]:
    """(what the model gives at other sizes than the example's, the free axes of which the model takes no other size)."""
    others: list[tuple[str, Probe]] = []

    def asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Probe]:
        others.extend(resized(args, kwargs, result.free))
        return [Probe("example", args, kwargs), *(probe for _, probe in others)]

    judgement = judged(asked)
    usable = {probe.name for probe in judgement.probes}
    seen = {axis for axis, probe in others if probe.name in usable}
    return judgement, [axis for axis in dict.fromkeys(axis for axis, _ in others) if axis not in seen]


def _with_provider(result: Export, legs: Legs, judgement: Judgement) -> tuple[Export, Legs]:
    """On CUDA as well, where there is one."""
    known = result.cuda
    if known is None:
        return result, legs
    measured: Mapping[str, Parity] = {}
    if runtime(LEVELS[-1]) in legs.parities:
        result, measured = on_provider(result, judgement)
    else:
        result = dataclasses.replace(result, cuda=dataclasses.replace(known, why=legs.not_run[runtime(LEVELS[-1])]))
    name = runtime(cuda.PROVIDER)
    not_run = {} if measured or result.cuda is None else {name: result.cuda.why}
    return result, Legs({**legs.parities, **measured}, {**legs.not_run, **not_run})


def _legs(judgement: Judgement, path: Path, *, dynamic: bool = True) -> tuple[Legs, tuple[str, ...]]:
    """(what comes of an ONNX file in onnxruntime at every optimisation level, and in onnx's evaluator; notes)."""
    parities, not_run = dict[str, Parity](), dict[str, str]()
    notes: tuple[str, ...] = ()
    for level in LEVELS:
        parity = compare(judgement, path, level=level, only_like_example=not dynamic)
        if parity.failure is not None and "NOT_IMPLEMENTED" in parity.failure:
            # onnxruntime has no float64 kernel for Conv, for one. The file is right or wrong all the same.
            reason = f"onnxruntime cannot run this file ({parity.failure.rpartition('NOT_IMPLEMENTED')[2].strip(' :')[:120]})"
            not_run |= {runtime(name): reason for name in LEVELS if runtime(name) not in parities}
            notes = (f"{reason}, so it was verified in {runtime(REFERENCE)}",)
            break
        parities[runtime(level)] = parity
    held = held_at(judgement, path, only_like_example=not dynamic)
    soon = [probe.name for probe in held]
    if not not_run:
        costs = dict(zip(soon, effort.seconds(path, held), strict=True))
        total = itertools.accumulate(sorted(costs.values()))
        soon = [name for name, spent in zip(sorted(costs, key=costs.__getitem__), total, strict=True) if spent <= EVALUATOR_SECONDS]
        if not soon:
            not_run[runtime(REFERENCE)] = f"it would take about {min(costs.values()):.0f} s for one input"
            return Legs(parities, not_run), notes
    parity = compare(judgement, path, level=REFERENCE, only_like_example=not dynamic, only=soon)
    if parity.failure is not None and not not_run:
        not_run[runtime(REFERENCE)] = parity.failure
    else:
        parities[runtime(REFERENCE)] = parity
    return Legs(parities, not_run), notes


def _attempt(
    result: tuple[R, Legs],
    fates: Sequence[Fate],
    undone: Mapping[str, str],
    taps: Sequence[Tap],
    path: Path,
    judgement: Callable[[], Judgement],
    *,
    dynamic: bool = True,
) -> Attempt[tuple[R, Legs]]:
    """What `settle` has to know of a file. The values at the norms are compared only if an output is wrong."""
    legs = result[1]
    if legs.failed is None:
        return Attempt(result, True)
    level = next(level for level in (*LEVELS, REFERENCE, cuda.PROVIDER) if runtime(level) == legs.failed.candidate)
    names = list(dict.fromkeys(tap.name for tap in taps))
    sites = compare(judgement(), path, level=level, only_like_example=not dynamic, sites=names, taps=taps).sites
    return Attempt(
        result,
        False,
        folded=[fate.name for fate in fates if fate.name not in undone],  # what stays is written otherwise, too
        suspects=[d.name for d in sites if not d.passed and d.problem is None],
        why=_broken(legs.failed),
    )


def on_provider(result: Export, judgement: Judgement, provider: str = cuda.PROVIDER) -> tuple[Export, Mapping[str, Parity]]:
    """Where onnxruntime has the provider, one more comparison, and where each kernel ran; elsewhere the export says that it was not run."""
    if result.cuda is None:
        return result, {}
    why = cuda.unavailable(result.path, provider)
    if why is not None:
        return dataclasses.replace(result, cuda=dataclasses.replace(result.cuda, why=why)), {}
    parity = compare(judgement, result.path, level=provider, only_like_example=not result.dynamic)
    if parity.failure is not None:
        return result, {parity.candidate: parity}
    arrays = [tensor.numpy(force=True) for tensor in judgement.probes[0].tensors()]
    placed = cuda.run(result.path, arrays, {site.name: site.left for site in result.sites}, provider=provider)
    known = dataclasses.replace(result.cuda, run=placed, why="")
    return dataclasses.replace(result, cuda=known), {parity.candidate: parity}


def _broken(parity: Parity) -> str:
    bad = next((d for d in parity.outputs if not d.passed), None)
    if parity.failure is not None or bad is None:
        return f"{parity.candidate}: {parity.failure}"
    if bad.problem is not None or bad.non_finite:
        return f"{bad.name} in {parity.candidate} {bad.problem or f'has {bad.non_finite} non-finite mismatches'}"
    return f"{bad.name} in {parity.candidate} was {bad.max_rel:.1e} off, where at most {bad.tolerance:.1e} passes"


def _clear(path: Path) -> None:
    """Take away what an attempt before this one has written."""
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)


def _onnx_facts(exported: Export) -> dict[str, Any]:
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


def _save(conversion: pipeline.Conversion[Any], directory: Path, *, form: str, source: str, factory: str | None) -> None:
    model, name = conversion.model, None
    if isinstance(model, ExportedProgram):
        name = "model.pt2"
        torch.export.save(model, directory / name)
    elif form == "module":
        name = "model.pt"
        torch.save(model, directory / name)
    save_directory(as_module(model), directory, source=source, factory=factory, module=name, inputs=_describe(conversion.inputs))


def _describe(inputs: Inputs) -> list[dict[str, Any]]:
    """Shape and dtype of each input, if each is one tensor; else nothing."""
    named = [*((None, a) for a in inputs.args), *inputs.kwargs.items()]
    if not all(isinstance(value, Tensor) for _, value in named):
        return []
    return [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")} for name, value in named]


def _described(entries: Sequence[Mapping[str, Any]]) -> Inputs | None:
    """Seeded inputs of the recorded shapes."""
    if not entries:
        return None
    tensors = [(entry["name"], make(entry["shape"], getattr(torch, entry["dtype"]), seed=i)) for i, entry in enumerate(entries)]
    return Inputs(tuple(t for name, t in tensors if name is None), {name: t for name, t in tensors if name is not None})


def _factory(arch: str | None) -> Callable[[], nn.Module] | None:
    return None if arch is None else lambda: build(arch)


def _load_any(source: str, *, arch: str | None = None, trust_packages: Sequence[str] = (), trust_pickle: bool = False) -> Model:
    if Path(source).is_dir():
        return load(source, _factory(arch), trust_packages=trust_packages, trust_pickle=trust_pickle)
    loaded: Loaded = load_source(source, arch=arch, trust_packages=trust_packages, trust_pickle=trust_pickle)
    return loaded.model


def _open(side: Model | str | Path, **loading: Any) -> nn.Module | Path:
    """A module, or the path of an ONNX file."""
    if not isinstance(side, (str, Path)):
        return as_module(side)
    if Path(side).suffix == ".onnx":
        if not Path(side).is_file():
            raise LoadError(f"{side} does not exist", hint="give the path of an .onnx file")
        return Path(side)
    if not _takes_arch(str(side)):
        loading = {**loading, "arch": None}
    return as_module(_load_any(str(side), **loading))


def _takes_arch(source: str) -> bool:
    """Whether --arch may be meant for this side: a file of weights, or a directory."""
    return Path(source).is_dir() or Path(source).suffix in (".safetensors", ".pt", ".pth")


def _inputs_of(side: Model | str | Path, opened: nn.Module | Path) -> Inputs | None:
    """The inputs that one side knows: those it was saved with, those it declares, or inferred ones."""
    if isinstance(side, (str, Path)) and Path(side).is_dir():
        known = _described(read_recipe(Path(side)).inputs)
        if known:
            return known
    if isinstance(side, ExportedProgram) and side.example_inputs:
        return Inputs(tuple(side.example_inputs[0]), dict(side.example_inputs[1]), "program")
    if isinstance(opened, Path):
        declared = onnx_inputs(opened)
        return None if declared is None else Inputs(declared)
    return infer(opened)


# --- sensitivity --------------------------------------------------------------------------------------------------------------------


def sensitivity_files(
    source: str,
    *,
    data: str | None = None,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    metric: str | None = None,
    by: By = "rel_l2",
    budget: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    resume: Path | None = None,
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Sensitivity:
    """`sensitivity` for the command line."""
    given = parse(inputs) if inputs else None
    loaded = load_source(source, arch=arch, trust_packages=trust_packages, trust_pickle=trust_pickle)
    return sensitivity(
        loaded.model,
        None if data is None else _batches(data),
        given,
        metric=None if metric is None else _function(metric, "--metric", "a function that takes the model and returns a number"),
        by=by,
        budget=budget,
        include=include,
        exclude=exclude,
        rules=_rules(rules),
        resume=resume,
        progress=progress,
    )


# --- landscape ----------------------------------------------------------------------------------------------------------------------

Form = Literal["original", "converted", "coupled"]


def landscape_files(
    source: str,
    *,
    data: str | None = None,
    loss: str | None = None,
    forms: Sequence[Form] = (),
    steps: Sequence[float] = (),
    layer: str | None = None,
    mode: Mode = "train",
    plot: Path | None = None,
    arch: str | None = None,
    trust_packages: Sequence[str] = (),
    trust_pickle: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Landscape:
    """`landscape` for the command line, before and after a swap.

    forms: SRC as it is, converted, and converted with coupling="auto" from the data; none for all of them if a norm of SRC can be swapped,
    else SRC as it is. steps: none for those of `landscape`.
    """
    if plot is not None:
        check_plot(plot)
    if data is None:
        raise UsageError("a landscape is measured on data, and none were given", hint="--data: batches (x, y)")
    batches = _batches(data)
    model = _load_any(source, arch=arch, trust_packages=trust_packages, trust_pickle=trust_pickle)
    found = landscape(
        dict(_forms(model, forms, batches)),  # type: ignore[arg-type]  # a program: that is refused there
        batches,
        loss=None if loss is None else _function(loss, "--loss", "a function of (output, y) that returns one number"),
        steps=steps or STEPS,
        layer=layer,
        mode=mode,
        progress=progress,
    )
    if plot is not None:
        found.plot(plot)
    return found


def _forms(model: Model, asked: Sequence[Form], data: Sequence[Any]) -> Iterator[tuple[Form, Model]]:
    calibration = [dict(probe.kwargs) or probe.args for probe, _ in called_with(data)]
    module = isinstance(model, nn.Module)  # a program has no modes, and `landscape` says so
    swapped = module and bool(pipeline.plan(model, calibration[0]).swaps)
    for form in asked or (("original", "converted", "coupled") if swapped else ("original",)):
        if form == "original":
            yield form, model
        elif not swapped:
            raise UsageError(
                f"there is nothing to measure as {form}: no norm of the model can be swapped exactly",
                hint="`normswap inspect` tells why; --as original measures the model as it is",
            )
        else:
            options: dict[str, Any] = {"coupling": "auto", "calibration": calibration} if form == "coupled" else {}
            yield form, pipeline.convert(model, calibration[0], **options).model


def _function(spec: str, option: str, meant: str) -> Callable[..., Any]:
    """What package.module:callable names."""
    found = imported(spec, option, meant)
    if not callable(found):
        raise UsageError(f"{option} {spec} is a {type(found).__name__}; expected {meant}")
    return cast("Callable[..., Any]", found)
