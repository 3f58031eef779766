"""What `sensitivity` has measured: in memory, and in a file if a later run is to skip what is done.

The file has one JSON object per line. The first says what is measured: the norms of the model, the number of batches, the metric. Each of
the others is one measurement. Weights, data and the code of the metric are the caller's to keep the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from normswap.errors import UsageError

FORMAT = "normswap sensitivity"
VERSION = 2
_NEW_FILE = "give the name of a new file"


@dataclass(frozen=True)
class Measurement:
    """What one model with some layers swapped does, on all the data.

    rel_l2, max_rel   distance of the worst floating output from the original's; inf where outputs have another shape or are not finite
    metric, change    what the user's metric says, and how far that is from what it says of the original; None without a metric
    """

    rel_l2: float
    max_rel: float
    metric: float | None = None
    change: float | None = None


class Measurements:
    """Measurements by the names of the layers that were swapped. With a file, each is on the disk before the next one is begun.

    layers: the kind of every norm of the model, by its name. Raises UsageError for a file that holds something else.
    """

    def __init__(self, path: str | Path | None, layers: Mapping[str, str], batches: int, metric: str | None) -> None:
        self.path = None if path is None else Path(path)
        self.layers = dict(layers)
        self.header = {FORMAT: VERSION, "layers": self.layers, "batches": batches, "metric": metric}
        self.rows: dict[tuple[str, ...], Measurement] = {}
        self.calibration_errors: dict[str, float] = {}
        self.file: IO[str] | None = None

    def __enter__(self) -> Measurements:
        if self.path is not None:
            content = self.path.read_bytes() if self.path.exists() else b""
            if content:
                self._read(content)
                os.truncate(self.path, content.rfind(b"\n") + 1)  # a last line that was cut off
            self.file = self.path.open("a", encoding="utf-8")
            if not content:
                self._write(self.header)
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, names: tuple[str, ...], measured: Measurement, calibration_error: float | None = None) -> None:
        """Keep a measurement. calibration_error: what the fit of a layer that was swapped alone leaves at its own output."""
        self._keep(names, measured, calibration_error)
        self._write({"swapped": names, **asdict(measured), "calibration_error": calibration_error})

    def _keep(self, names: tuple[str, ...], measured: Measurement, calibration_error: float | None) -> None:
        self.rows[names] = measured
        if calibration_error is not None:
            self.calibration_errors[names[0]] = calibration_error

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def _read(self, content: bytes) -> None:
        first, *lines = content.split(b"\n")[:-1] or [b""]
        self._check(_json(first))
        for number, line in enumerate(lines, 2):
            match _json(line):
                case {
                    "swapped": [*names],
                    "rel_l2": float(rel_l2),
                    "max_rel": float(max_rel),
                    "metric": (None | float()) as metric,
                    "change": (None | float()) as change,
                    "calibration_error": (None | float()) as error,
                } if all(isinstance(name, str) and name in self.layers for name in names) and (error is None or len(names) == 1):
                    self._keep(tuple(names), Measurement(rel_l2, max_rel, metric, change), error)
                case _:
                    hint = f"take that line out, or {_NEW_FILE}"
                    raise UsageError(f"line {number} of {self.path} is no measurement", hint=hint)

    def _check(self, header: Any) -> None:
        """Raise UsageError for the first line of another file."""
        if not isinstance(header, dict) or header.get(FORMAT) != VERSION or not isinstance(header.get("layers"), dict):
            raise UsageError(f"{self.path} is no file of measurements, or one of another version of normswap", hint=_NEW_FILE)
        layers = header["layers"]
        if layers != self.layers:
            name = next(name for name in (*self.layers, *layers) if layers.get(name) != self.layers.get(name))
            what = f"{name!r} is {_norm(layers.get(name))} there, and {_norm(self.layers.get(name))} in this one"
            raise UsageError(f"{self.path} holds measurements of another model: {what}", hint=_NEW_FILE)
        for key, what in (("batches", "another number of batches"), ("metric", "another metric")):
            if header.get(key) != self.header[key]:
                found = f"{header.get(key)}; expected {self.header[key]}"
                raise UsageError(f"{self.path} holds measurements with {what}: {found}", hint=_NEW_FILE)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _norm(kind: str | None) -> str:
    return "no norm" if kind is None else f"a norm of the kind {kind}"
