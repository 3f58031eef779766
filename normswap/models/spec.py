"""Imports an object by "package.module:attribute". The working directory is importable, as with `python -m`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from normswap.errors import NormswapError, UsageError, described

SPEC = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*(\.[^\W\d]\w*)*)")


def imported(spec: str, option: str, meant: str, error_type: type[NormswapError] = UsageError) -> Any:
    """The object that `spec` names. Importing runs its module.

    option, meant: for messages, the name of the option ("" if there is none) and what the spec should name. Raises `error_type` if the
    module cannot be imported or has no such attribute.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise error_type(f"{option} {spec!r} does not name {meant}", hint=f"expected package.module:NAME, where NAME is {meant}")
    module, attributes = match["module"], match["attribute"]
    where = f"{option} {spec}".lstrip()
    make_working_directory_importable()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and is_within(module, [error.name]):
            hint = f"it is looked for among the installed packages and in {os.getcwd()}"
            raise error_type(f"{where}: there is no module {error.name}", hint=hint) from error
        raise error_type(f"{where}: importing {module} needs the module {error.name}, which is not installed") from error
    except Exception as error:  # it is the user's code
        raise error_type(f"{where}: importing {module} raised {described(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise error_type(f"{where}: {module} has no {attributes}", hint=f"after the colon stands {meant}")
        found = getattr(found, attribute)
    return found


def is_within(module: str, packages: Iterable[str]) -> bool:
    """Whether a dotted name is one of these packages or a module inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def make_working_directory_importable() -> None:
    """Add the working directory to sys.path for good, as a model may import modules when it runs."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
