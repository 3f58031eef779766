"""`normswap heal`: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim  # noqa: F401
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import normswap
from normswap.cli.app import app
from normswap.cli.data import stream_of
from normswap.cli.options import Running
from normswap.errors import UsageError
from normswap.healing import run

FACTORY = """
import torch
from torch import nn
from fixtures.nets import randomise


def net():
    torch.manual_seed(0)
    layers = (nn.Linear(6, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3))
    return randomise(nn.Sequential(*layers), 1).eval()


def exact():
    return randomise(nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24)), 1).eval()


def batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(120):
        yield torch.randn(32, 6, generator=generator)


def none():
    return []


def one():
    return torch.zeros(400, 6)


def fails():
    yield from list(batches())[:9]
    raise OSError("the share is gone")


def nans():
    return [torch.full((32, 6), torch.nan)] * 9


number = 5


def score(model):
    return 0.25
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "healed_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def _heal(*options: str, source: str = "healed_nets:net", data: tuple[str, ...] = ("--data", "healed_nets:batches")) -> Result:
    return CliRunner().invoke(app, ["heal", source, *data, "--no-onnx", "-o", "out", *options])


def test_it_writes_the_healed_model_and_says_what_it_took() -> None:
    result = _heal("--tokens", "6400", "--lr", "1e-3", "--metric", "healed_nets:score", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    healing = report["healing"]
    assert healing["after"] < 0.95 * healing["before"]
    assert healing["metric"] == {"original": 0.25, "before": 0.25, "after": 0.25}
    assert (healing["curve"][0]["loss"], healing["curve"][-1]["tokens"], healing["diverged"]) == ("nan", 6400, False)
    assert report["parities"]["drift"]["passed"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["model.safetensors", "recipe.json", "report.html", "report.json"]
    assert not Path("out.healing").exists()
    model = normswap.load("out", trust=True)
    assert isinstance(model, nn.Module)
    worst = report["parities"]["drift"]["max_rel"]
    plain = normswap.convert(_net(), calibration=_batches(), approximate=True)
    assert plain.drift is not None
    assert worst < plain.drift.max_rel


def _net() -> nn.Module:
    import healed_nets  # type: ignore[import-not-found]

    return healed_nets.net()  # type: ignore[no-any-return]


def _batches() -> list[torch.Tensor]:
    import healed_nets

    return list(healed_nets.batches())


def test_in_words() -> None:
    result = _heal("--tokens", "640", "--lr", "1e-3")
    assert result.exit_code == 0, result.output
    assert "healed: distance " in result.stdout
    assert " in 20 steps, 640 tokens or samples, 0.0 minutes" in result.stdout
    assert "written to out" in result.stdout


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"input": x}, lambda x: [(part,) for part in x.split(32)]], ids=["tensor", "dict", "list"]
)
def test_a_file_with_all_samples_is_the_same_as_one_with_batches(wrap: Any) -> None:
    samples = torch.cat(_batches()[:11])[:340]  # the last batch has 20
    torch.save(wrap(samples), "samples.pt")
    result = _heal("--tokens", "640", "--lr", "1e-3", "--json", data=("--data", "samples.pt"))
    assert result.exit_code == 0, result.output
    healing = json.loads(result.stdout)["healing"]
    assert (healing["curve"][-1]["tokens"], healing["epochs"]) == (668, 3)  # 340 - 128 held out: 6 x 32 + 20 in an epoch


def test_keep_keeps_the_norms_that_cost_most() -> None:
    ranked = normswap.sensitivity(_net(), _batches()[:8]).layers
    result = _heal("--tokens", "320", "--keep", "1", "--json")
    plan = json.loads(result.stdout)["plan"]
    assert [skip["name"] for skip in plan["skips"]] == [ranked[-1].name]
    assert [swap["name"] for swap in plan["swaps"]] == [ranked[0].name]


def test_a_run_that_diverges_ends_in_3_with_the_best_state_written() -> None:
    result = _heal("--tokens", "3200", "--lr", "1e4")
    assert result.exit_code == 3
    assert "error: healing diverged: the distance to the original rose 4 times" in result.stderr
    assert "hint: a smaller learning rate: --lr" in result.stderr
    report = json.loads(Path("out/report.json").read_text())
    assert report["healing"]["diverged"]
    assert report["healing"]["after"] == report["healing"]["before"]
    assert Path("out/model.safetensors").exists()


