"""Every error that normswap raises on purpose.

    NormswapError            exit 1   cannot convert
    ├── UsageError           exit 2   an option or argument is not valid, or an input is missing
    ├── LoadError            exit 1   a model file cannot be read as a model
    │   └── UnsafePickleError         ... because it wants to run code that nobody vouched for
    ├── SwapError            exit 1   the plan could not be carried out on this model
    ├── ExportError          exit 1   no ONNX file can be made of this model
    └── ParityError          exit 3   converted, but the result is not the same function; in `parity.result`, with the measurements

A message says what is wrong, where (the qualified name of the layer), and what was expected against what was found;
`hint` says what to do next. Exceptions of other classes in this package are internal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class NormswapError(Exception):
    """The root: catch this to catch everything that normswap raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters; its type if the message is empty."""
    return (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__


def described(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def first_words(error: BaseException) -> str:
    """The type of an error, and its text up to the first line without a colon at its end: torch and onnx begin with headings."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), 0)
    return f"{type(error).__name__}: {' '.join(lines[: last + 1])[:300]}"


def shown(text: str, *, line: bool = False) -> str:
    """Text that is safe to print: control sequences and unprintable characters are written as escapes. line: line ends, too.

    Names of layers, of tensors in an ONNX file and of files come from others, and may hold sequences that move the cursor, rewrite what is
    on the screen or turn the direction of writing.
    """
    return "".join(c if c.isprintable() or (c == "\n" and not line) else c.encode("unicode_escape").decode() for c in text)


def one_of(name: str, value: object, known: Iterable[object]) -> None:
    """Raise UsageError unless the value of the option `name` is one of the `known` ones."""
    if value not in (known := tuple(known)):
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def few(items: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names of a list, in one line, and how many more there are."""
    listed = ", ".join(shown(item, line=True) for item in items[:limit])
    return listed + (f" ... and {len(items) - limit} more" if len(items) > limit else "")


def kind_of(thing: object) -> str:
    """The type of an object for a message: `a Tensor`, `an OrderedDict`, `None`."""
    name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    return f"a{'n' if name[:1].lower() in 'aeiou' else ''} {name}" if thing is not None else "None"


class UsageError(NormswapError):
    """An option or argument is not valid, or an input is missing."""

    exit_code = 2


class LoadError(NormswapError):
    """A file or name does not lead to a model."""


class UnsafePickleError(LoadError):
    """The file is a pickle that wants to run code that nobody vouched for. `wanted` lists it."""

    def __init__(self, message: str, *, hint: str | None = None, wanted: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.wanted = wanted


class SwapError(NormswapError):
    """The plan could not be carried out on this model."""


class ExportError(NormswapError):
    """No ONNX file can be made of this model."""
