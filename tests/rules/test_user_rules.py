"""Rules of the user's own: by name on the command line, held to their contract, recorded and found again. The rule is that of the docs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import normswap
from normswap.cli.app import app
from normswap.errors import LoadError, NormswapError, UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.rules.user_rules import named, spec_of

PAGE = Path(__file__).parents[2] / "docs" / "writing_rules.md"
X = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(0))
BUILD = """

def net():
    from fixtures.nets import randomise
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), StreamNorm(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7), nn.GroupNorm(1, 7))
    model[1].center.normal_(), model[1].spread.uniform_(0.3, 3)
    model[1].gain.data.normal_(), model[1].offset.data.normal_()
    return randomise(model, 0).eval()

NOT_A_RULE = ("kind", recognises, check, build)
"""


@pytest.fixture
def mynorms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The documented module, in the working directory, which is not on the path."""
    example = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "mynorms.py").write_text(example + BUILD)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    normswap.models.spec.make_working_directory_importable()  # type: ignore[attr-defined]
    importlib.invalidate_caches()
    yield importlib.import_module("mynorms")
    del sys.modules["mynorms"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def kinds(plan: normswap.Plan) -> dict[str, str]:
    return {d.name: d.kind for d in (*plan.swaps, *plan.skips)}


# -- by name -----------------------------------------------------------------------------------------------------------------


def test_a_reason_has_the_names_of_the_layers_own_tensors(mynorms: ModuleType) -> None:
    model = mynorms.net()
    model[1].spread[0, 2] = -1e-3
    reasons = {skip.name: skip.reason for skip in normswap.plan(model, X, rules=(mynorms.EXACT, *normswap.DEFAULT_RULES)).skips}
    assert reasons["1"].startswith("has 1 of 5 channels whose spread + eps is not positive (eps=0.001): no std to divide by; repair spread")
    assert "running_var" not in reasons["1"]


@pytest.mark.parametrize("on_the_path", [False, True])
def test_inspect_with_a_rule(mynorms: ModuleType, on_the_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script has not the working directory on its path."""
    if not on_the_path:
        del sys.modules["mynorms"]
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
        importlib.invalidate_caches()
    result = run("inspect", "mynorms:net", "--input", "2x3x9x8", "--rule", "mynorms:EXACT", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    swaps = json.loads(result.stdout)["plan"]["swaps"]
    assert [(s["name"], s["kind"], s["preserves"]) for s in swaps] == [("1", "stream_norm", "exact"), ("4", "batch_norm", "exact")]


def test_without_the_rule_the_layer_stays(mynorms: ModuleType) -> None:
    result = run("inspect", "mynorms:net", "--input", "2x3x9x8", "--json")
    assert "pass a rule of your own" in json.loads(result.stdout)["plan"]["skips"][0]["reason"]


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("mynorms", "--rule 'mynorms' does not name a normswap.Rule", "expected package.module:NAME, where NAME is a normswap.Rule"),
        ("mynorms:", "--rule 'mynorms:' does not name a normswap.Rule", "expected package.module:NAME"),
        ("no_such_module:RULE", "--rule no_such_module:RULE: there is no module no_such_module", "and in {cwd}"),
        ("mynorms.deeper:RULE", "--rule mynorms.deeper:RULE: there is no module mynorms.deeper", "it is looked for"),
        ("needy:RULE", "--rule needy:RULE: importing needy needs the module no_such_package, which is not installed", ""),
        ("broken:RULE", "--rule broken:RULE: importing broken raised ZeroDivisionError: division by zero", ""),
        ("mynorms:exact", "--rule mynorms:exact: mynorms has no exact", "after the colon stands a normswap.Rule"),
        ("mynorms:NOT_A_RULE", "--rule mynorms:NOT_A_RULE is of type tuple; expected a normswap.Rule", "docs/writing_rules.md"),
        ("mynorms:StreamNorm", "--rule mynorms:StreamNorm is the class StreamNorm; expected a normswap.Rule", "docs/writing_rules.md"),
        ("mynorms:build", "--rule mynorms:build is of type function; expected a normswap.Rule", "docs/writing_rules.md"),
    ],
)
def test_what_is_no_rule(mynorms: ModuleType, command: str, spec: str, message: str, hint: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(command, "mynorms:net", "--rule", "mynorms:EXACT", "--rule", spec)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert hint.format(cwd=tmp_path) in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_users_rule_goes_first(mynorms: ModuleType, tmp_path: Path) -> None:
    """It may speak for a layer that normswap knows, and the first --rule goes before the second."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nimport normswap\n"
        "def rule(kind): return normswap.Rule(kind, lambda s: isinstance(s.module, nn.BatchNorm2d), lambda s: 'stays, says ' + kind)\n"
        "A, B = rule('a'), rule('b')\n"
    )
    importlib.invalidate_caches()
    for first, second in ("AB", "BA"):
        result = run("inspect", "mynorms:net", "--input", "2x3x9x8", "--rule", f"mine:{first}", "--rule", f"mine:{second}", "--json")
        skips = {s["name"]: s["reason"] for s in json.loads(result.stdout)["plan"]["skips"]}
        assert skips["4"] == f"stays, says {first.lower()}"
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("options", "swaps"),
    [
        (["--include", "stream_norm"], ["1"]),
        (["--include", "batch_*"], ["4"]),
        (["--include", "*_norm", "--exclude", "batch_norm"], ["1"]),
        (["--include", "stream_norm", "--include", "4"], ["1", "4"]),
        (["--exclude", "stream_norm", "--exclude", "4"], []),
        (["--exclude", "group_norm"], ["1", "4"]),
    ],
)
def test_include_and_exclude_match_kinds(mynorms: ModuleType, options: list[str], swaps: list[str]) -> None:
    result = run("inspect", "mynorms:net", "--input", "2x3x9x8", "--rule", "mynorms:EXACT", *options, "--json")
    plan = json.loads(result.stdout)["plan"]
    assert [s["name"] for s in plan["swaps"]] == swaps
    assert {s["reason"] for s in plan["skips"] if s["name"] in {"1", "4"} - set(swaps)} <= {
        "was excluded by name or kind; take it out of exclude to swap it",
        "is not among those that were asked for; add it to include to swap it",
    }


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_kind_that_is_not_there(mynorms: ModuleType, option: str) -> None:
    result = run("inspect", "mynorms:net", "--input", "2x3x9x8", option, "stream_norm")  # a kind only with the rule
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no normalization of the model is called 'stream_norm' or is of that kind" in result.stderr


