"""save and load: the recipe, re-applied to a fresh model, gives the same model; anything else is an error that says what differs."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import safetensors.torch
import torch
import torchvision_shim  # noqa: F401
from torch import Tensor, nn
from torch.optim import swa_utils

import normswap
from fixtures.nets import case, randomise
from normswap import BatchlessNorm
from normswap.api.verify import load_any
from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.errors import LoadError, SwapError, UsageError
from normswap.files.converted import unwrapped
from normswap.files.load import load as load_source
from normswap.files.recipe import read_recipe
from normswap.models.inputs import Inputs, make


def _factory(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 7), nn.BatchNorm1d(7)
    )
    return randomise(model, seed).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture(scope="module")
def once_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    conversion = normswap.convert(_factory(1), torch.randn(4, 3, 8, 8))
    return conversion.model, normswap.save(conversion, tmp_path_factory.mktemp("once") / "saved")


@pytest.fixture
def saved(once_saved: tuple[nn.Module, Path], tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model and its directory, both the test's own: it may change them."""
    return copy.deepcopy(once_saved[0]), shutil.copytree(once_saved[1], tmp_path / "saved")


def test_a_fresh_model_with_other_weights_becomes_the_saved_one(saved: tuple[nn.Module, Path], x: Tensor) -> None:
    model, directory = saved
    loaded = normswap.load(directory, lambda: _factory(2))
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), model(x))
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k, v in model.state_dict().items()}


def test_the_weights_are_a_plain_state_dict(saved: tuple[nn.Module, Path]) -> None:
    from safetensors.torch import load_file

    model, directory = saved
    assert set(load_file(directory / "model.safetensors")) == set(model.state_dict())
    assert sorted(p.name for p in directory.iterdir()) == ["model.safetensors", "recipe.json"]


def test_a_trained_model_without_its_conversion(tmp_path: Path, x: Tensor) -> None:
    model = normswap.convert(_factory(), x).model
    with torch.no_grad():
        model[1].log_std.add_(0.3)
    loaded = normswap.load(normswap.save(model, tmp_path / "trained"), _factory)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), model(x))


def _compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend="eager"))


@pytest.mark.parametrize(
    "wrap",
    [_compiled, nn.DataParallel, swa_utils.AveragedModel, lambda model: _compiled(nn.DataParallel(model))],
    ids=["compile", "DataParallel", "AveragedModel", "both"],
)
def test_a_wrapped_model_is_saved_as_what_it_wraps(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path, x: Tensor) -> None:
    model = normswap.convert(_factory(1), x).model
    normswap.save(wrap(model), tmp_path / "out")
    loaded = normswap.load(tmp_path / "out", lambda: _factory(2))
    assert isinstance(loaded, nn.Module)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("wrap", [_compiled, nn.DataParallel, swa_utils.AveragedModel], ids=["compile", "DataParallel", "AveragedModel"])
def test_a_factory_may_wrap_the_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path, x: Tensor) -> None:
    conversion = normswap.convert(wrap(_factory(1)).eval(), x)
    loaded = normswap.load(normswap.save(conversion, tmp_path / "out"), lambda: wrap(_factory(2)))
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), conversion.model(x))


@pytest.mark.parametrize("factory", [nn.Linear(2, 2), "package.module:factory"])
def test_a_factory_is_a_function(factory: Any, saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(UsageError, match=f"^factory is a {type(factory).__name__}; expected a function that builds"):
        normswap.load(saved[1], factory)


def test_a_model_with_one_child_is_no_wrapper() -> None:
    class Own(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    for model in (Own(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3)), nn.ModuleDict({"module": nn.BatchNorm2d(3)})):
        assert unwrapped(model) is model


def test_reverting_a_loaded_model_is_bit_for_bit(saved: tuple[nn.Module, Path]) -> None:
    reverted = normswap.revert(normswap.load(saved[1], lambda: _factory(2)))
    original = _factory(1).state_dict()
    assert list(reverted.state_dict()) == list(original)
    assert all(torch.equal(value, original[name]) for name, value in reverted.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_the_saved_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = normswap.convert(_factory().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)).model
    loaded = normswap.load(normswap.save(model, tmp_path / "saved"), _factory)
    assert isinstance(loaded, nn.Module)
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert normswap.verify(model, loaded, torch.randn(2, 3, 8, 8, dtype=dtype))


@pytest.mark.parametrize("std", ["log", "abs", "inv"])
def test_each_form_of_std(tmp_path: Path, x: Tensor, std: str) -> None:
    model = normswap.convert(_factory(), x, std=std).model
    loaded = normswap.load(normswap.save(model, tmp_path / std), _factory)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), model(x))


