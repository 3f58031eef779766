"""Files that hold a model, are trusted, or are something else; and what is said where there is no way in."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision_shim  # noqa: F401
from own_net import NET, fails, own_model
from torch import nn

from normswap.errors import LoadError, UnsafePickleError, UsageError
from normswap.files.load import load

# --- trust --------------------------------------------------------------------------------------------------------------------------


def test_a_class_of_the_users_own(package: Path) -> None:
    torch.save(own_model(), package / "own.pt")
    for name in [name for name in sys.modules if name.startswith(NET)]:
        del sys.modules[name]
    text = fails("own.pt", UnsafePickleError)
    assert f"{NET}.Net" in text
    assert f"--trust-package {NET} allows nn.Module classes from there" in text
    assert "--arch" in text
    assert NET not in sys.modules
    assert type(load("own.pt", trust_packages=[NET]).model).__name__ == "Net"
    assert type(load("own.pt", trust=True).model).__name__ == "Net"


def test_trusting_a_package_trusts_its_layers_only(package: Path) -> None:
    torch.save(own_model("Odd"), package / "odd.pt")
    with pytest.raises(UnsafePickleError) as caught:
        load("odd.pt", trust_packages=[NET])
    assert caught.value.wanted == (f"{NET}.Config",)
    assert type(load("odd.pt", trust=True).model).__name__ == "Odd"


def test_a_class_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Linear):
        pass

    Net.__module__, Net.__qualname__ = "__main__", "Net"
    monkeypatch.setattr(sys.modules["__main__"], "Net", Net, raising=False)
    torch.save(Net(2, 3), tmp_path / "main.pt")
    monkeypatch.delattr(sys.modules["__main__"], "Net")
    text = fails(tmp_path / "main.pt", UnsafePickleError)
    assert "__main__.Net" in text
    assert "its class was defined in a script" in text
    text = fails(tmp_path / "main.pt", trust=True)
    assert "Net" in text
    assert "use a state dict with --arch" in text


@pytest.mark.parametrize("package", ["os", "no such", "", "../x", "os.path"])
def test_packages_that_cannot_be_trusted(package: str) -> None:
    assert "--trust-package takes the name of a package" in fails("torch.nn:Flatten", UsageError, trust_packages=[package])


def test_trusting_torch_does_not_open_its_compilers(tmp_path: Path) -> None:
    torch.save(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), tmp_path / "fx.pt")
    assert "torch.fx.graph_module.reduce_graph_module" in fails(tmp_path / "fx.pt", UnsafePickleError, trust_packages=["torch"])


def test_a_class_that_the_installed_package_does_not_have(tmp_path: Path) -> None:
    torch.save(nn.ReLU(), tmp_path / "m.pt")
    old, new = zipfile.ZipFile(tmp_path / "m.pt"), zipfile.ZipFile(tmp_path / "n.pt", "w")
    with old, new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry).replace(b"ReLU", b"ReLX"))
    assert "the file needs torch.nn.modules.activation.ReLX, which the installed torch does not have" in fails(tmp_path / "n.pt")


# --- files that are no models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.pt", b"", "x.pt is empty"),
        ("x.pt", b"hello, this is text\n" * 9, "x.pt is not a model file"),
        ("x.pt", b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500), "x.pt is not a model file"),
        ("x.pt", b"\x89PNG\r\n\x1a\n" + bytes(500), "x.pt is not a model file"),
        ("x.pt", bytes(5000), "x.pt is not a model file"),
        ("x.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer"),
        ("x.pt", b"PK\x03\x04" + bytes(100), "x.pt is damaged"),
        ("x.pt", b"\x80\x02" + bytes(100), "x.pt"),
        ("x.pt", bytes(257) + b"ustar" + bytes(300), "is a tar file"),
        ("x.onnx", b"\x08\x07", "is an ONNX file; a PyTorch model is needed"),
        ("x.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage", "cannot be read as safetensors"),
        ("x.safetensors", b"\xff" * 50, "cannot be read as safetensors"),
        ("x.pt", pickle.dumps([1, 2], protocol=2), "is a pickle, but not one that torch.save wrote"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert text in fails(tmp_path / name)


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02X\xff\xff\xff\xff", b"\x80\x02]"])
def test_huge_files(tmp_path: Path, start: bytes) -> None:
    with (tmp_path / "huge.pt").open("wb") as out:
        out.write(start)
        out.truncate(20 << 30)  # sparse: no blocks on disk
    fails(tmp_path / "huge.pt")


def test_missing_files_and_directories(tmp_path: Path) -> None:
    assert "there is no file nowhere.pt" in fails("nowhere.pt", UsageError)
    assert "there is no file resnet18" in fails("resnet18", UsageError)
    assert "is a directory\nhint: give a file in it" in fails(tmp_path, UsageError)
    (tmp_path / "config.json").write_text("{}")
    assert f"hint: hf:{tmp_path} loads it" in fails(tmp_path, UsageError)
    (tmp_path / "recipe.json").write_text("{}")
    assert "was converted already" in fails(tmp_path, UsageError)


def test_other_zip_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as out:
        out.writestr("folder/readme.txt", "hello")
    assert "is a zip archive without a model in it" in fails(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trust", [False, True])
def test_torchscript(tmp_path: Path, trust: bool) -> None:
    torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)).save(tmp_path / "script.pt")
    text = fails(tmp_path / "script.pt", trust=trust)
    assert "script.pt is TorchScript" in text
    assert "a .pt2 from torch.export.save (with --trust)" in text


def test_a_whole_model_of_the_old_form(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "file format of torch before 1.6 cannot be read safely" in fails(tmp_path / "old.pt")
    assert load(str(tmp_path / "old.pt"), trust=True).form == "module"


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], repository: Path) -> None:
    load(str(repository / "fixtures" / "digits_cnn.pt"))
    load("torchvision:resnet18")
    assert capfd.readouterr() == ("", "")


def test_the_digits_fixture(repository: Path) -> None:
    loaded = load(str(repository / "fixtures" / "digits_cnn.pt"))
    assert (loaded.stem, loaded.form, loaded.factory) == ("digits_cnn", "module", None)
    assert isinstance(loaded.model, nn.Sequential)


# --- programs -----------------------------------------------------------------------------------------------------------------------


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        y = nn.functional.gelu(self.norm(self.conv(x)), approximate="tanh") * self.scale
        return {"out": y, "size": y.flatten().sum() * (x.shape[0] + 1), "masked": y.masked_fill(mask, 0.0)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    inputs = (torch.rand(2, 3, 5, 5),), {"mask": torch.zeros(2, 4, 5, 5).bool()}
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Branchy().eval(), *inputs, dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    torch.export.save(exported, path)
    return path


@pytest.mark.parametrize("word", ["trust", "trust_pickle"])
def test_programs_are_read_if_they_are_trusted(program: Path, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(str(program), **{word: True})  # type: ignore[arg-type]
    assert (loaded.form, loaded.stem) == ("exported_program", "net")
    assert capfd.readouterr() == ("", "")
    model = loaded.model
    assert isinstance(model, torch.export.ExportedProgram)
    assert model.example_inputs is not None
    x = torch.rand(5, 3, 5, 5)
    out = model.module()(x, mask=torch.ones(5, 4, 5, 5).bool())
    assert out["out"].shape == (5, 4, 5, 5)
    assert out["masked"].abs().max() == 0


def test_a_program_is_not_read_otherwise(program: Path, tmp_path: Path) -> None:
    message = fails(program)
    assert message.startswith("net.pt2 is a torch.export program (.pt2), and torch runs text from such a file to read it\nhint: --trust ")
    shutil.copy(program, tmp_path / "other.pt")  # what a file is, its bytes say
    assert "other.pt is a torch.export program" in fails(tmp_path / "other.pt")
    assert "is a torch.export program" in fails(program, trust_packages=["torchvision"])


def test_a_program_of_before_torch_2_8_is_one_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as out:
        for part in ("version", "serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt"):
            out.writestr(part, b"8.8")
    assert "is a torch.export program" in fails(tmp_path / "old.pt2")
    assert "cannot be loaded as a torch.export program" in fails(tmp_path / "old.pt2", trust=True)


def test_text_in_a_program_does_not_run(program: Path, tmp_path: Path) -> None:
    """torch evaluates the symbolic size that a tensor has: with the user's word it does, without it nothing does."""
    marker = tmp_path / "marker"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            if entry.endswith("models/model.json"):
                data = data.replace(b"Symbol(", f"__import__('pathlib').Path('{marker}').touch() or Symbol(".encode())
            new.writestr(entry, data)
    fails(tmp_path / "bad.pt2")
    assert not marker.exists()
    with contextlib.suppress(LoadError):
        load(str(tmp_path / "bad.pt2"), trust=True)
    assert marker.exists()  # so the file is one that runs code


def test_damaged_programs(program: Path, tmp_path: Path) -> None:
    whole = program.read_bytes()
    for length in range(10, len(whole), 997):
        (tmp_path / "cut.pt2").write_bytes(whole[:length])
        fails(tmp_path / "cut.pt2")
        fails(tmp_path / "cut.pt2", trust=True)
