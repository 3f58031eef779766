"""save and load: the recipe, re-applied to a fresh model, gives the same model; anything else is an error that says what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import normswap
from fixtures.nets import case, randomise
from normswap.errors import LoadError, UsageError
from normswap.save import unwrapped


def _factory(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 7), nn.BatchNorm1d(7)
    )
    return randomise(model, seed).eval()


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
