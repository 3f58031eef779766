"""Makes lists of what docstrings say of parameters and fields, which Markdown would run together: an extension of griffe, see mkdocs.yml.

inputs: what they are. tolerance: another       a parameter of the function, then a colon
nodes     how often each operator occurs        a field, then two spaces or more; further lines are indented
"""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*)(?:\(.*?\))? {2,}(\S.*)$")


class Lists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            names = [parameter.name for parameter in obj.parameters] if isinstance(obj, griffe.Function) else []
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(fields(parameters(paragraph, names)) for paragraph in paragraphs)


def parameters(paragraph: str, names: list[str]) -> str:
    """The paragraph with an item for each `name: text`, if it begins with one."""
    if not names or paragraph.startswith("    "):
        return paragraph
    any_name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    mark = re.compile(rf"(^|(?<=[.;)] )|(?<=\n))((?:{any_name})(?:, (?:{any_name}))*): ")
    text = re.sub(r"\n +", " ", paragraph)
    if not mark.match(text):
        return paragraph
    return mark.sub(lambda match: f"\n- `{match[2]}`: ", text).strip()


def fields(paragraph: str) -> str:
    """The paragraph with an item for each field, if its first line is one."""
    lines = paragraph.split("\n")
    if not FIELD.match(lines[0]):
        return paragraph
    items: list[str] = []
    for line in lines:
        match = FIELD.match(line)
        if match:
            items.append(f"- `{match[1]}`: {match[2]}")
        else:
            items[-1] += " " + line.strip()
    return "\n".join(re.sub(r" {3,}([a-z_]\w*) {2,}", r"\n- `\1`: ", item) for item in items)
