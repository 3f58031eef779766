"""Reads files of torch.save, zip archives or the older plain form: after a review, or without one if the user trusts the file."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import torch

from normswap.errors import LoadError, described
from normswap.files.pickles.interpreter import MAX_PICKLE, Broken, Global, Interpreter, Storage, UnknownOpcode
from normswap.files.pickles.review import Reviewer, reason
from normswap.files.pickles.wrappers import stand_in, without_stand_ins
from normswap.models.torch_private import PyTorchFileReader


def read(file: IO[bytes], name: str, *, trust_packages: Sequence[str] = ()) -> Any:
    """The object in a file of torch.save, on the CPU. Raises UnsafePickleError if it may not be read, LoadError if it cannot be."""
    allowed = review(file, name, trust_packages=trust_packages)
    # On exit the context removes the globals that it was given, so those that the caller has allowed before are left out.
    present = torch.serialization.get_safe_globals()
    new: list[Any] = [entry for entry in ((found, path) for path, found in allowed.items()) if entry not in present]
    file.seek(0)
    try:
        with torch.serialization.safe_globals(new), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch raise has no common type
        raise LoadError(f"{name} cannot be read: {reason(error)}", hint="it may be damaged: copy or save it again") from error
    return without_stand_ins(found, name)


# --- trusted --------------------------------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Runs the whole pickle, but reads wrappers of a model as stand-ins, as some cannot be restored outside a training run."""

    def find_class(self, module: str, name: str, /) -> Any:
        return stand_in(f"{module}.{name}") or super().find_class(module, name)


class _Pickle:
    """The attributes that torch.load needs in a `pickle_module`."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def read_trusted(file: IO[bytes], name: str) -> Any:
    """The object in a file of torch.save, without a review: the file may run any code with all rights of this account."""
    file.seek(0)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return without_stand_ins(torch.load(file, map_location="cpu", weights_only=False, pickle_module=_Pickle), name)
    except LoadError:
        raise
    except Exception as error:
        hint = None
        if isinstance(error, AttributeError | ImportError):
            hint = "the class must be importable here: run in the directory of its code, or use a state dict with --arch"
        raise LoadError(f"{name} cannot be loaded: {described(error)}", hint=hint) from error


# --- the review of a whole file -------------------------------------------------------------------------------------------------------


def review(file: IO[bytes], name: str, *, trust_packages: Sequence[str] = ()) -> dict[str, Any]:
    """name -> class or function that this file needs to be read. Raises UnsafePickleError if one of them may not be used."""
    file.seek(0)
    reviewer = Reviewer(trust_packages)
    if file.read(4) == b"PK\x03\x04":
        archive = open_archive(file, name)
        if not archive.has_record("data.pkl"):
            raise LoadError(f"{name} is a zip archive without a model in it", hint="give a file that torch.save wrote")
        try:
            program = io.BytesIO(archive.get_record("data.pkl"))
        except Exception as error:  # what the reader raises on a damaged archive has no common type
            raise _damaged(name, reason(error)) from None
        if len(program.getbuffer()) > MAX_PICKLE:
            raise LoadError(
                f"{name} describes its model in {len(program.getbuffer()) >> 20} MiB, more than the {MAX_PICKLE >> 20} MiB that are read"
            )
        storages = _reviewed_storages(program, reviewer, name)
        for storage in storages:
            record = f"data/{storage.key}"
            held = archive.get_record_size(record) if archive.has_record(record) else 0
            if held < storage.numel * storage.itemsize:
                raise _damaged(name, f"its tensor {storage.key!a} should have {storage.numel * storage.itemsize} bytes, but has {held}")
    else:
        storages = _review_plain_form(file, reviewer, name)
        claimed = sum({storage.key: storage.numel * storage.itemsize for storage in storages}.values())
        if claimed > (size := _size(file)):
            raise _damaged(name, f"its tensors should have {claimed} bytes, but the whole file has {size}")
    sizes = {storage.key: storage.numel for storage in storages}
    if any(sizes[storage.key] != storage.numel for storage in storages):  # the first would serve all, too small for some
        raise _damaged(name, "it gives one tensor storage two sizes")
    return reviewer.objects


def _review_plain_form(file: IO[bytes], reviewer: Reviewer, name: str) -> list[Storage]:
    """The storages of a file before torch 1.6: five pickles (magic number, version, system, object, storage keys), then the data."""
    file.seek(0)
    if file.read(1) != pickle.PROTO:
        raise LoadError(
            f"{name} is not a model file: neither a torch.save archive nor safetensors nor a torch.export program",
            hint="give a .pt, .pth, .pt2 or .safetensors file, or torchvision:NAME, timm:NAME, hf:DIRECTORY or package.module:factory",
        )
    file.seek(0)
    magic, made = _interpreted(file, name)
    if magic != torch.serialization.MAGIC_NUMBER:
        reviewer.review(made, magic)
        reviewer.raise_for_refused(name)
        raise LoadError(f"{name} is a pickle, but not one that torch.save wrote", hint="save the model with torch.save")
    return [storage for _ in range(4) for storage in _reviewed_storages(file, reviewer, name)]


def _reviewed_storages(stream: IO[bytes], reviewer: Reviewer, name: str) -> list[Storage]:
    """The tensor storages of one pickle that has passed the review."""
    root, made = _interpreted(stream, name)
    reviewer.review(made, root)
    reviewer.raise_for_refused(name)
    return [thing for thing in made if isinstance(thing, Storage)]


def _interpreted(stream: IO[bytes], name: str) -> tuple[Any, list[Any]]:
    """(the description of the object in one pickle, all descriptions that it made)."""
    start = stream.tell()
    interpreter = Interpreter(stream)
    try:
        return interpreter.run(), interpreter.made
    except Broken:
        raise _damaged(name, "its description of the model breaks off or makes no sense") from None
    except UnknownOpcode:
        stream.seek(start)
        reviewer = Reviewer()
        for path in _names_of_any_protocol(stream):
            if not reviewer.may_name(Global(*path)):
                reviewer.refuse(".".join(path))
        reviewer.raise_for_refused(name)
        raise LoadError(
            f"{name} was written with a pickle protocol other than 2, the one that can be read safely",
            hint="save it again with torch.save(model, path), without pickle_protocol or pickle_module",
        ) from None


def _names_of_any_protocol(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The (module, name) pairs in a pickle of any protocol, roughly: for the text of a message, never for a decision."""
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


# --- files ----------------------------------------------------------------------------------------------------------------------------


def open_archive(file: IO[bytes], name: str) -> Any:
    """The reader that torch.load itself uses, so that both see the same records of a zip file made to look like two."""
    file.seek(0)
    try:
        archive = PyTorchFileReader(file)
        held = sum(archive.get_record_size(record) for record in archive.get_all_records())
    except Exception as error:  # a RuntimeError of the reader, or an OSError of a seek to a wrong position
        if _is_zip(file):
            raise LoadError(
                f"{name} is a zip archive without a model in it", hint="give a file that torch.save or torch.export.save wrote"
            ) from None
        raise _damaged(name, reason(error)) from None
    if held > (size := _size(file)):  # torch.save does not compress
        raise _damaged(name, f"its parts unpack to {held} bytes, more than its own {size}")
    return archive


def _is_zip(file: IO[bytes]) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # raised, not answered, of one part of an archive of several, which a damaged file may claim to be
        return False


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _damaged(name: str, why: str) -> LoadError:
    return LoadError(f"{name} is damaged: {why}", hint="copy or save it again")
