"""The files that hold the weights of an ONNX file lie beside it, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from fixtures import hostile
from normswap.api.fold import fold_onnx
from normswap.errors import LoadError
from normswap.files import external_data

ELSEWHERE = [case for case in hostile.cases(transformers=False) if case.kind.startswith("onnx: weights") and not case.innocent]


@pytest.mark.parametrize("case", [case for case in ELSEWHERE if "cut off" not in case.kind], ids=lambda case: f"{case.kind}, {case.name}")
def test_weights_elsewhere_are_not_read(case: hostile.Case, tmp_path: Path) -> None:
    case.write(tmp_path / "made")
    path = tmp_path / "made" / case.file
    with pytest.raises(LoadError, match=r"^a\.onnx keeps weights in '.*', which is ") as caught:
        external_data.check_locations(path)
    assert caught.value.hint == "the files that hold the weights of an ONNX file must be copied into its directory"
    with pytest.raises(LoadError, match="keeps weights in"):
        fold_onnx(str(path), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin", "a..b.bin", "we ights.bin", "./w.bin"])
def test_weights_beside_it_are(location: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / location).write_bytes(bytes(36))
    path = tmp_path / "m.onnx"
    path.write_bytes(hostile.graph(weight=hostile.external(location)).SerializeToString())
    external_data.check_locations(path)
    assert external_data.locations(path) == [location]


def test_a_model_in_one_file_and_a_directory_that_is_a_link(tmp_path: Path) -> None:
    """Where the ONNX file itself lies is the user's business."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "w.bin").write_bytes(bytes(36))
    (tmp_path / "real" / "m.onnx").write_bytes(hostile.graph(weight=hostile.external("w.bin")).SerializeToString())
    (tmp_path / "linked").symlink_to("real")
    external_data.check_locations(tmp_path / "linked" / "m.onnx")
    (tmp_path / "one.onnx").write_bytes(hostile.graph().SerializeToString())
    external_data.check_locations(tmp_path / "one.onnx")
    assert external_data.locations(tmp_path / "one.onnx") == []


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("length", "many"), ("offset", "1e3")])
def test_places_that_are_no_numbers(key: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(36))
    tensor = hostile.external("w.bin")
    entries = {entry.key: entry for entry in tensor.external_data}
    (entries.get(key) or tensor.external_data.add(key=key)).value = value
    (tmp_path / "m.onnx").write_bytes(hostile.graph(weight=tensor).SerializeToString())
    with pytest.raises(LoadError, match=rf"^m\.onnx has a tensor 'w' with {key} '{value}'"):
        external_data.check_locations(tmp_path / "m.onnx")


def test_names_are_changed_wherever_they_stand(tmp_path: Path) -> None:
    """In initializers, branches and functions."""
    for number, where in enumerate(("constant", "branch", "function")):
        path = tmp_path / f"in{number}" / "m.onnx"
        hostile.constant(where)(path)
        assert external_data.locations(path) == ["../secret.bin"]
        external_data.move(path, {"../secret.bin": "w.bin"})
        assert external_data.locations(path) == ["w.bin"]
        (path.parent / "w.bin").write_bytes(bytes(36))
        external_data.check_locations(path)
        onnx.checker.check_model(onnx.load(path))


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"<html>404</html>")
    with pytest.raises(LoadError, match="is not an ONNX file, or it was cut off"):
        external_data.check_locations(tmp_path / "m.onnx")
    assert external_data.locations(tmp_path / "m.onnx") == []