# -- saved, and found again ----------------------------------------------------------------------------------------------------


def _entries(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "recipe.json").read_text())["rules"]  # type: ignore[no-any-return]


def test_a_directory_finds_its_rule_again(mynorms: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", "mynorms:net", "--input", "2x3x9x8", "--rule", "mynorms:EXACT", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert _entries(out) == [{"kind": "stream_norm", "rule": "mynorms:EXACT", "sites": ["1"]}]
    with pytest.raises(LoadError, match=r"recipe\.json names 'mynorms:net' as what builds the model, and to import that is to run code"):
        normswap.load(out)
    loaded = normswap.load(out, trust=True)
    assert isinstance(loaded, nn.Module)
    assert isinstance(loaded[1], BatchlessNorm)  # type: ignore[index]
    assert normswap.verify(mynorms.net(), loaded, X)
    for arguments in (["verify", "mynorms:net", out], ["verify", out, out / "model.onnx"], ["export", out, "-o", tmp_path / "again.onnx"]):
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert "hint: if it is your own: --arch mynorms:net (factory=... in Python); --trust" in refused.stderr
        assert run(*arguments, "--arch", "mynorms:net").exit_code == 0, arguments  # which imports the rule, too
    assert _entries(normswap.save(loaded, tmp_path / "again")) == _entries(out)
    reverted = run("revert", out, "-o", tmp_path / "back.safetensors", "--trust")
    assert reverted.exit_code == 1
    assert reverted.stderr.startswith(
        "error: 1 cannot be reverted: no source layer with statistics was recorded (1 was made by your rule 'stream_norm')\n"
        "hint: use the original model"
    )
    assert run("revert", out, "-o", tmp_path / "back.safetensors", "--skip", "--trust-pickle").exit_code == 0  # its old name
    assert {"1.mean", "4.running_mean"} < set(load_file(tmp_path / "back.safetensors"))
    back = normswap.revert(loaded, skip=True)
    assert isinstance(back, nn.Module)
    assert type(back[4]) is nn.BatchNorm2d  # type: ignore[index]


def test_a_python_rule_is_recorded_where_it_is_found(mynorms: ModuleType, tmp_path: Path) -> None:
    conversion = normswap.convert(mynorms.net(), X, rules=(mynorms.EXACT, *normswap.DEFAULT_RULES))
    saved = normswap.save(conversion.model, tmp_path / "saved")  # the model alone: after training there is no Conversion any more
    assert _entries(saved) == [{"kind": "stream_norm", "rule": "mynorms:EXACT", "sites": ["1"]}]
    loaded = normswap.load(saved, mynorms.net)
    assert torch.equal(loaded(X), conversion.model(X))  # type: ignore[operator]
    assert normswap.verify(mynorms.net(), saved, X, arch="mynorms:net")


def test_a_rule_that_is_nowhere_has_to_be_passed(mynorms: ModuleType, tmp_path: Path) -> None:
    rules = (dataclasses.replace(mynorms.EXACT, kind="mine"), *normswap.DEFAULT_RULES)
    conversion = normswap.convert(mynorms.net(), X, rules=rules)
    saved = normswap.save(conversion, tmp_path / "saved")
    assert _entries(saved) == [{"kind": "mine", "rule": None, "sites": ["1"]}]
    with pytest.raises(LoadError, match=r"has layers that a rule of its author built \(mine: 1\), and does not say where") as raised:
        normswap.load(saved, mynorms.net)
    assert raised.value.hint is not None
    assert "rules=(MY_RULE, *normswap.DEFAULT_RULES)" in raised.value.hint
    loaded = normswap.load(saved, mynorms.net, rules=rules)
    assert torch.equal(loaded(X), conversion.model(X))  # type: ignore[operator]
    with pytest.raises(LoadError, match=r"^1 of the given architecture has no BatchlessNorm"):
        normswap.load(saved, mynorms.net, rules=normswap.DEFAULT_RULES)


def test_a_recorded_rule_that_went_away(mynorms: ModuleType, tmp_path: Path) -> None:
    rules = (mynorms.EXACT, *normswap.DEFAULT_RULES)
    saved = normswap.save(normswap.convert(mynorms.net(), X, rules=rules), tmp_path / "saved")
    exact = mynorms.EXACT
    del mynorms.EXACT
    with pytest.raises(LoadError, match=r"\(stream_norm: 1\): the rule mynorms:EXACT: mynorms has no EXACT"):
        normswap.load(saved, mynorms.net, trust_packages=["mynorms"])
    with pytest.raises(
        LoadError, match=r"\(stream_norm: 1\), and to import 'mynorms:EXACT' is to run code of its choice\nhint: --trust-package"
    ):
        normswap.load(saved, mynorms.net)
    assert normswap.load(saved, mynorms.net, rules=(exact, *normswap.DEFAULT_RULES)) is not None


def test_a_recipe_from_before_there_were_rules(mynorms: ModuleType, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    saved = normswap.save(normswap.convert(model, X), tmp_path / "saved")
    recipe = json.loads((saved / "recipe.json").read_text())
    assert recipe.pop("rules") == []
    (saved / "recipe.json").write_text(json.dumps(recipe))
    loaded = normswap.load(saved, lambda: model)
    assert isinstance(loaded[1], BatchlessNorm)  # type: ignore[index]


def test_a_recipe_with_a_broken_rule(mynorms: ModuleType, tmp_path: Path) -> None:
    saved = normswap.save(normswap.convert(mynorms.net(), X), tmp_path / "saved")
    recipe = json.loads((saved / "recipe.json").read_text())
    for rules in ([{}], "x", [3]):
        (saved / "recipe.json").write_text(json.dumps({**recipe, "rules": rules}))
        with pytest.raises(LoadError, match="is not a recipe that normswap wrote"):
            normswap.load(saved, mynorms.net)


def test_a_pickled_model_needs_no_rule(mynorms: ModuleType, tmp_path: Path) -> None:
    torch.save(mynorms.net(), tmp_path / "net.pt")
    arguments = ["--input", "2x3x9x8", "--rule", "mynorms:EXACT", "--no-onnx", "-o", tmp_path / "out"]
    refused = run("convert", tmp_path / "net.pt", *arguments)
    assert refused.exit_code == 1  # importing the rule's module is no leave for a pickle to use it
    result = run("convert", tmp_path / "net.pt", *arguments, "--trust-package", "mynorms")
    assert result.exit_code == 0, result.stderr
    del mynorms.EXACT
    loaded = normswap.load(tmp_path / "out", trust_packages=["mynorms"])
    assert isinstance(loaded, nn.Module)
    assert normswap.verify(mynorms.net(), loaded, X)
    assert loaded[1].own_rule == ("stream_norm", "mynorms:EXACT")  # type: ignore[index]


def test_spec_of_names_what_can_be_imported(mynorms: ModuleType) -> None:
    assert spec_of(mynorms.EXACT) == "mynorms:EXACT"
    assert spec_of(named("mynorms:EXACT")) == "mynorms:EXACT"
    assert spec_of(dataclasses.replace(mynorms.EXACT)) is None
    assert spec_of(dataclasses.replace(mynorms.EXACT, spec="elsewhere:RULE")) == "elsewhere:RULE"


# -- what a rule of one's own is held to ----------------------------------------------------------------------------------------


class Mine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _rule(**fields: Any) -> normswap.Rule:
    functions = {
        "recognises": lambda site: isinstance(site.module, Mine),
        "check": lambda site: None,
        "build": lambda site, std: normswap.batchless_from_statistics(
            site.module, torch.zeros(3), torch.ones(3), eps=0.0, weight=torch.full((3,), 2.0), std=std
        ),
    }
    return normswap.Rule("mine", **{**functions, **fields})


def _mine() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), Mine()).eval()


