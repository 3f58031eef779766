"""Every way in: files, specs, state dicts and programs; and what is said where there is no way in."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision_shim  # noqa: F401
from torch import nn

from normswap.errors import LoadError, NormswapError, UnsafePickleError, UsageError
from normswap.files.load import build, load

NET = "load_test_net"
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(x))

class Config:
    pass

class Odd(Net):
    def __init__(self):
        super().__init__()
        self.config = Config()

def net():
    print("built")
    return Net()

def broken():
    raise ValueError("no such data set")

def wrong():
    return [1]

def needs(size):
    return Net()

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def _load_from_state_dict(self, state, prefix, *rest):
        for key in [key for key in state if key.startswith(prefix + "norm.")]:
            state[prefix + "bn." + key[len(prefix) + 5:]] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *rest)

class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if (metadata.get("version") or 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)

class Lax(nn.Sequential):
    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)

class Raising(nn.Linear):
    def __init__(self):
        super().__init__(3, 5)

    def load_state_dict(self, state, strict=True):
        raise KeyError("backbone")

def norms():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))

def frozen():
    from torchvision.ops import FrozenBatchNorm2d
    return nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6))

def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)))

def renamed():
    return nn.Sequential(nn.Conv2d(3, 6, 3), Renamed())

def versioned():
    return nn.Sequential(Versioned(4, 4))

def lax():
    return Lax(nn.Linear(3, 5), nn.BatchNorm1d(5))

def lazy():
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())

def meta():
    with torch.device("meta"):
        return norms()

instance = Net()
nested = type("Holder", (), {"make": staticmethod(net)})
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own code in the working directory, which is not on sys.path."""
    (tmp_path / f"{NET}.py").write_text(CODE)
    (tmp_path / f"{NET}_bad.py").write_text("1 / 0")
    (tmp_path / f"{NET}_needy.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(NET)]:
        del sys.modules[name]


def own_model(cls: str = "Net") -> nn.Module:
    return load(f"{NET}:{cls}").model  # type: ignore[return-value]


def fails(source: str | Path, kind: type[NormswapError] = LoadError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(str(source), **options)
    assert type(caught.value) is kind
    assert caught.value.message.count("\n") < 8
    return str(caught.value)


# --- specs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "stem", "cls"),
    [
        ("torchvision:resnet18", "resnet18", "ResNet"),
        ("torchvision:deeplabv3_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "DeepLabV3"),  # its backbone would download
        ("torchvision:ssdlite320_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "SSD"),
        ("timm:resnet10t", "resnet10t", "ResNet"),
        ("timm:resnet10t.c3_in1k", "resnet10t.c3_in1k", "ResNet"),
        ("torch.nn:Flatten", "Flatten", "Flatten"),
    ],
)
def test_specs_build_models(spec: str, stem: str, cls: str) -> None:
    pytest.importorskip("torchvision" if "vision" in spec else "timm")
    loaded = load(spec)
    assert type(loaded.model).__name__ == cls
    assert (loaded.source, loaded.stem, loaded.form, loaded.factory) == (spec, stem, "factory", spec)


def test_building_draws_the_same_numbers_and_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    first, second = build("torchvision:resnet18").state_dict(), build("torchvision:resnet18").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_user_factories(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert type(load(f"{NET}:net").model).__name__ == "Net"
    assert load(f"{NET}:nested.make").stem == "make"
    assert load(f"{NET}:Net").stem == "Net"
    assert "built" not in capfd.readouterr().out  # stdout is for results


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("no_such_module_at_all:net", "there is no module no_such_module_at_all"),
        (f"{NET}.sub:net", f"there is no module {NET}.sub"),
        (f"{NET}:nothing", f"{NET} has no nothing"),
        (f"{NET}_bad:net", "raised ZeroDivisionError: division by zero"),
        (f"{NET}_needy:net", "needs the module no_such_package_at_all, which is not installed"),
        (f"{NET}:broken", "raised ValueError: no such data set"),
        (f"{NET}:wrong", "returned a list, not an nn.Module"),
        (f"{NET}:needs", "raised TypeError"),
        (f"{NET}:instance", "is a Net, not something to call"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19'\nhint: did you mean resnet1"),
        ("timm:resnet10", "timm has no model 'resnet10'"),
        ("timm:hf-hub:someone/model", "timm has no model"),
        ("timm:local-dir:/tmp", "timm has no model"),
        ("hf:/no/such/directory", "has no config.json"),
    ],
)
def test_specs_that_lead_nowhere(package: Path, spec: str, text: str) -> None:
    assert text in fails(spec)


@pytest.mark.parametrize("spec", ["resnet18", "torchvision:", "timm:", "a:b:c", "", "package.module:", "-:x"])
def test_arch_that_is_no_spec(tmp_path: Path, spec: str) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    assert "does not name an architecture" in fails(tmp_path / "w.safetensors", UsageError, arch=spec)


def test_weights_that_do_not_exist() -> None:
    assert "choose from IMAGENET1K_V1" in fails("torchvision:resnet18@IMAGENET9", UsageError).replace("IMAGENET1K_V1, IMAGENET1K_V1", "X")
    assert "choose from DEFAULT, c3_in1k" in fails("timm:resnet10t@other", UsageError)


def test_weights_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    text = fails("torchvision:resnet18@IMAGENET1K_V1")
    assert "the weights of torchvision:resnet18@IMAGENET1K_V1 cannot be fetched: Name or service not known" in text
    assert "is there a network?" in text
    assert capfd.readouterr().out == ""


def test_nothing_is_downloaded_without_the_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", forbidden)
    monkeypatch.setattr("torch.hub.download_url_to_file", forbidden)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", forbidden)
    for name in ("fcn_resnet50", "lraspp_mobilenet_v3_large", "retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "googlenet"):
        load(f"torchvision:{name}")


def test_mismatched_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatched(name: str, package: str | None = None) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    with monkeypatch.context() as patch:
        patch.setattr("importlib.import_module", mismatched)
        text = fails("torchvision:resnet18")
    assert "are builds that do not fit each other" in text
    assert "install both from the same place" in text


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm: needs the package timm, which cannot be imported" in fails("timm:resnet18")


def test_transformers_directory_keeps_its_head(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "saved")
    capfd.readouterr()
    loaded = load(f"hf:{tmp_path / 'saved'}")
    assert type(loaded.model) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items())
    assert loaded.stem == "saved"
    assert capfd.readouterr() == ("", "")
    weights = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    weights.pop("classifier.1.weight")
    safetensors.torch.save_file(weights, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    assert "lacks weights of ResNetForImageClassification: classifier.1.weight" in fails(f"hf:{tmp_path / 'saved'}")


CONFIG = '{"architectures": ["ResNetModel"], "model_type": "resnet"}'
ASKS: dict[str, tuple[str, str, str]] = {
    "a kernel": (
        "config.json",
        '{"_attn_implementation": "evil/kernel"}',
        "a kernel from the hub: _attn_implementation is 'evil/kernel'",
    ),
    "a kernel of a part": (
        "config.json",
        '{"text_config": {"attn_implementation": {"a": "x:y"}}}',
        "asks for a kernel from the hub: attn_implementation is {'a': 'x:y'}",
    ),
    "another model": (
        "config.json",
        '{"backbone": "hf-hub:evil/repo"}',
        "another model, to be fetched: backbone is 'hf-hub:evil/repo'",
    ),
    "weights elsewhere": (
        "config.json",
        '{"transformers_weights": "../w.bin"}',
        "weights in '../w.bin', which is not a file in it",
    ),
    "no names": ("config.json", '{"architectures": [7]}', "has a config.json whose architectures are not names of classes"),
    "a path": ("config.json", '{"architectures": ["utils.hub"]}', "has a config.json whose architectures are not names of classes"),
    "a list": ("config.json", "[]", "has a config.json that is no JSON object"),
    "nothing": ("config.json", "[" * 200_000, "cannot be read: it is nested too deeply"),
    "an adapter": ("adapter_config.json", "{}", "holds an adapter (adapter_config.json)"),
    "shards elsewhere": (
        "model.safetensors.index.json",
        '{"weight_map": {"a": "m-1.safetensors", "b": "/etc/x"}}',
        "keeps weights in '/etc/x', which is not a file in it",
    ),
    "an index of nothing": ("pytorch_model.bin.index.json", "[]", "has an pytorch_model.bin.index.json without a weight_map"),
}


@pytest.mark.parametrize("what", ASKS)
def test_a_directory_that_asks_for_more_than_is_in_it(what: str, tmp_path: Path) -> None:
    name, content, text = ASKS[what]
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / name).write_text(content)
    assert text in fails(f"hf:{tmp_path}")


def test_a_directory_with_code_gives_the_model_of_transformers(tmp_path: Path) -> None:
    """Never the code: neither where transformers knows the class, nor where it does not, nor where only the code does."""
    transformers = pytest.importorskip("transformers")
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    code = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": code, "attn_implementation": "eager"}))
    assert type(load(f"hf:{tmp_path}").model) is transformers.ResNetModel
    for change in ({"architectures": ["Evil"]}, {"architectures": ["AutoModelForCausalLM"]}, {"architectures": ["AutoTokenizer"]}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": code} | change))
        assert f"holds a {change['architectures'][0]}, which the installed transformers" in fails(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": "evil", "architectures": None}))
    assert "transformers cannot load" in fails(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


# --- state dicts --------------------------------------------------------------------------------------------------------------------


def weights() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in own_model().state_dict().items()}


WRAPPINGS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "bare": lambda w: w,
    "ordered": OrderedDict,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
    "ddp": lambda w: {f"module.{key}": value for key, value in w.items()},
    "compiled": lambda w: {f"_orig_mod.{key}": value for key, value in w.items()},
    "lightning": lambda w: {"state_dict": {f"model.{key}": value for key, value in w.items()}},
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


@pytest.mark.parametrize("told", [[1], {"": 3}, {1: {}}, "text", {"1": {"version": "x"}}])
def test_versions_that_make_no_sense_are_no_traceback(package: Path, told: object) -> None:
    state = norms().state_dict()
    state._metadata = told
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
