"""Names that build a model; and what is said where one leads nowhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision_shim  # noqa: F401
from own_net import NET, fails

from normswap.errors import UsageError
from normswap.files.build import build
from normswap.files.load import load


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


def test_what_transformers_hides_of_a_mismatched_torchvision_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*args: Any, **kwargs: Any) -> None:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'BertModel'. Are this object's requirements defined correctly?") from error

    (tmp_path / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoConfig.from_pretrained", hidden)
        text = fails(f"hf:{tmp_path}")
    assert "are builds that do not fit each other" in text
    assert "operator torchvision::nms does not exist" in text


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
