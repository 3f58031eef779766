"""What is said of a file that is not read, and what to do then."""

from __future__ import annotations

import pickletools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import torch

from normswap.errors import LoadError, UnsafePickleError, first_line

if TYPE_CHECKING:
    from normswap.files.pickles.review import Judge

_KNOWN = frozenset({"torch", "torchvision", "timm", "transformers", "normswap", "__main__", "__builtin__"})


def reason(error: Exception) -> str:
    """What it says, in one line, without the advice that torch adds."""
    return first_line(error).partition("  (Could this error")[0]


def damaged(name: str, why: str) -> LoadError:
    return LoadError(f"{name} is damaged: {why}", hint="copy or save it again")


def not_a_model(name: str) -> LoadError:
    return LoadError(
        f"{name} is not a model file: neither a torch.save archive nor safetensors nor a torch.export program",
        hint="give a .pt, .pth, .pt2 or .safetensors file, or torchvision:NAME, timm:NAME, hf:DIRECTORY or package.module:factory",
    )


def mismatched_torchvision(error: Exception) -> LoadError | None:
    """torchvision of another build than torch fails to import with a message about one of its operators."""
    if "torchvision::" not in str(error):
        return None
    import importlib.metadata as metadata

    return LoadError(
        f"torchvision {metadata.version('torchvision')} and torch {torch.__version__} are builds that do not fit each other: "
        f"torchvision cannot be imported ({reason(error)})",
        hint="install both from the same place, for example: pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    )


def raise_wanted(judge: Judge, name: str) -> None:
    """UnsafePickleError, if the judge has refused anything."""
    if not judge.wanted:
        return
    wanted = tuple(judge.wanted)
    listed = "".join(f"\n  {item}" for item in wanted[:20]) + (f"\n  ... and {len(wanted) - 20} more" if len(wanted) > 20 else "")
    raise UnsafePickleError(
        f"{name} is a pickle that wants to run code that nobody vouched for:{listed}", hint=_advice(wanted, judge.trusted), wanted=wanted
    )


def _advice(wanted: Sequence[str], trusted: Sequence[str]) -> str:
    """What to do, if the file is worth it."""
    tops = {re.split(r"\W", item)[0] for item in wanted}
    by_arch = "save model.state_dict() and load that with --arch"
    if tops == {"__main__"}:
        return f"its class was defined in a script, and scripts are not run here: {by_arch}"
    strangers = sorted(
        top for top in tops if top not in sys.stdlib_module_names and top not in _KNOWN and top not in trusted and top.isidentifier()
    )
    if strangers and len(strangers) == len(tops):
        flags = " ".join(f"--trust-package {name}" for name in strangers)
        return f"{flags} allows nn.Module classes from there, if you trust that package; or {by_arch}"
    return f"{by_arch}; or, if you trust whoever made this file with everything on this account, --trust"


def names_of_any_protocol(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """What a pickle names, roughly: for the text of a refusal, never for a decision."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    top = ""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                yield module, name
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                yield strings[-2], strings[-1]
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                yield "copyreg", f"extension_{argument}"
            if opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if argument is None else int(str(argument))] = top
                continue
            if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                argument = memo.get(int(str(argument)))
            top = argument if isinstance(argument, str) else ""
            if top:
                strings.append(top)
    except Exception:  # garbage past the interesting part
        return
