"""State dicts: found in a file, and loaded as the architecture itself loads them."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision_shim  # noqa: F401
from own_net import NET, fails, own_model
from torch import nn

from normswap.errors import LoadError, UsageError
from normswap.files.build import build
from normswap.files.load import load
from normswap.files.state_dict import model_or_state_dict


def weights() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in own_model().state_dict().items()}


def without_counters(state: dict[str, torch.Tensor]) -> Any:
    """Taken out by hand, so that the versions of the modules are still those of layers that have counters."""
    kept = own_model().state_dict()
    for key in [key for key in kept if key.endswith("num_batches_tracked")]:
        del kept[key]
    kept.update((key, state[key]) for key in kept)
    return kept


WRAPPINGS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "bare": lambda w: w,
    "ordered": OrderedDict,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
    "ddp": lambda w: {f"module.{key}": value for key, value in w.items()},
    "compiled": lambda w: {f"_orig_mod.{key}": value for key, value in w.items()},
    "lightning": lambda w: {"state_dict": {f"model.{key}": value for key, value in w.items()}},
    "compiled of ddp": lambda w: {f"_orig_mod.module.{key}": value for key, value in w.items()},
    "fsdp": lambda w: {f"_fsdp_wrapped_module.{key}": value for key, value in w.items()},
    "a part compiled": lambda w: {key.replace("conv.", "conv._orig_mod."): value for key, value in w.items()},
    "a part in a checkpoint": lambda w: {key.replace("norm.", "norm._checkpoint_wrapped_module."): value for key, value in w.items()},
    "an attribute of any name": lambda w: {"state_dict": {f"backbone.{key}": value for key, value in w.items()}},
    "lightning with a loss": lambda w: {"state_dict": {**{f"model.{k}": v for k, v in w.items()}, "loss.weight": torch.ones(5)}},
    "averaged": lambda w: {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in w.items()}},
    "two dicts deep": lambda w: {"model": {"state_dict": w}, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
    "without counters": without_counters,
    "ddp of compiled": lambda w: {f"module._orig_mod.{key}": value for key, value in w.items()},
}


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts(package: Path, wrapping: str, new_form: bool) -> None:
    expected = weights()
    torch.save(WRAPPINGS[wrapping](expected), package / "w.pt", _use_new_zipfile_serialization=new_form)
    loaded = load(str(package / "w.pt"), arch=f"{NET}:net")
    assert (loaded.form, loaded.factory, loaded.stem) == ("state_dict", f"{NET}:net", "w")
    found = loaded.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_state_dicts_keep_their_dtype(package: Path, dtype: torch.dtype) -> None:
    safetensors.torch.save_file(own_model().to(dtype).state_dict(), package / "w.safetensors")
    assert load("w.safetensors", arch=f"{NET}:net").model.state_dict()["conv.weight"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_that_only_stores_is_not_the_dtype_of_the_model(package: Path, dtype: torch.dtype) -> None:
    """No norm computes in 8 bits, and float32 has all of their numbers."""
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights().items()}
    safetensors.torch.save_file(stored, package / "w.safetensors")
    found = load("w.safetensors", arch=f"{NET}:net").model.state_dict()
    assert found["conv.weight"].dtype == torch.float32
    assert all(torch.equal(found[key], stored[key].to(found[key].dtype)) for key in stored)


def test_imaginary_parts_are_not_lost(package: Path) -> None:
    torch.save(weights() | {"conv.weight": weights()["conv.weight"] * 1j}, package / "w.pt")
    text = fails("w.pt", arch=f"{NET}:net")
    assert "w.pt holds complex numbers where load_test_net:net has real ones, which would lose their imaginary parts: conv.weight" in text


def test_state_dicts_that_do_not_fit(package: Path) -> None:
    found = weights()
    del found["norm.weight"]
    found |= {f"extra{i}": torch.ones(1) for i in range(9)}
    found["conv.weight"] = torch.ones(4, 1, 3, 3)
    torch.save(found, package / "w.pt")
    text = fails("w.pt", arch=f"{NET}:net")
    assert "w.pt does not hold the weights of load_test_net:net" in text
    assert "missing: norm.weight\n" in text
    assert "unexpected: extra0, extra1, extra2, extra3, extra4 ... and 4 more" in text
    assert "of another shape (model against file): conv.weight (2, 1, 3, 3) against (4, 1, 3, 3)" in text


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model


def without(state: dict[str, Any], ending: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith(ending)}


def of_torch_04(state: dict[str, Any]) -> dict[str, Any]:
    old = OrderedDict(without(state, "num_batches_tracked"))
    old._metadata = OrderedDict({"": {"version": 1}, "0": {"version": 1}, "1": {"version": 1}})  # type: ignore[attr-defined]
    return old


def norms() -> nn.Module:
    return drawn(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))


def old_weight_norm() -> nn.Module:
    return drawn(nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 6, 3))))


OLD_KEYS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "no num_batches_tracked": ("norms", lambda: without(norms().state_dict(), "num_batches_tracked")),
    "no num_batches_tracked, of torch 0.4": ("norms", lambda: of_torch_04(norms().state_dict())),
    "BatchNorm into frozen BatchNorm": ("frozen", lambda: norms().state_dict()),
    "frozen BatchNorm into BatchNorm": ("norms", lambda: without(dict(norms().state_dict()), "num_batches_tracked")),
    "weight_g and weight_v": ("weight_norm", lambda: old_weight_norm().state_dict()),
    "a name that the module changed": ("renamed", lambda: {k.replace("1.", "1.norm."): v for k, v in norms().state_dict().items()}),
    "lazy layers": ("lazy", lambda: norms().state_dict()),
    "a version that transposes": ("versioned", lambda: drawn(nn.Sequential(nn.Linear(4, 4))).state_dict()),
    "the same version": ("versioned", lambda: drawn(build(f"{NET}:versioned")).state_dict()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("saved", OLD_KEYS)
def test_what_the_modules_know_of_their_past(package: Path, saved: str, prefix: str) -> None:
    """As torch's own load_state_dict(strict=True), tensor for tensor; and a prefix on all keys changes nothing."""
    factory, make = OLD_KEYS[saved]
    state = make()
    expected = build(f"{NET}:{factory}")
    expected.load_state_dict(copy.deepcopy(state), strict=True)
    inner = {prefix[:-1] + ("." + key if key else ""): value for key, value in getattr(state, "_metadata", {}).items()}
    prefixed = OrderedDict((prefix + key, value) for key, value in state.items())
    if hasattr(state, "_metadata"):
        prefixed._metadata = state._metadata if not prefix else {"": {"version": 1}, **inner}  # type: ignore[attr-defined]
    torch.save(prefixed, package / "w.pt")
    found = load("w.pt", arch=f"{NET}:{factory}").model.state_dict()
    assert list(found) == list(expected.state_dict())
    assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("factory", "state", "texts"),
    [
        ("norms", lambda: without(norms().state_dict(), "bias"), ["missing: 0.bias, 1.bias"]),
        ("renamed", lambda: norms().state_dict(), ["missing: 1.bn.weight, 1.bn.bias", "unexpected: 1.weight, 1.bias, 1.running_mean"]),
        ("lax", lambda: {"0.weight": torch.ones(5, 3), "0.bias": torch.ones(5)}, ["missing: 1.weight, 1.bias, 1.running_mean"]),
        ("norms", lambda: {**norms().state_dict(), "0.bias": torch.ones(7)}, ["(model against file): 0.bias (6,) against (7,)"]),
        ("norms", lambda: {**norms().state_dict(), "0.bias": torch.tensor(1.0)}, ["(model against file): 0.bias (6,) against ()"]),
        ("Raising", lambda: {"weight": torch.ones(5, 3)}, ["its load_state_dict raised KeyError: 'backbone'"]),
        ("meta", lambda: norms().state_dict(), ["builds a model on the meta device", "without torch.device('meta') around it"]),
    ],
)
def test_what_torch_does_not_load_is_refused(package: Path, factory: str, state: Callable[[], Any], texts: list[str]) -> None:
    torch.save(dict(state()), package / "w.pt")
    found = fails("w.pt", arch=f"{NET}:{factory}")
    assert all(text in found for text in texts), found