def test_shared_layers_stay_shared(tmp_path: Path) -> None:
    net = case("aliased_two_parents")
    model = normswap.convert(net.make(), net.inputs()).model
    loaded = normswap.load(normswap.save(model, tmp_path / "aliased"), net.make)
    assert isinstance(loaded, nn.Module)
    assert len(list(loaded.modules())) == len(list(model.modules()))
    assert torch.equal(loaded(*net.inputs()), model(*net.inputs()))


def test_a_partly_converted_model(tmp_path: Path, x: Tensor) -> None:
    model = normswap.convert(_factory(), x, exclude=["5"]).model
    loaded = normswap.load(normswap.save(model, tmp_path / "part"), _factory)
    assert isinstance(loaded, nn.Module)
    assert isinstance(loaded[5], nn.BatchNorm1d)  # type: ignore[index]
    assert torch.equal(loaded(x), model(x))


def test_another_architecture_is_refused(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(LoadError, match=r"^1 of the given architecture has num_features \[6\], but .* was saved with \[5\]"):
        normswap.load(saved[1], lambda: randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3)), 0))
    with pytest.raises(LoadError, match=r"^1 of the given architecture has no BatchlessNorm"):
        normswap.load(saved[1], lambda: nn.Sequential(nn.Conv2d(3, 5, 3)))


def test_another_eps_is_refused(saved: tuple[nn.Module, Path]) -> None:
    def other() -> nn.Module:
        model = _factory()
        model[1].eps = 1e-5  # type: ignore[index]
        return model

    with pytest.raises(LoadError, match=r"^1 of the given architecture has eps 1e-05, but .* was saved with 0.001"):
        normswap.load(saved[1], other)


def test_other_weights_than_the_norms_are_checked_too(saved: tuple[nn.Module, Path]) -> None:
    def other() -> nn.Module:
        model = _factory()
        model[4] = nn.Linear(5 * 6 * 6 + 1, 7)  # type: ignore[index]
        return model

    with pytest.raises(LoadError, match=r"does not fit the given architecture: .*4\.weight"):
        normswap.load(saved[1], other)


