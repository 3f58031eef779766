"""The comparisons that a converted directory calls for: with the model that it was made from, and with each ONNX file in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normswap.api.verify import verify
from normswap.errors import LoadError, NormswapError, UsageError, listed
from normswap.files.build import builds_without_code, is_spec
from normswap.files.json_file import read_json
from normswap.files.recipe import RECIPE, Recipe, read_recipe
from normswap.parity.result import Parity
from normswap.versions import REPORT_VERSION

SOURCE = "source"
REPORTS = ("report.json", "report.html")
OWN_CODE = "--trust runs it, if these files are your own"


@dataclass(frozen=True)
class Check:
    """One comparison of a converted directory.

    name     "source", or the name of an ONNX file of the directory
    arch     what builds the architecture, where files hold weights alone
    trust    whether to import what recipe.json names, and to run what a file wants to; trust_packages: packages whose classes it may use
    not_run  why the comparison cannot be made, or None
    error    why it fails before it is made, or None
    """

    directory: Path
    name: str
    reference: str
    candidate: str
    arch: str | None = None
    trust: bool = False
    trust_packages: Sequence[str] = ()
    not_run: str | None = None
    error: NormswapError | None = None

    def run(self, *, tolerance: float | None = None, thorough: bool = False) -> Parity:
        """Make the comparison. Raises as `verify` does."""
        if self.error is not None:
            raise self.error
        loading: dict[str, Any] = {"arch": self.arch, "trust": self.trust, "trust_packages": self.trust_packages}
        return verify(self.reference, self.candidate, tolerance=tolerance, thorough=thorough, **loading)


def converted_below(path: Path) -> list[Path]:
    """The converted directories at and below `path`, sorted. Raises UsageError if there is none: nothing would be checked."""
    if path.is_file():
        raise UsageError(f"{path} is a file, and is compared with nothing", hint="normswap verify REFERENCE CANDIDATE compares two")
    found = sorted(recipe.parent for recipe in path.rglob(RECIPE)) if path.is_dir() else []
    if not found:
        what = f"no converted directory is at or below {path}" if path.is_dir() else f"there is no directory {path}"
        raise UsageError(what, hint=f"`normswap convert SRC -o DIR` writes one, with a {RECIPE} in it")
    return found


def checks_of(directory: Path, *, trust: bool = False, trust_packages: Sequence[str] = ()) -> tuple[Check, ...]:
    """The comparisons that a converted directory calls for. Those that cannot be made are among them, with the reason.

    trust: import what recipe.json names, and read a .pt2; see SECURITY.md.
    """
    here = str(directory)
    try:
        recipe = read_recipe(directory)
    except NormswapError as error:
        return (Check(directory, SOURCE, SOURCE, here, error=error),)
    untrusted = None if trust or recipe.factory is None or builds_without_code(recipe.factory) else _untrusted(recipe.factory)
    known = Check(directory, SOURCE, here, here, recipe.factory, trust, trust_packages, error=untrusted)
    if recipe.module is None and recipe.factory is None:
        known = replace(known, not_run="it holds weights, and nothing that builds the model")
    lacking = _lacking(directory, recipe)
    files = sorted({path.name for path in directory.glob("*.onnx")} | {name for name in lacking if name.endswith(".onnx")})
    with_files = (replace(known, name=name, candidate=str(directory / name)) for name in files)
    return (
        _with_source(known, recipe, lacking.difference(files)),
        *(replace(each, error=_not_whole(directory, {each.name}), not_run=None) if each.name in lacking else each for each in with_files),
    )


def _with_source(known: Check, recipe: Recipe, lacking: set[str]) -> Check:
    """The comparison of a directory with the model that it was made from. lacking: files that it should have."""
    try:
        reference, not_run = _source(recipe, known.directory, known.trust)
    except LoadError as error:
        return replace(known, reference=recipe.source or SOURCE, error=error)
    if lacking:
        return replace(known, reference=reference, error=_not_whole(known.directory, lacking), not_run=None)
    return replace(known, reference=reference, not_run=not_run or known.not_run)


def _untrusted(factory: str) -> LoadError:
    return LoadError(f"{RECIPE} names {factory!a} as what builds the model, and to import that is to run code", hint=OWN_CODE)


def _lacking(directory: Path, recipe: Recipe) -> set[str]:
    """The names of the files that a directory was written with, reports aside, and that are not there."""
    return {name for name in recipe.files or () if name not in REPORTS and not (directory / name).is_file()}


def _not_whole(directory: Path, lacking: set[str]) -> LoadError:
    return LoadError(
        f"{directory} was written with {listed(sorted(lacking))}, which is not there any more",
        hint=f'was the directory copied, or committed, whole? If it is meant, take the name out of "files" in {directory / RECIPE}',
    )


def _source(recipe: Recipe, directory: Path, trust: bool) -> tuple[str, str | None]:
    """The model that a directory was made from, and why it cannot be compared with it, or None."""
    source = recipe.source
    if source is None:
        return SOURCE, "no source was recorded: the model was saved after its conversion"
    if is_approximate(directory):
        return source, "it is an approximate conversion, which is not the same function"
    if builds_without_code(source):
        return source, "its source would be fetched" if "@" in source else None
    if is_spec(source) and not Path(source).exists():
        if not trust:
            raise _untrusted(source)
        return source, None
    # a relative source was named from the directory in which the conversion ran, often the root of a repository
    roots = (Path(), *directory.resolve().parents)
    places = (*(root / source for root in roots), directory.parent / Path(source).name, directory / Path(source).name)
    found = next((place for place in places if place.is_file()), None)
    return (str(found), None) if found else (source, f"its source {source!a} is not here")


def is_approximate(directory: Path) -> bool:
    """Whether report.json says that a layer of a converted directory was swapped approximately."""
    path = directory / "report.json"
    try:
        report: Any = read_json(path)
        version = report["version"]
        if version != REPORT_VERSION:
            raise LoadError(
                f"{path} is a report of version {version}; expected {REPORT_VERSION}", hint="use the normswap that wrote it, or newer"
            )
        return any(swap["preserves"] == "approximate" for swap in report["plan"]["swaps"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is not a report that normswap wrote: {error}", hint="convert again") from error


def all_checks(path: Path, *, trust: bool = False, trust_packages: Sequence[str] = ()) -> Iterator[Check]:
    """The comparisons of every converted directory at and below `path`."""
    for directory in converted_below(path):
        yield from checks_of(directory, trust=trust, trust_packages=trust_packages)