@pytest.mark.parametrize("versions", [[1], {"": 3}, {1: {}}, "text", {"1": {"version": "x"}}])
def test_versions_that_make_no_sense_are_no_traceback(package: Path, versions: object) -> None:
    state = norms().state_dict()
    state._metadata = versions
    torch.save(state, package / "w.pt")
    with contextlib.suppress(LoadError):
        load("w.pt", arch=f"{NET}:norms")


def test_a_state_dict_asks_for_its_architecture(package: Path) -> None:
    torch.save(weights(), package / "w.pt")
    text = fails("w.pt", UsageError)
    assert "holds the weights of a model (7 tensors), not the model" in text
    assert "--arch torchvision:NAME[@WEIGHTS], timm:NAME[@TAG], hf:DIRECTORY or package.module:factory" in text


def test_arch_where_there_is_an_architecture(package: Path) -> None:
    torch.save(nn.Linear(2, 3), package / "m.pt")
    assert "m.pt holds the whole model" in fails("m.pt", UsageError, arch="torch.nn:Flatten")
    assert "builds its own architecture" in fails("torch.nn:Flatten", UsageError, arch="torch.nn:Flatten")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "holds 2 models: a, b"),
        ({"a": {"x": {"w": torch.ones(1)}}, "b": {"y": {"w": torch.ones(1)}}}, "holds 2 models: a.x, b.y"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}}, "holds a dict, neither"),
        ({"epoch": 3}, "holds a dict, neither a model nor a state dict"),
        ({}, "holds a dict"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        (None, "holds None"),
    ],
)
def test_files_without_a_model(tmp_path: Path, content: object, text: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert text in fails(tmp_path / "x.pt")


def test_a_module_beside_other_things(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 3), "epoch": 1}, tmp_path / "x.pt")
    assert load(str(tmp_path / "x.pt")).form == "module"