def test_no_architecture_is_refused(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(LoadError, match="holds weights but no architecture\nhint: pass what builds the original model"):
        normswap.load(saved[1])


def test_not_a_converted_directory(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"is not a converted directory: it has no recipe\.json"):
        normswap.load(tmp_path, _factory)


NOTHING = '"source": null, "factory": null, "module": null, "inputs": []'


SITES = [f'{{"version": 1, "sites": {sites}, {NOTHING}}}' for sites in ('"x"', "[{}]")]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '"text"', *SITES])
def test_not_a_recipe(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(LoadError, match="is not a recipe that normswap wrote"):
        normswap.load(tmp_path, _factory)


# what a recipe may say is what normswap writes; each line changes one thing of a right one
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a path": ({"module": "../model.pt"}, "its module is not one"),
    "another path": ({"module": "/tmp/model.pt"}, "its module is not one"),
    "a file of another kind": ({"module": "recipe.json"}, "its module is not one"),
    "a list": ({"factory": ["os:system"]}, "its factory is not one"),
    "a function for a dtype": ({"inputs": [{"name": None, "shape": [4, 3], "dtype": "load"}]}, "one of its inputs has a dtype that is not"),
    "2^60 numbers": ({"inputs": [{"name": None, "shape": [2**30] * 2, "dtype": "float32"}]}, "one of its inputs has a shape that is not"),
    "a size below 0": ({"inputs": [{"name": None, "shape": [-1], "dtype": "float32"}]}, "one of its inputs has a shape that is not"),
    "a site in words": ({"sites": ["1"]}, "one of its sites is no JSON object"),
    "a site without a name": ({"sites": [{"class": "BatchlessNorm", "std": "log"}]}, "one of its sites lacks its name"),
    "a std": ({"sites": [{"name": "1", "class": "BatchlessNorm", "std": "eval"}]}, "one of its sites has a std that is not one"),
    "a rule": ({"rules": [{"kind": "x", "rule": 7, "sites": []}]}, "one of its rules has a rule that is not one"),
    "rules": ({"rules": {"a": 1}}, "its rules is not one"),
    "a call with a tensor too many": ({"call": [{"tuple": [{"tensor": 9}]}, {"dict": {}}]}, "its call is not one"),
    "a call of code": ({"call": [{"tuple": [{"eval": "1"}]}, {"dict": {}}]}, "its call is not one"),
    "a call without keywords": ({"call": [{"tuple": []}]}, "its call is not one"),
    "a call with two kinds": ({"call": [{"tuple": [], "list": []}, {"dict": {}}]}, "its call is not one"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_recipe_that_says_what_normswap_does_not_write(saved: tuple[nn.Module, Path], what: str) -> None:
    change, text = WRONG[what]
    path = saved[1] / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LoadError, match=f"recipe.json is not a recipe that normswap wrote: {text}"):
        normswap.load(saved[1], _factory)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 200_000, "it is nested too deeply"),
        (b'{"version": ' + b"9" * 10_000 + b"}", ""),
        (b"\xff\xfe{}", ""),
        (b" " * (65 << 20), "it has 68,157,440 bytes; expected 67,108,864 at most"),
    ],
    ids=["nested", "a long number", "not UTF-8", "large"],
)
def test_a_recipe_that_nobody_wrote(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(LoadError, match=f"is not a recipe that normswap wrote: {text}"):
        normswap.load(tmp_path, _factory)


def test_a_pipe_is_not_waited_for(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.json")
    with pytest.raises(LoadError, match=r"is not a converted directory: it has no recipe\.json"):
        normswap.load(tmp_path, _factory)
    (saved[1] / "model.safetensors").unlink()
    os.mkfifo(saved[1] / "model.safetensors")
    with pytest.raises(LoadError, match=r"there is no file .*model\.safetensors\nhint: was the directory copied whole"):
        normswap.load(saved[1], _factory)


@pytest.mark.parametrize("factory", ["os:getcwd", "os:abort", "code:interact", "no_such_module:build", "torch.nn:ReLU"])
def test_a_factory_of_a_recipe_is_code_and_not_called(saved: tuple[nn.Module, Path], factory: str) -> None:
    path = saved[1] / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"factory": factory}))
    with pytest.raises(
        LoadError, match=f"names '{factory}' as what builds the model, and to import that is to run code of its choice"
    ) as caught:
        normswap.load(saved[1])
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"if it is your own: --arch {factory} (factory=... in Python); --trust")
    assert normswap.load(saved[1], _factory) is not None  # the word of the user


@pytest.mark.parametrize("word", ["trust", "trust_pickle"])
def test_a_factory_of_a_recipe_that_is_trusted(saved: tuple[nn.Module, Path], word: str, x: Tensor) -> None:
    path = saved[1] / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"factory": f"{__name__}:_factory"}))
    loaded = normswap.load(saved[1], **{word: True})  # type: ignore[arg-type]
    assert torch.equal(loaded(x), saved[0](x))  # type: ignore[operator]


