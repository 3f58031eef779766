"""The comparisons that a converted directory calls for: with the model that it was made from, and with each ONNX file in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normswap.api.verify import verify
from normswap.errors import LoadError, UsageError
from normswap.files.build import builds_without_code, is_spec
from normswap.files.json_file import read_json
from normswap.files.recipe import RECIPE, Recipe, read_recipe
from normswap.parity.result import Parity

SOURCE = "source"


@dataclass(frozen=True)
class Check:
    """One comparison of a converted directory.

    name     "source", or the name of an ONNX file of the directory
    arch     what builds the architecture, where files hold weights alone
    not_run  why the comparison cannot be made, or None
    """

    directory: Path
    name: str
    reference: str
    candidate: str
    arch: str | None = None
    trust: bool = False
    not_run: str | None = None

    def run(self, *, tolerance: float | None = None, thorough: bool = False) -> Parity:
        """Make the comparison. Raises as `verify` does."""
        return verify(self.reference, self.candidate, tolerance=tolerance, thorough=thorough, arch=self.arch, trust=self.trust)


def converted_below(path: Path) -> list[Path]:
    """The converted directories at and below `path`, sorted. Raises UsageError if there is none: nothing would be checked."""
    if path.is_file():
        raise UsageError(f"{path} is a file, and is compared with nothing", hint="normswap verify REFERENCE CANDIDATE compares two")
    found = sorted(recipe.parent for recipe in path.rglob(RECIPE)) if path.is_dir() else []
    if not found:
        what = f"no converted directory is at or below {path}" if path.is_dir() else f"there is no directory {path}"
        raise UsageError(what, hint=f"`normswap convert SRC -o DIR` writes one, with a {RECIPE} in it")
    return found


def checks_of(directory: Path, *, trust: bool = False) -> tuple[Check, ...]:
    """The comparisons that a converted directory calls for, those included that cannot be made, with the reason.

    trust: import what recipe.json names, and read a .pt2; see SECURITY.md. Raises LoadError if the directory has no valid recipe.
    """
    recipe = read_recipe(directory)
    arch = recipe.factory
    untrusted = arch is not None and not trust and not builds_without_code(arch)
    why = f"recipe.json names {arch!a} as what builds the model, and to import that is to run code: trust it first" if untrusted else None
    if recipe.module is None and arch is None:
        why = "it holds weights, and nothing that builds the model"
    here = str(directory)
    reference, why_not = _source(recipe, directory, trust)
    found = [Check(directory, SOURCE, reference, here, arch, trust, why_not or why)]
    return (*found, *(Check(directory, path.name, here, str(path), arch, trust, why) for path in sorted(directory.glob("*.onnx"))))


def _source(recipe: Recipe, directory: Path, trust: bool) -> tuple[str, str | None]:
    """The model that a directory was made from, and why it cannot be compared with it, or None."""
    source = recipe.source
    if source is None:
        return "", "no source was recorded: the model was saved after its conversion"
    if is_approximate(directory):
        return source, "it is an approximate conversion, which is not the same function"
    if builds_without_code(source):
        return source, "its source would be fetched" if "@" in source else None
    if is_spec(source) and not Path(source).exists():
        return source, None if trust else f"its source {source!a} is code, and to import that is to run it: trust it first"
    known = [path for path in (Path(source), directory.parent / source, directory / Path(source).name) if path.is_file()]
    return (str(known[0]), None) if known else (source, f"its source {source!a} is not here")


def is_approximate(directory: Path) -> bool:
    """Whether report.json says that a layer of a converted directory was swapped approximately."""
    try:
        report: Any = read_json(directory / "report.json")
        return any(swap["preserves"] == "approximate" for swap in report["plan"]["swaps"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{directory / 'report.json'} is not a report that normswap wrote: {error}", hint="convert again") from error


def all_checks(path: Path, *, trust: bool = False) -> Iterator[Check]:
    """The comparisons of every converted directory at and below `path`."""
    for directory in converted_below(path):
        yield from checks_of(directory, trust=trust)