def test_the_contract_kept() -> None:
    model = _mine()
    called: list[str] = []
    model[1].register_forward_hook(lambda *_: called.append("hook"))  # type: ignore[index]
    conversion = normswap.convert(model, X, rules=[_rule()])
    assert kinds(conversion.plan) == {"1": "mine"}
    assert not any(module.training for module in conversion.model.modules())
    called.clear()
    conversion.model(X)
    assert called == ["hook"]


def test_a_layer_with_hooks_of_its_own_keeps_them() -> None:
    called: list[str] = []

    def build(site: normswap.Site, std: str) -> nn.Module:
        layer = BatchlessNorm(3)
        layer.weight.data.fill_(2)  # type: ignore[union-attr]
        layer.register_forward_hook(lambda *_: called.append("own"))
        return layer

    converted = normswap.convert(_mine(), X, rules=[_rule(build=build)]).model
    assert not converted[1].training  # type: ignore[index]
    called.clear()
    converted(X)
    assert called == ["own"]


def test_a_bare_layer_gets_hooks_and_flag_too() -> None:
    def build(site: normswap.Site, std: str) -> nn.Module:
        layer = BatchlessNorm(3)
        layer.weight.data.fill_(2)  # type: ignore[union-attr]
        return layer

    model = _mine()
    called: list[str] = []
    model[1].register_forward_hook(lambda *_: called.append("hook"))  # type: ignore[index]
    converted = normswap.convert(model, X, rules=[_rule(build=build)]).model
    assert not converted[1].training  # type: ignore[index]
    called.clear()
    converted(X)
    assert called == ["hook"]