def test_a_factory_of_a_recipe_that_only_builds_a_known_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_source("torchvision:resnet18").model
    saved = normswap.save(normswap.convert(model, torch.randn(1, 3, 32, 32)), tmp_path / "saved")  # type: ignore[type-var]
    path = saved / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"factory": "torchvision:resnet18"}))
    assert isinstance(normswap.load(saved), nn.Module)


def test_a_recipe_of_the_future(saved: tuple[nn.Module, Path]) -> None:
    path = saved[1] / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(LoadError, match="is a recipe of version 2; expected 1"):
        normswap.load(saved[1], _factory)


def without(directory: Path, *keys: str) -> None:
    """As an older normswap wrote it."""
    path = directory / "recipe.json"
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in recipe.items() if key not in keys}))


def test_truncated_weights(saved: tuple[nn.Module, Path]) -> None:
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"model\.safetensors was changed after it was written"):
        normswap.load(saved[1], _factory)
    without(saved[1], "files")
    with pytest.raises(LoadError, match=r"model\.safetensors cannot be read"):
        normswap.load(saved[1], _factory)


def test_a_directory_of_somebody_else_is_not_replaced(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").touch()
    with pytest.raises(UsageError, match="would be replaced"):
        normswap.save(saved[0], tmp_path / "theirs")
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["notes.txt"]


# -- one truth in a directory ---------------------------------------------------------------------------------------------------------


CODE = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 7), nn.BatchNorm1d(7)
    )
