"""save and load: the recipe, re-applied to a fresh model, gives the same model; anything else is an error that says what differs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import normswap
from fixtures.nets import case, randomise
from normswap.errors import LoadError, UsageError
from normswap.load import load as load_source
from normswap.save import unwrapped


def _factory(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 7), nn.BatchNorm1d(7)
    )
    return randomise(model, seed).eval()


def _lasting(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is a matter of a training run."""
    return {name: t for name, t in model.state_dict().items() if name.rpartition(".")[2] not in ("input_mean", "trend", "steps")}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def saved(tmp_path: Path, x: Tensor) -> tuple[nn.Module, Path]:
    conversion = normswap.convert(_factory(1), x)
    return conversion.model, normswap.save(conversion, tmp_path / "saved")


def test_a_fresh_model_with_other_weights_becomes_the_saved_one(saved: tuple[nn.Module, Path], x: Tensor) -> None:
    model, directory = saved
    loaded = normswap.load(directory, lambda: _factory(2))
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), model(x))
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k, v in _lasting(model).items()}


def test_the_weights_are_a_plain_state_dict(saved: tuple[nn.Module, Path]) -> None:
    from safetensors.torch import load_file

    model, directory = saved
    assert set(load_file(directory / "model.safetensors")) == set(_lasting(model)) < set(model.state_dict())
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
    assert list(loaded.state_dict()) == list(_lasting(model))
    assert torch.equal(loaded(x), model(x))


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
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in _lasting(model).items()}
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


def test_truncated_weights(saved: tuple[nn.Module, Path]) -> None:
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"model\.safetensors cannot be read"):
        normswap.load(saved[1], _factory)


def test_a_directory_of_somebody_else_is_not_replaced(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").touch()
    with pytest.raises(UsageError, match="would be replaced"):
        normswap.save(saved[0], tmp_path / "theirs")
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["notes.txt"]