def test_an_interrupted_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(_heal("--tokens", "1280", "--json").stdout)["healing"]["curve"]
    show = run._Healing._show

    def interrupted(self: Any) -> None:
        show(self)
        if self.state.step == 23:
            raise KeyboardInterrupt

    monkeypatch.setattr(run._Healing, "_show", interrupted)
    result = CliRunner().invoke(
        app, ["heal", "healed_nets:net", "--data", "healed_nets:batches", "--no-onnx", "-o", "other", "--tokens", "1280"]
    )
    assert result.exit_code == 130
    assert (Path("other.healing").exists(), Path("other").exists()) == (True, False)
    monkeypatch.setattr(run._Healing, "_show", show)
    monkeypatch.setattr(run._Healing, "_step", _counted(run._Healing._step, steps := []))
    again = _heal("--tokens", "1280", "-o", "other", "--json")
    curve = json.loads(again.stdout)["healing"]["curve"]
    assert [(p["step"], p["distance"]) for p in curve] == [(p["step"], p["distance"]) for p in whole]
    assert len(steps) == 40 - 22
    assert not Path("other.healing").exists()


def _counted(step: Any, steps: list[int]) -> Any:
    def counted(self: Any, group: Any) -> bool:
        steps.append(self.state.step)
        return bool(step(self, group))

    return counted


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"data": ()}, 2, "healing learns from data, and none were given"),
        ({"source": "healed_nets:exact"}, 2, "every swap is exact, so there is nothing to heal"),
        ({"source": "healed_nets:exact", "options": ("--exclude", "*")}, 2, "no norm is swapped, so there is nothing to heal"),
        ({"options": ("--keep", "-1")}, 2, "--keep is -1 and --length 128; expected 0 or more"),
        ({"options": ("--keep", "2")}, 2, "--keep is 2, and 2 norms would be swapped approximately, so none would be left to heal"),
        ({"options": ("--length", "0")}, 2, "--keep is 0 and --length 0; expected 0 or more, and 1 or more"),
        ({"data": ("--data", "healed_nets:none")}, 2, "the calibration data hold no batch"),
        (
            {"data": ("--data", "healed_nets:one")},
            2,
            "--data healed_nets:one: the factory returned a Tensor; expected an iterable of batches",
        ),
        ({"data": ("--data", "healed_nets:fails")}, 2, "--data healed_nets:fails: the factory raised OSError: the share is gone"),
        ({"data": ("--data", "healed_nets:number")}, 2, "--data healed_nets:number is an int; expected a function that returns batches"),
        ({"data": ("--data", "healed_nets.py")}, 2, "--data healed_nets.py is no .pt, .npz or .npy file"),
        ({"data": ("--data", "missing.txt")}, 2, "--data missing.txt is no file"),
        ({"options": ("--tokens", "0")}, 2, "the budget is None minutes and 0 tokens"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(options: dict[str, Any], code: int, message: str) -> None:
    given = options.pop("options", ())
    result = _heal(*given, **options)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not Path("out").exists()


def test_the_state_stays_until_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is interrupted while it is exported or saved is not healed again."""

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("normswap.cli.convert._save", lambda *args, **options: interrupted())
        assert _heal("--tokens", "640").exit_code == 130
    assert (Path("out.healing").exists(), Path("out").exists()) == (True, False)
    monkeypatch.setattr(run._Healing, "_step", _counted(run._Healing._step, steps := []))
    assert _heal("--tokens", "640").exit_code == 0
    assert steps == []
    assert (Path("out.healing").exists(), Path("out/recipe.json").exists()) == (False, True)


def test_a_conversion_that_cannot_be_judged_is_not_healed() -> None:
    result = _heal("--tokens", "640", data=("--data", "healed_nets:nans"))
    assert result.exit_code == 3, result.output
    assert "is not judged" in result.stderr


def test_text_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    Path("texts").mkdir()
    Path("texts/one.txt").write_text("some words\n\n" * 20)
    result = _heal(data=("--data", "texts"))
    assert result.exit_code == 2
    assert "is not a directory with a tokenizer" in result.stderr


def test_a_directory_of_images_is_prepared_as_the_model_says(tmp_path: Path) -> None:
    import timm
    from PIL import Image

    for number in range(12):
        Image.new("RGB", (50, 40), (number, 0, 255)).save(tmp_path / f"{number}.png")
    (tmp_path / "README.md").write_text("what these are\n\nand where they are from")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    stream = stream_of(str(tmp_path), model, "model.pt", Running(inputs=["1x3x32x32"]), None, 128)
    assert [tuple(batch.shape) for batch in stream.batches] == [(11, 3, 32, 32)]
    assert [tuple(batch.shape) for batch in stream.held_out or ()] == [(1, 3, 32, 32)]
    assert stream.note is not None
    assert stream.note.startswith("12 images, as timm prepares them: input_size (3, 32, 32), mean (0.5, 0.5, 0.5)")
    with pytest.raises(UsageError, match="how Sequential takes images is not known"):
        stream_of(str(tmp_path), nn.Sequential(), "model.pt", Running(), None, 128)
