"""Turns the values of options into objects: models, inputs, batches, rules, functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from normswap.api.sensitivity import NEIGHBOURS, Metric
from normswap.api.verify import load_any
from normswap.cli.options import Loading, Running
from normswap.detect.sites import Rule
from normswap.errors import NormswapError, UsageError, described, kind_of
from normswap.files.images import Images, image_files, preparation
from normswap.files.load import Loaded, load
from normswap.files.texts import Texts, paragraphs_of, text_files, tokenizer_of
from normswap.healing.distance import positions
from normswap.healing.losses import KL
from normswap.healing.run import Loss
from normswap.models.batches import arguments_of, check_batches, samples_in
from normswap.models.inputs import SAMPLES, Inputs, as_batches, parse
from normswap.models.programs import Model, as_module
from normswap.models.spec import SPEC, imported
from normswap.models.torch_private import tree_map_only
from normswap.rules import DEFAULT_RULES
from normswap.rules.user_rules import named


def loaded(source: str, loading: Loading) -> Loaded:
    """The model of SRC, and where it came from."""
    return load(source, arch=loading.arch, trust_packages=loading.trust_packages, trust=loading.trust)


def opened(source: str, loading: Loading) -> Model:
    """The model of SRC, which may be a converted directory too."""
    return load_any(source, arch=loading.arch, trust_packages=loading.trust_packages, trust=loading.trust)


def parsed(specs: Sequence[str]) -> Inputs | None:
    """The example inputs of --input; None without this option."""
    return parse(specs) if specs else None


def rules_of(specs: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that --rule names, before the default ones."""
    return (*(named(spec) for spec in specs), *DEFAULT_RULES)


def function_of(spec: str, option: str, meant: str) -> Callable[..., Any]:
    """The function that package.module:NAME names."""
    found = imported(spec, option, meant)
    if not callable(found):
        raise UsageError(f"{option} {spec} is {kind_of(found)}; expected {meant}", hint="give package.module:function")
    return cast("Callable[..., Any]", found)


def metric_of(spec: str | None) -> Metric | Literal["neighbours"] | None:
    """What --metric names: the metric that is built in, or a function; None without this option."""
    if spec is None:
        return None
    return NEIGHBOURS if spec == NEIGHBOURS else function_of(spec, "--metric", "a function that takes the model and returns a number")


def loss_of(spec: str | None) -> Loss | Literal["kl"] | None:
    """What --loss names: the loss that is built in, or a function; None without this option."""
    if spec is None:
        return None
    what = "a function that takes a batch, the output, and the original's output, and returns a number"
    return "kl" if spec == KL else function_of(spec, "--loss", what)


@dataclass(frozen=True)
class Stream:
    """What a model is healed on.

    held_out: batches that `batches` does not have; None if the first of those are to be held out. note: how they were prepared
    """

    batches: Iterable[Any]
    held_out: Sequence[Any] | None
    model: nn.Module
    note: str | None = None

    def first(self, count: int) -> list[Any]:
        """The first batches, of so many positions or a few more."""
        found, seen = [], 0
        for batch in self.batches:
            found.append(batch)
            seen += positions(batch, self.model)
            if seen >= count:
                break
        return found


def stream_of(spec: str, model: Model, source: str, running: Running, tokenizer: str | None, length: int) -> Stream:
    """The batches of --data for a long training: text and images as they are needed, a factory called again for each epoch, or those of
    `batches_of`, of which a single one is cut into smaller ones.

    source, running: where the model is from, and its input, which say how it takes images. tokenizer: the directory of one, for text; None:
    the source. length: tokens of a text at most. Where a directory has texts and images, what there is more of is meant.
    """
    path, module = Path(spec), as_module(model)
    files, pictures = (text_files(path), image_files(path)) if path.exists() else ([], [])
    if len(pictures) > len(files):
        given = next((x for x in (parse(running.inputs).args if running.inputs else ()) if isinstance(x, Tensor) and x.dim() == 4), None)
        prepare, words = preparation(module, [each for each in (source, running.arch) if each], None if given is None else given.shape)
        images = Images(pictures, prepare, next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32))
        return Stream(images, images.held_out, module, f"{len(pictures)} images, {words}")
    if files:
        known = tokenizer_of(tokenizer or source.removeprefix("hf:"))
        most = getattr(getattr(module, "config", None), "max_position_embeddings", None) or length
        texts = Texts(paragraphs_of(files), known, length=min(length, most, known.model_max_length))
        return Stream(texts, texts.held_out, module)
    if not path.exists() and SPEC.fullmatch(spec) is not None:
        return Stream(_Calls(spec), None, module)
    batches = batches_of(spec, model)
    return Stream(_cut(batches[0], module) if len(batches) == 1 else batches, None, module)


def _cut(batch: Any, model: nn.Module) -> list[Any]:
    """All samples of a data set, which a file has as one batch, in batches of SAMPLES."""
    count = samples_in(*arguments_of(batch, model))

    def part(t: Tensor, begin: int) -> Tensor:
        return t[begin : begin + SAMPLES] if t.dim() and len(t) == count else t

    return [tree_map_only(Tensor, functools.partial(part, begin=i), batch) for i in range(0, count, SAMPLES)] or [batch]


@dataclass(frozen=True)
class _Calls:
    """What a factory of batches returns, called anew each time. spec: its name, package.module:factory."""

    spec: str

    def __iter__(self) -> Iterator[Any]:
        factory = function_of(self.spec, "--data", "a function that returns batches")
        try:
            found = factory()
            check_batches(found, f"--data {self.spec}: the factory returned")
            yield from found
        except NormswapError:
            raise
        except Exception as error:  # it is the user's code
            raise UsageError(f"--data {self.spec}: the factory raised {described(error)}", hint="it is called without arguments") from error


def batches_of(spec: str, model: Model) -> Sequence[Any]:
    """The batches of --data: from a .pt file with a list of batches; a .pt, .npz or .npy file with one; a directory of such files; or
    package.module:factory, which returns or yields batches. model: decides how the list in a file is interpreted.
    """
    path = Path(spec)
    files = sorted(p for p in (path.iterdir() if path.is_dir() else [path]) if p.suffix in (".pt", ".pth", ".npz", ".npy"))
    if path.exists():
        if not files:
            raise UsageError(
                f"--data {spec} {'holds' if path.is_dir() else 'is'} no .pt, .npz or .npy file",
                hint="each file is one batch, or a list of them; heal takes images, and text files called .txt or .md, too",
            )
        return [batch for file in files for batch in _batches_in(file, as_module(model))]
    if SPEC.fullmatch(spec) is None:
        raise UsageError(f"--data {spec} is no file, no directory and no package.module:factory", hint="a factory returns batches")
    return list(_Calls(spec))


def _batches_in(file: Path, model: nn.Module) -> list[Any]:
    found = parse([str(file)], "--data")
    return as_batches(found.listed, model, f"--data {file}") if found.listed else [found.kwargs or found.args]
