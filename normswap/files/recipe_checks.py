"""Whether recipe.json says what normswap writes there. It is a file like any other: somebody else may have made it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from normswap.layer.batchless_norm import AUXES
from normswap.layer.formulas import STATS, STD_FORMS

MODULES = ("model.pt", "model.pt2")  # the files that a recipe may name, and never a path
LARGEST_INPUT = 2**31  # elements
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}

Test = Callable[[Any], bool]


def problem(content: object) -> str | None:
    """What is wrong with it, in a few words; None if nothing is."""
    if not isinstance(content, Mapping):
        return "it is no JSON object"
    for name, test in _OF_ALL.items():
        if not test(content.get(name)):
            return f"its {name} is not one"
    for name, tests, missing in (
        ("sites", _OF_SITE, _NEEDED),
        ("inputs", _OF_INPUT, ("name", "shape", "dtype")),
        ("rules", _OF_RULE, tuple(_OF_RULE)),
        ("training", _OF_TRAINING, tuple(_OF_TRAINING)),
    ):
        for entry in content.get(name) or ():
            if not isinstance(entry, Mapping):
                return f"one of its {name} is no JSON object"
            if lacking := [key for key in missing if key not in entry]:
                return f"one of its {name} lacks its {lacking[0]}"
            if wrong := [key for key, test in tests.items() if key in entry and not test(entry[key])]:
                return f"one of its {name} has a {wrong[0]} that is not one"
    return None


def builds_without_code(factory: str) -> bool:
    """Whether a spec is one that only builds a known model. The other kind imports a module and calls what it finds there."""
    return factory.startswith(("torchvision:", "timm:", "hf:"))


def is_trusted(spec: str, packages: tuple[str, ...]) -> bool:
    """Whether package.module:NAME is in one of these packages."""
    module = spec.partition(":")[0]
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _number(value: object) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _shape(value: object) -> bool:
    return isinstance(value, list) and all(_whole(size) and size >= 0 for size in value) and math.prod(value) <= LARGEST_INPUT


def _word(*known: object) -> Test:
    return lambda value: isinstance(value, str) and value in known


_OF_ALL: Mapping[str, Test] = {
    "source": _or_none(_text),
    "factory": _or_none(_text),
    "module": _or_none(_word(*MODULES)),
    "inputs": lambda value: isinstance(value, list),
    "sites": lambda value: isinstance(value, list),
    "rules": _or_none(lambda value: isinstance(value, list)),
    "training": _or_none(lambda value: isinstance(value, list)),
    "frozen": _or_none(_list_of(_text)),
    "files": _or_none(lambda value: isinstance(value, Mapping) and all(map(_text, value.values()))),
}
_NEEDED = ("name", "class", "std")
_OF_SITE: Mapping[str, Test] = {
    "name": _text,
    "aliases": _list_of(_text),
    "class": _text,
    "num_features": _list_of(_whole),
    "channel_axis": _list_of(_whole),
    "shared_axes": _list_of(_whole),
    "affine": _flag,
    "std": _word(*STD_FORMS),
    "aux": _word(*AUXES),
    "stats": _word(*STATS),
    "momentum": _number,
    "calls": lambda value: _whole(value) and value > 0,
    "eps": _or_none(_number),
}
_OF_INPUT: Mapping[str, Test] = {
    "name": _or_none(_text),
    "shape": _shape,
    "dtype": _word(*_DTYPES),
    "high": lambda value: _whole(value) and value > 0,
}
_OF_RULE: Mapping[str, Test] = {"kind": _text, "rule": _or_none(_text), "sites": _list_of(_text)}
_OF_TRAINING: Mapping[str, Test] = {
    "name": _text,
    "producer": _or_none(_text),
    "feedback": _flag,
    "guard": _flag,
    "pace": lambda value: _number(value) and 0 < value <= 1,
}
