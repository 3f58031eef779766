"""package.module:attribute -> the object. The working directory is importable, as `python -m` has it and the console script has not."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from normswap.errors import UsageError

SPEC = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*(\.[^\W\d]\w*)*)")


def imported(spec: str, option: str, meant: str) -> Any:
    """The object that `spec` names. option, meant: how a message calls the option, and what stands after the colon.

    Raises UsageError if the module cannot be imported or has no such attribute. Importing runs the module.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"{option} {spec!r} does not name {meant}", hint=f"expected package.module:NAME, where NAME is {meant}")
    make_working_directory_importable()
    try:
        found: Any = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        if error.name and (match["module"] + ".").startswith(error.name + "."):
            hint = f"it is looked for among the installed packages and in {os.getcwd()}"
            raise UsageError(f"{option} {spec}: there is no module {error.name}", hint=hint) from error
        raise UsageError(f"{option} {spec}: importing {match['module']} needs the module {error.name}, which is not installed") from error
    except Exception as error:  # it is the user's code
        raise UsageError(f"{option} {spec}: importing {match['module']} raised {type(error).__name__}: {error}") from error
    for attribute in match["attribute"].split("."):
        if not hasattr(found, attribute):
            raise UsageError(f"{option} {spec}: {match['module']} has no {match['attribute']}", hint=f"after the colon stands {meant}")
        found = getattr(found, attribute)
    return found


def make_working_directory_importable() -> None:
    """It stays so: a model may import when it runs."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
