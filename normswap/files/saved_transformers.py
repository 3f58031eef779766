"""Whether a directory that transformers saved asks for more than transformers and the files in it: for code, a kernel, a download."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normswap.files.atomic import read_json

_PARTS = ("architecture", "backbone")  # keys of a configuration under which the name of another model stands
_WEIGHTS = "transformers_weights"  # the key under which the name of a file stands


def problem(directory: Path) -> str | None:
    """What it asks for, going on from the name of the directory; None if that is nothing. Raises as `read_json` does."""
    config = read_json(directory / "config.json")
    if not isinstance(config, Mapping):
        return "has a config.json that is no JSON object"
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names)):
        return "has a config.json whose architectures are not names of classes"
    if (directory / "adapter_config.json").exists():
        return "holds an adapter (adapter_config.json), which names the model that it belongs to, to be fetched"
    for key, value in _entries(config):
        if "implementation" in key and not _is_word(value):
            return f"asks for a kernel from the hub: {key} is {value!a:.80}"
        if key in _PARTS and isinstance(value, str) and not re.fullmatch(r"[\w.-]*", value):
            return f"asks for another model, to be fetched: {key} is {value!a:.80}"
        if key == _WEIGHTS and not (value is None or _is_plain(value)):
            return f"keeps its weights in {value!a:.80}, which is not a file in it"
    for index in sorted(directory.glob("*.index.json")):
        content = read_json(index)
        files = content.get("weight_map") if isinstance(content, Mapping) else None
        if not isinstance(files, Mapping):
            return f"has an {index.name} without a weight_map"
        if outside := [value for value in files.values() if not _is_plain(value)]:
            return f"keeps weights in {outside[0]!a:.80}, which is not a file in it"
    return None


def _entries(thing: Any) -> Iterator[tuple[str, Any]]:
    stack = [thing]
    while stack:
        thing = stack.pop()
        if isinstance(thing, Mapping):
            yield from thing.items()
            stack.extend(thing.values())
        elif isinstance(thing, list):
            stack.extend(thing)


def _is_word(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_word, value.values()))
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.isidentifier())


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w][\w.-]*", name) is not None