"""


@pytest.fixture(scope="module")
def once_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.pt, and what the command writes of it, with an ONNX file: that takes seconds, so once."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.save(_factory(1), "net.pt")
        convert_to_directory("net.pt", folder / "out", ConvertOptions(inputs=["4x3x8x8"]))
    return folder


@pytest.fixture
def written(once_written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the command writes of a module, beside net.pt; its inputs are those of `x`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(once_written, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def recipe_of(directory: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((directory / "recipe.json").read_text()))


def test_the_recipe_has_the_hash_of_every_other_file(written: Path, saved: tuple[nn.Module, Path]) -> None:
    for directory in (written, saved[1]):
        files = recipe_of(directory)["files"]
        assert set(files) == {path.name for path in directory.iterdir()} - {"recipe.json"}
        assert files == {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files}


def changed(path: Path, by: float = 1e-3) -> None:
    weights = safetensors.torch.load_file(path)
    weights["0.weight"] += by
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def other_module(path: Path) -> None:
    model = torch.load(path, weights_only=False)
    with torch.no_grad():
        model[0].weight += 1e-3
    torch.save(model, path)


@pytest.mark.parametrize(("name", "change"), [("model.safetensors", changed), ("model.pt", other_module)])
@pytest.mark.parametrize(
    "read",
    [
        normswap.load,
        lambda d: normswap.verify(d / ".." / "net.pt", d),
        lambda d: normswap.revert(normswap.load(d)),
        lambda d: load_any(str(d)),
    ],
    ids=["load", "verify", "revert", "any"],
)
def test_a_file_that_was_changed_is_named(written: Path, name: str, change: Callable[[Path], None], read: Callable[[Path], object]) -> None:
    read(written)
    change(written / name)
    with pytest.raises(
        LoadError, match=rf"{re.escape(name)} was changed after it was written: its SHA-256 is not the one in recipe\.json"
    ) as error:
        read(written)
    assert 'if the change is meant, take "files" out of' in str(error.value)


def test_what_is_not_read_may_change(written: Path) -> None:
    """The report is for people, and model.onnx may be exported anew; a file that was not there is no matter either."""
    (written / "report.html").write_text("mine")
    (written / "model.onnx").unlink()
    (written / "notes.txt").write_text("mine")
    assert normswap.load(written) is not None


def test_the_weights_alone_with_an_architecture(written: Path, x: Tensor) -> None:
    other_module(written / "model.pt")  # which is not read
    assert torch.equal(normswap.load(written, _factory).eval()(x), normswap.convert(_factory(1), x).model(x))  # type: ignore[union-attr,operator]
    changed(written / "model.safetensors")
    with pytest.raises(LoadError, match=r"model\.safetensors was changed"):
        normswap.load(written, _factory)


def test_files_that_were_added_are_not_read(written: Path) -> None:
    path = written / "recipe.json"
    recipe = recipe_of(written)
    del recipe["files"]["model.pt"]
    path.write_text(json.dumps(recipe))
    with pytest.raises(LoadError, match=r"model\.pt is not among the files of recipe\.json"):
        normswap.load(written)


def test_an_older_directory_is_read_with_a_note(written: Path, x: Tensor) -> None:
    """Without hashes, training and frozen. Then the two models in it are held against each other."""
    convert_to_directory("net.pt", written, ConvertOptions(inputs=["4x3x8x8"], onnx=False, coupling="none"))
    without(written, "files", "training", "frozen")
    with pytest.warns(UserWarning, match="recorded no SHA-256 of its files: whether they were changed since is not known"):
        loaded = normswap.load(written)
    assert torch.equal(loaded(x), normswap.convert(_factory(1), x).model(x))  # type: ignore[operator]
    changed(written / "model.safetensors")
    with pytest.raises(LoadError, match=r"holds two models: 0\.weight of model\.pt is not that of model\.safetensors"):
        normswap.load(written)


@pytest.mark.parametrize("module", ["../net.pt", "/etc/passwd", "model.onnx", "", 3])
def test_a_recipe_names_a_file_of_its_own_directory(written: Path, module: object) -> None:
    path = written / "recipe.json"
    path.write_text(json.dumps({**recipe_of(written), "module": module}))
    with pytest.raises(LoadError, match="is not a recipe that normswap wrote: its module is"):
        normswap.load(written)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("files", ["model.pt"], "is not a recipe"),
        ("files", {"model.pt": 3}, "its files is not one"),
        ("training", [{"name": "1"}], "one of its training lacks its producer"),
        ("training", 3, "is not a recipe"),
        (
            "training",
            [{"name": "1", "producer": "0", "feedback": True, "guard": True, "pace": "fast"}],
            "one of its training has a pace that is not one",
        ),
        ("frozen", [3], "its frozen is not one"),
    ],
)
def test_recipes_that_make_no_sense(written: Path, key: str, value: object, text: str) -> None:
    path = written / "recipe.json"
    path.write_text(json.dumps({**recipe_of(written), key: value}))
    with pytest.raises(LoadError, match=text):
        normswap.load(written)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"producer": "2"}, "a ReLU is not a conv or linear layer"),
        ({"producer": "4"}, "cannot be coupled to a layer with statistics of shape"),
        ({"producer": "nobody"}, "there is no such layer"),
        ({"name": "nobody"}, "there is no such layer"),
    ],
)
def test_training_that_does_not_fit(saved: tuple[nn.Module, Path], change: dict[str, object], text: str) -> None:
    recipe = recipe_of(saved[1])
    recipe["training"][0].update(change)
    (saved[1] / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(LoadError, match=rf"recipe\.json says that .* is coupled to .*, which does not fit: .*{text}"):
        normswap.load(saved[1], _factory)


# -- what is saved trains as what was returned ----------------------------------------------------------------------------------------


def trained(model: nn.Module, steps: int = 4) -> list[object]:
    """The loss at each step, and the state at the end."""
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(normswap.param_groups(model.train(), lr=0.05, batch=4), momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, {name: t.tolist() for name, t in model.state_dict().items()}]


TRAINING: dict[str, dict[str, Any]] = {
    "coupled": {},
    "coupled, from data": {"calibration": [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]},
    "plain": {"coupling": "none"},
    "raw": {"stats": "raw"},
    "without a term": {"aux": "none"},
}


@pytest.mark.parametrize("before", [0, 2], ids=["new", "in the middle"])
@pytest.mark.parametrize("how", TRAINING)
def test_what_is_saved_trains_as_what_was_returned(tmp_path: Path, x: Tensor, how: str, before: int) -> None:
    model = normswap.convert(_factory(1), x, **TRAINING[how]).model
    if before:
        trained(model, before)
    normswap.save(model, tmp_path / "saved")
    loaded = normswap.load(tmp_path / "saved", lambda: _factory(2))
    assert isinstance(loaded, nn.Module)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert trained(loaded) == trained(model)


@pytest.mark.parametrize("coupling", ["auto", "none"])
@pytest.mark.parametrize("source", ["module", "state dict"])
def test_the_command_and_python_convert_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, coupling: Literal["auto", "none"]
) -> None:
    (tmp_path / "save_test_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    example = make((4, 3, 8, 8), torch.float32)
    torch.save(_factory(1) if source == "module" else _factory(1).state_dict(), "net.pt")
    arch = {} if source == "module" else {"arch": "save_test_net:net"}
    convert_to_directory("net.pt", tmp_path / "out", ConvertOptions(inputs=["4x3x8x8"], onnx=False, coupling=coupling, **arch))  # type: ignore[arg-type]
    loaded = normswap.load(tmp_path / "out", trust=True)  # it builds the architecture by code of the directory
    assert isinstance(loaded, nn.Module)
    pickled = [load_source("out/model.pt").model] if source == "module" else []  # which is the same by itself
    assert all(trained(cast(nn.Module, model)) == trained(copy.deepcopy(loaded)) for model in pickled)
    assert trained(loaded) == trained(normswap.convert(_factory(1), example, coupling=coupling).model)


def test_what_is_frozen_stays_frozen(tmp_path: Path, x: Tensor) -> None:
    source = _factory(1)
    source[0].requires_grad_(False)  # type: ignore[index]
    source[1].requires_grad_(False)  # type: ignore[index]
    model = normswap.convert(source, x).model
    loaded = normswap.load(normswap.save(model, tmp_path / "saved"), lambda: _factory(2))
    assert isinstance(loaded, nn.Module)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert {"0.weight", "1.weight", "1.mean"} < set(frozen)
    assert frozen == [name for name, p in loaded.named_parameters() if not p.requires_grad]
    assert trained(loaded) == trained(model)


def test_a_shared_layer_trains_as_it_did(tmp_path: Path) -> None:
    net = case("aliased_two_parents")
    model = normswap.convert(net.make(), net.inputs()).model
    loaded = normswap.load(normswap.save(model, tmp_path / "aliased"), net.make)
    assert isinstance(loaded, nn.Module)
    for each in (model, loaded):
        step = torch.optim.SGD(normswap.param_groups(each.train(), lr=0.1))
        each(*net.inputs()).square().mean().backward()
        step.step()
    assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {n: t.tolist() for n, t in model.state_dict().items()}


# -- what cannot be read back is not written --------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """As BERT: token_type_ids has two values only, and a layer in its code takes statistics."""

    def __init__(self, types: int = 2) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(50, 8), nn.Embedding(types, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.gain, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        h = self.norm(self.words(input_ids) + self.types(token_type_ids))
        return self.head(nn.functional.layer_norm(h + 1, (8,), self.gain, self.shift))  # type: ignore[no-any-return]


def tokens(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (4, 11), generator=generator),
        "token_type_ids": torch.randint(0, 2, (4, 11), generator=generator),
    }


def test_an_approximate_model_of_tokens_is_read_back(tmp_path: Path) -> None:
    """Its integers stay in their ranges, so that the model can be looked into again, and verified."""
    torch.manual_seed(0)
    source = Tokens().eval()
    conversion = normswap.convert(source, calibration=[tokens(0), tokens(1)], approximate=True)
    assert len(conversion.plan.swaps) == 2
    directory = normswap.save(conversion, tmp_path / "saved")
    assert [entry.get("high") for entry in recipe_of(directory)["inputs"]] == [50, 2]
    loaded = normswap.load(directory, Tokens)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded.eval()(**tokens(3)), conversion.model(**tokens(3)))


class Nested(nn.Module):
    """Takes a dict with a list in it, a flag and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, batch: dict[str, Any], add: bool, *, scale: float, shift: Tensor | None = None) -> Tensor:
        first, (second, ids) = batch["first"], batch["more"]
        assert add and scale == 0.5 and shift is None and ids.dtype == torch.int64 and isinstance(batch["more"], list)  # noqa: PT018
        return self.norm(first + scale * second) + ids[:, None]  # type: ignore[no-any-return]