def test_two_models_below_two_names(package: Path) -> None:
    """A student and the average of its weights, in one LightningModule."""
    torch.save({f"{place}.{key}": value for place in ("student", "ema") for key, value in weights().items()}, package / "w.pt")
    assert "w.pt holds 2 models: student, ema" in fails("w.pt", arch=f"{NET}:net")


def test_a_dict_that_holds_itself_has_no_model() -> None:
    """Of files of torch.save only those can be that are read with --trust."""
    found: dict[str, Any] = {"epoch": 3}
    found["again"] = {"found": found}
    with pytest.raises(LoadError, match="holds a dict, neither a model nor a state dict"):
        model_or_state_dict(found, "x.pt")


# -- weights in several files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(package: Path) -> Path:
    """Weights in two parts, as transformers, diffusers and accelerate save them."""
    state = weights()
    places = {key: f"model-0000{1 + (i > 2)}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in {*places.values()}:
        safetensors.torch.save_file({key: value for key, value in state.items() if places[key] == name}, package / name)
    path = package / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def test_weights_in_parts(index: Path) -> None:
    found = load(str(index), arch=f"{NET}:net").model.state_dict()
    saved = {key: value for part in index.parent.glob("*-of-*") for key, value in safetensors.torch.load_file(part).items()}
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in saved.items())


def test_one_part_names_the_index(index: Path) -> None:
    with pytest.raises(LoadError, match="does not hold the weights of") as error:
        load(str(index.parent / "model-00001-of-00002.safetensors"), arch=f"{NET}:net")
    assert error.value.hint == "it is one part of several: give the .index.json beside it"
    with pytest.raises(UsageError, match="is a directory") as other:
        load(str(index.parent))
    assert other.value.hint == f"give {index}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read as an index of weights"),
        ("[]", "cannot be read as an index of weights"),
        ("{}", "cannot be read as an index of weights"),
        ('{"weight_map": {}}', "names files that do not lie beside it"),
        ('{"weight_map": {"a": "../w.safetensors"}}', "names files that do not lie beside it"),
        ('{"weight_map": {"a": 3}}', "names files that do not lie beside it"),
        ('{"weight_map": {"a": ["w.safetensors"]}}', "names files that do not lie beside it"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "names files that do not lie beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "hold other weights: a, conv.bias"),
    ],
)
def test_an_index_that_is_wrong(index: Path, content: str, text: str) -> None:
    index.write_text(content)
    assert text in fails(index, arch=f"{NET}:net")


# -- as torch 0.3 and 0.4 wrote them, under Python 2 ---------------------------------------------------------------------------------------


class OldPickler(pickle.Pickler):
    """What these wrote for a tensor and for an OrderedDict."""

    plain = False

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            args = (obj._typed_storage(), obj.storage_offset(), tuple(obj.shape), obj.stride())
            return (torch._utils._rebuild_tensor, args) if self.plain else (torch._utils._rebuild_tensor_v2, (*args, False, None))
        if isinstance(obj, OrderedDict):
            return OrderedDict, ([[key, value] for key, value in obj.items()],), vars(obj) or None
        return NotImplemented


class OlderPickler(OldPickler):
    plain = True


@pytest.mark.parametrize("pickler", [OldPickler, OlderPickler])
@pytest.mark.parametrize("make", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}], ids=["bare", "beside others"])
def test_files_of_torch_0_3_and_0_4(package: Path, make: Callable[[Any], Any], pickler: type[pickle.Pickler]) -> None:
    """As the weights that come with lpips: they were 'a pickle that wants to run code that nobody vouched for'."""
    state = without(own_model().state_dict(), "num_batches_tracked")
    saved = OrderedDict(state)
    saved._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    module = types.SimpleNamespace(Pickler=pickler, dump=pickle.dump, __name__="pickle")
    torch.save(make(saved), package / "w.pth", pickle_module=module, _use_new_zipfile_serialization=False)
    found = load("w.pth", arch=f"{NET}:net").model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
