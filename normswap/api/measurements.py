"""The measurements of `sensitivity`, in memory, and also in a file if a later run should not repeat them.

The file has one JSON object per line. The first has the norms of the model, the number of batches and the metric, and each of the others
is one measurement. That weights, data and the code of the metric are the same in a later run is not checked.
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
    """The effect of swapping some layers of a model, measured on all the data.

    rel_l2, max_rel   distance of the worst floating output from the original's; inf if an output has another shape or is not finite
    metric, change    the user's metric, and its distance from the metric of the original; None without a metric
    """

    rel_l2: float
    max_rel: float
    metric: float | None = None
    change: float | None = None


class Measurements:
    """Measurements by the names of the swapped layers. With a file, each is written before the next one starts.

    layers: name -> kind of every norm of the model. Raises UsageError for a file of another model, number of batches or metric.
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
                os.truncate(self.path, content.rfind(b"\n") + 1)  # drop an incomplete last line
            self.file = self.path.open("a", encoding="utf-8")
            if not content:
                self._write(self.header)
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, names: tuple[str, ...], measured: Measurement, calibration_error: float | None = None) -> None:
        """Keep a measurement. calibration_error: of a layer that was swapped alone, the relative error of its own output after the fit."""
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
        """Raise UsageError unless the first line of the file has the same version, norms, number of batches and metric."""
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