def test_inputs_that_are_no_tensors_are_read_back(tmp_path: Path) -> None:
    batch = {"first": torch.randn(4, 3), "more": [torch.randn(4, 3), torch.randint(0, 7, (4,))]}
    conversion = normswap.convert(randomise(Nested(), 1).eval(), Inputs((batch, True), {"scale": 0.5, "shift": None}))
    directory = normswap.save(conversion, tmp_path / "saved")
    again = read_recipe(directory).example_inputs()
    assert again is not None
    assert again.args[1] is True
    assert again.kwargs == {"scale": 0.5, "shift": None}
    shapes = [tuple(again.args[0]["first"].shape), *(tuple(tensor.shape) for tensor in again.args[0]["more"])]
    assert shapes == [(4, 3), (4, 3), (4,)]
    loaded = normswap.load(directory, Nested)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded.eval()(batch, True, scale=0.5), conversion.model(batch, True, scale=0.5))


def test_inputs_of_a_class_of_ones_own_are_not_recorded(tmp_path: Path) -> None:
    class Batch(dict[str, Tensor]):
        pass

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, batch: Batch) -> Tensor:
            return self.norm(batch["x"])  # type: ignore[no-any-return]

    conversion = normswap.convert(Takes().eval(), (Batch(x=torch.randn(4, 3)),))
    assert read_recipe(normswap.save(conversion, tmp_path / "saved")).example_inputs() is None


