"""Files of torch.save, a zip archive or the older plain form: reviewed, then read."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import torch

from normswap.errors import LoadError
from normswap.files.pickles.descriptions import Global, Storage
from normswap.files.pickles.interpreter import MAX_PICKLE, Broken, Interpreter, UnknownOpcode
from normswap.files.pickles.messages import damaged, names_of_any_protocol, not_a_model, raise_wanted, reason
from normswap.files.pickles.review import Judge
from normswap.files.pickles.wrappers import unwrapped
from normswap.models.torch_private import PyTorchFileReader


def read(file: IO[bytes], name: str, *, trust_packages: Sequence[str] = ()) -> Any:
    """What `torch.save` put into this file, a zip archive or the older plain form, on the CPU; or why it must not or cannot be read."""
    allowed = review(file, name, trust_packages=trust_packages)
    # torch drops what it was given on leaving the context, so what the caller has allowed before is left out
    present = torch.serialization.get_safe_globals()
    new: list[Any] = [entry for entry in ((found, path) for path, found in allowed.items()) if entry not in present]
    file.seek(0)
    try:
        with torch.serialization.safe_globals(new), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch raise has no common type
        raise LoadError(f"{name} cannot be read: {reason(error)}", hint="it may be damaged: copy or save it again") from error
    return unwrapped(found, name)


def review(file: IO[bytes], name: str, *, trust_packages: Sequence[str] = ()) -> dict[str, Any]:
    """The classes and functions that reading this file takes, by the names it uses; UnsafePickleError if one of them may not be used."""
    file.seek(0)
    judge = Judge(trust_packages)
    if file.read(4) == b"PK\x03\x04":
        archive = open_archive(file, name)
        if not archive.has_record("data.pkl"):
            raise LoadError(f"{name} is a zip archive without a model in it", hint="give a file that torch.save wrote")
        try:
            program = io.BytesIO(archive.get_record("data.pkl"))
        except Exception as error:  # what the reader raises on a damaged archive has no common type
            raise damaged(name, reason(error)) from None
        if len(program.getbuffer()) > MAX_PICKLE:
            raise LoadError(
                f"{name} describes its model in {len(program.getbuffer()) >> 20} MiB, more than the {MAX_PICKLE >> 20} MiB that are read"
            )
        storages = [made for made in _judged(program, judge, name) if isinstance(made, Storage)]
        for storage in storages:
            record = f"data/{storage.key}"
            held = archive.get_record_size(record) if archive.has_record(record) else 0
            if held < storage.numel * storage.itemsize:
                raise damaged(name, f"its tensor {storage.key!a} should have {storage.numel * storage.itemsize} bytes, but has {held}")
    else:
        storages = _legacy(file, judge, name)
        claimed = sum({storage.key: storage.numel * storage.itemsize for storage in storages}.values())
        if claimed > (size := _size(file)):
            raise damaged(name, f"its tensors should have {claimed} bytes, but the whole file has {size}")
    sizes = {storage.key: storage.numel for storage in storages}
    if any(sizes[storage.key] != storage.numel for storage in storages):  # the first would serve all, too small for some
        raise damaged(name, "it gives one tensor storage two sizes")
    return judge.objects


def _legacy(file: IO[bytes], judge: Judge, name: str) -> list[Storage]:
    """The form before torch 1.6: five pickles (magic number, version, system, object, storage keys), then the numbers."""
    file.seek(0)
    if file.read(1) != pickle.PROTO:
        raise not_a_model(name)
    file.seek(0)
    magic, first = _interpreted(file, name)
    if magic != torch.serialization.MAGIC_NUMBER:
        judge.judge(first, magic)
        raise_wanted(judge, name)
        raise LoadError(f"{name} is a pickle, but not one that torch.save wrote", hint="save the model with torch.save")
    storages: list[Storage] = []
    for _ in range(4):
        storages += [made for made in _judged(file, judge, name) if isinstance(made, Storage)]
    return storages


def _judged(stream: IO[bytes], judge: Judge, name: str) -> list[Any]:
    root, made = _interpreted(stream, name)
    judge.judge(made, root)
    raise_wanted(judge, name)
    return made


def _interpreted(stream: IO[bytes], name: str) -> tuple[Any, list[Any]]:
    start = stream.tell()
    interpreter = Interpreter(stream)
    try:
        return interpreter.run(), interpreter.made
    except Broken:
        raise damaged(name, "its description of the model breaks off or makes no sense") from None
    except UnknownOpcode:
        stream.seek(start)
        judge = Judge(())
        for path in names_of_any_protocol(stream):
            if not judge.may_name(Global(*path)):
                judge.refuse(".".join(path))
        raise_wanted(judge, name)
        raise LoadError(
            f"{name} was written with a pickle protocol other than 2, the one that can be read safely",
            hint="save it again with torch.save(model, path), without pickle_protocol or pickle_module",
        ) from None


def open_archive(file: IO[bytes], name: str) -> Any:
    """The reader that torch.load itself uses, so that both see the same records of a zip file made to look like two."""
    file.seek(0)
    try:
        archive = PyTorchFileReader(file)
        held = sum(archive.get_record_size(record) for record in archive.get_all_records())
    except Exception as error:  # RuntimeError of the reader, OSError of a seek to where it was told to
        if zipfile.is_zipfile(file):
            raise LoadError(
                f"{name} is a zip archive without a model in it", hint="give a file that torch.save or torch.export.save wrote"
            ) from None
        raise damaged(name, reason(error)) from None
    if held > (size := _size(file)):  # torch.save does not compress
        raise damaged(name, f"its parts unpack to {held} bytes, more than its own {size}")
    return archive


def _size(file: IO[bytes]) -> int:
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(position)
    return size