def _fail(site: normswap.Site, *more: Any) -> Any:
    raise AttributeError("no gain")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"recognises": _fail},
            r"^the rule 'mine' raised AttributeError in `recognises` of a Sequential: no gain\nhint: a rule is called for every",
        ),
        ({"check": _fail}, r"^the rule 'mine' raised AttributeError in `check` of '1': no gain"),
        ({"build": _fail}, r"^the rule 'mine' raised AttributeError in `build` of '1': no gain"),
        ({"check": lambda site: True}, r"^the rule 'mine' returned True from `check` of '1'; expected None, or why the layer stays"),
        ({"check": lambda site: ""}, r"^the rule 'mine' returned '' from `check`"),
        (
            {"build": lambda site, std: nn.Identity()},
            r"^the rule 'mine' returned Identity\(\) from `build` of '1'; expected a BatchlessNorm",
        ),
        ({"build": lambda site, std: None}, r"^the rule 'mine' returned None from `build`"),
        ({"inexact": lambda site: None}, r"^the rule 'mine' returned None from `inexact` of '1'; expected why the swap is not exact"),
        ({"build": None}, r"^1: the rule 'mine' agreed to a swap but has no build function"),
    ],
)
def test_the_contract_broken(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(NormswapError, match=message):
        normswap.convert(_mine(), X, rules=(_rule(**fields), *normswap.DEFAULT_RULES))


def test_a_rule_that_breaks_its_promise_is_found_out() -> None:
    def build(site: normswap.Site, std: str) -> nn.Module:
        return normswap.batchless_from_statistics(
            site.module, torch.zeros(3), torch.ones(3), eps=1e-3, weight=torch.full((3,), 2.0), std=std
        )  # type: ignore[arg-type]

    with pytest.raises(normswap.ParityError, match="first at 1: error"):
        normswap.convert(_mine(), X, rules=[_rule(build=build)])


def test_rules_are_rules() -> None:
    with pytest.raises(UsageError, match=r"rules holds <class .*Mine'>; expected a normswap.Rule"):
        normswap.plan(_mine(), X, rules=[Mine])  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(5,), (1, 5, 1, 1)])
@pytest.mark.parametrize("trainable", [True, False])
def test_from_statistics(shape: tuple[int, ...], trainable: bool) -> None:
    mean, variance = torch.randn(shape), torch.rand(shape) + 0.5
    weight = nn.Parameter(torch.randn(shape), requires_grad=trainable)
    layer = normswap.batchless_from_statistics(nn.Identity().eval(), mean, variance, eps=0.1, weight=weight, std="inv", channel_axis=-1)
    x = torch.randn(2, 3, 5)
    expected = weight.reshape(-1) * (x - mean.reshape(-1)) / (variance.reshape(-1) + 0.1).sqrt()
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert layer.bias is not None
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        "mean": trainable,
        "inv_std": trainable,
        "weight": trainable,
        "bias": False,
    }
    assert not layer.training


def test_from_statistics_without_weight() -> None:
    layer = normswap.batchless_from_statistics(nn.Identity(), torch.zeros(4), torch.ones(4), eps=0.0, std="log")
    assert layer.weight is None
    assert layer.mean.requires_grad