def test_an_approximate_bert_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37, "vocab_size": 50}
    torch.manual_seed(0)
    BertModel(BertConfig(**small, type_vocab_size=2)).eval().save_pretrained("bert")
    torch.save({**tokens(0), "attention_mask": torch.ones(4, 11, dtype=torch.int64)}, "batch.pt")
    convert_to_directory("hf:bert", tmp_path / "out", ConvertOptions(data="batch.pt", approximate=True, onnx=False))
    loaded = normswap.load("out")
    assert isinstance(loaded, nn.Module)
    assert sum(isinstance(m, BatchlessNorm) for m in loaded.modules()) == 3
    assert normswap.verify("out", "out")


def test_norms_that_are_modules_are_found_without_inputs(tmp_path: Path) -> None:
    """By their names: the model need not run, nor be traced."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.EmbeddingBag(20, 6), nn.BatchNorm1d(6)

        def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
            if offsets[0] != 0 or (offsets.diff() <= 0).any():
                raise RuntimeError("offsets ascend from 0")
            return self.norm(self.embed(text, offsets))  # type: ignore[no-any-return]

    inputs = (torch.tensor([3, 4, 1, 19, 0, 2]), torch.tensor([0, 2, 5]))
    conversion = normswap.convert(randomise(Picky(), 2).eval(), inputs)
    loaded = normswap.load(normswap.save(conversion, tmp_path / "saved"), Picky)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded.eval()(*inputs), conversion.model(*inputs))


class Unsaved(nn.Module):
    """Computes with a tensor that no state dict has, and that each new one draws anew."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shift = nn.BatchNorm1d(3), torch.randn(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.shift  # type: ignore[no-any-return]


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\nfrom torch import nn, Tensor\n" + inspect.getsource(Unsaved) + "\nUnsaved.count = 0\n"
    code += "def net():\n    Unsaved.count += 1\n    torch.manual_seed(Unsaved.count)\n    return Unsaved()\n"
    (tmp_path / "save_test_unsaved.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LoadError, match="what was written cannot be read back as it was: its output for the example inputs differs"):
        convert_to_directory("save_test_unsaved:net", tmp_path / "out", ConvertOptions(inputs=["4x3"], onnx=False))
    assert not list(tmp_path.glob("*out*"))


def test_where_its_weights_lie_in_memory_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product may be rounded by it, and transformers reads weights in place, wherever the file has them. Here it is the output."""
    code = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)  # which stays: a swap makes a copy, in other memory
        memory = torch.zeros(256, dtype=torch.uint8).numpy()
        self.far = nn.Parameter(torch.frombuffer(memory, dtype=torch.float32, offset=24, count=3))

    def forward(self, x):
        return self.norm(x) + self.far.data_ptr() % 64
"""
    (tmp_path / "save_test_far.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert __import__("save_test_far").Net().far.data_ptr() % 64 != 0
    _, directory = convert_to_directory("save_test_far:Net", tmp_path / "out", ConvertOptions(inputs=["4x3"], onnx=False))
    assert (directory / "model.safetensors").is_file()


def test_a_model_that_differs_from_itself_is_no_matter(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(3), [0]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)  # type: ignore[no-any-return]

    conversion = normswap.convert(randomise(Noisy(), 1).eval(), torch.randn(4, 3))
    noise = itertools.count()
    conversion.module.register_forward_hook(lambda module, args, output: output + next(noise))
    normswap.save(conversion, tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            table = torch.randn(3, 4)
            self.register_buffer("low", table[:2])
            self.register_buffer("high", table[1:])
            self.register_buffer("again", self.low)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.low.sum(0) * self.high.sum(0)  # type: ignore[no-any-return]

    x = torch.randn(5, 4).to(dtype)
    conversion = normswap.convert(randomise(Slices(), 1).eval().to(dtype), x)
    loaded = normswap.load(normswap.save(conversion, tmp_path / "saved"), Slices)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded.eval()(x), conversion.model(x))


def test_names_that_lead_nowhere_are_not_saved(tmp_path: Path) -> None:
    model = normswap.convert(_factory(1), torch.randn(4, 3, 8, 8)).model
    setattr(model, "a.b", nn.Linear(2, 3))
    with pytest.raises(SwapError, match=r"cannot be saved by the names of its tensors: a module of it cannot be found by its name a\.b"):
        normswap.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_architecture_on_the_meta_device(saved: tuple[nn.Module, Path]) -> None:
    def meta() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3))

    with pytest.raises(LoadError, match=r"is on the meta device, which has no memory that the weights in .* could go to"):
        normswap.load(saved[1], meta)


EXTRA = """
from torch import nn

class Extra(nn.Module):
    def __init__(self, calls=0):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(3), calls

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        return self.norm(x) + self.calls
"""


def test_state_that_is_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.pt holds it, and model.safetensors cannot."""
    (tmp_path / "save_test_extra.py").write_text(EXTRA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    extra = importlib.import_module("save_test_extra").Extra
    source, x = randomise(extra(3), 1).eval(), torch.randn(4, 3)
    torch.save(source, "net.pt")
    convert_to_directory("net.pt", tmp_path / "out", ConvertOptions(inputs=["4x3"], onnx=False, trust_packages=["save_test_extra"]))
    loaded = normswap.load("out", trust_packages=["save_test_extra"])
    torch.testing.assert_close(loaded(x), source(x))  # type: ignore[operator]
    with pytest.raises(LoadError, match=r"does not fit the given architecture: it has no _extra_state"):
        normswap.load("out", extra)
    with pytest.raises(SwapError, match=r"^_extra_state of Extra is state that is no tensor, which model\.safetensors cannot hold"):
        normswap.save(normswap.convert(source, x), tmp_path / "saved")
