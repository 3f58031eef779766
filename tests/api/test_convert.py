"""What `convert` itself decides: when it raises, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim  # noqa: F401
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.errors import SwapError, UsageError
from normswap.parity.result import ParityError


class Chooses(nn.Module):
    """Returns the place of its largest feature: a choice that rounding decides among features that are all but equal."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(997, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y * 1e-9 + 1).argmax(1).to(y.dtype)


def test_float64_decides_where_rounding_makes_the_choice_of_the_original() -> None:
    model = randomise(Chooses(), 0).eval()
    parity = normswap.convert(model, torch.randn(5, 997)).parity
    assert parity
    assert parity.unjudged[0].startswith("output at the probe 'example': the original itself is ")
    assert parity.unjudged[0].endswith(" away from its float64 run there")


def test_what_cannot_be_judged_anywhere_is_said_to_be_that() -> None:
    """What the last digits of float64 decide."""

    class Chaotic(Chooses):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.norm(x) * 1e16)

    model = randomise(Chaotic(), 0).eval()
    with pytest.raises(ParityError) as error:
        normswap.convert(model, torch.randn(5, 997))
    assert "is not judged: output cannot be judged at any probe: " in str(error.value)
    assert "a choice that rounding decides: the original moves by" in str(error.value)
    assert "\nhint: give inputs like those that the model was trained on" in str(error.value)


def test_inputs_that_cannot_be_inferred_are_asked_for() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=r"^no example inputs that the model takes .*\nhint: give them: --input 1x3x224x224"):
        normswap.convert(TwoInputs())
    assert normswap.convert(TwoInputs(), (torch.randn(2, 3), torch.randn(2, 3))).parity


def test_an_unknown_form_of_std_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^std is 'ln'; expected one of 'log', 'abs', 'inv'$"):
        normswap.convert(nn.BatchNorm1d(3), torch.randn(2, 3), std="ln")


def test_a_model_without_norms_is_a_success() -> None:
    conversion = normswap.convert(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    assert conversion.parity
    assert not conversion.plan.swaps
    assert not conversion.plan.skips


# -- the meta device --------------------------------------------------------------------------------------------------------------------


def on_meta(name: str) -> nn.Module:
    import timm
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37, "vocab_size": 50}
    with torch.device("meta"):
        if name.startswith("timm:"):
            return timm.create_model(name[5:]).eval()  # type: ignore[no-any-return]
        if name == "bert":
            return BertModel(BertConfig(**small)).eval()
        norms = {"batch": nn.BatchNorm1d(5), "layer": nn.LayerNorm(5), "rms": nn.RMSNorm(5), "group": nn.GroupNorm(5, 5)}
        return nn.Sequential(nn.Linear(3, 5), norms[name]).eval()


@pytest.mark.parametrize(
    "name", ["batch", "layer", "rms", "group", "bert", "timm:test_convnext", "timm:test_efficientnet", "timm:test_vit"]
)
def test_a_model_on_the_meta_device(name: str) -> None:
    """Listed whole, each norm with the reason; and nothing is converted."""
    model = on_meta(name)
    for decided in (normswap.plan(model), normswap.plan(model, approximate=True), normswap.inspect(model)[0]):
        assert decided.swaps == ()
        assert decided.skips
        assert all("is on the meta device, so its " in s.reason and "load the weights first" in s.reason for s in decided.skips)
    x = torch.zeros(2, 3)
    for options in ({}, {"example_inputs": x}, {"calibration": [x], "approximate": True}):
        with pytest.raises(UsageError, match=r"is on the meta device, where tensors have a shape and no values") as error:
            normswap.convert(model, **options)  # type: ignore[arg-type]
        assert "load the weights first: model.to_empty(device='cpu'), then model.load_state_dict(...)" in str(error.value)


def test_a_layer_on_the_meta_device_says_nothing_of_its_kind() -> None:
    """What a rule finds out by running a layer holds for others like it, but not where it had no values."""
    import timm

    with torch.device("meta"):
        without_values = timm.layers.FrozenBatchNormAct2d(7, eps=1e-4)
    assert normswap.plan(without_values).swaps == ()
    assert len(normswap.plan(timm.layers.FrozenBatchNormAct2d(7, eps=1e-4)).swaps) == 1


@pytest.mark.parametrize("part", [0, 1, 3])
def test_a_part_on_the_meta_device(part: int) -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4)), 3).eval()
    assert len(normswap.convert(model, torch.randn(2, 3)).plan.swaps) == 2
    model[part].to("meta")
    assert len(normswap.plan(model).skips) == (part != 0)
    with pytest.raises(UsageError, match=rf"^{part}\.weight, one of \d such tensors of the model, is on the meta device"):
        normswap.convert(model, torch.randn(2, 3))


def test_what_is_on_the_meta_device_is_neither_saved_nor_reverted(tmp_path: Path) -> None:
    model = normswap.convert(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval(), torch.randn(4, 3)).model.to("meta")
    with pytest.raises(SwapError, match=r"^0\.weight is on the meta device: it has no values that could be saved"):
        normswap.save(model, tmp_path / "out")
    with pytest.raises(SwapError, match=r"^1 is on the meta device: it has no values to revert to"):
        normswap.revert(model)
    with pytest.raises(UsageError, match=r"is on the meta device, where tensors have a shape and no values"):
        normswap.couple(model, torch.randn(4, 3))


@pytest.mark.parametrize(
    ("data", "kind"), [(torch.randn(8, 6), "a Tensor"), ({"input": torch.randn(8, 6)}, "a dict"), ("texts", "a str"), (5, "an int")]
)
def test_one_batch_in_the_place_of_batches_is_said(data: Any, kind: str) -> None:
    """Its rows would be taken for batches."""
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).eval()
    for call in (
        lambda: normswap.convert(model, calibration=data, approximate=True),
        lambda: normswap.couple(batchless(), calibration=data),
    ):
        with pytest.raises(UsageError, match=f"the calibration data are {kind}; expected an iterable of batches"):
            call()


def batchless() -> nn.Module:
    return normswap.convert(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 6)).model


def test_what_a_model_counts_in_its_buffers_is_not_counted_by_calibration() -> None:
    class Counts(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(1).expand(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)  # type: ignore[no-any-return]

    data = [torch.randn(16, 6) for _ in range(3)]
    for options in ({"approximate": True}, {"reestimate": "exact"}):
        after = normswap.convert(Counts().eval(), calibration=data, **options).model
        assert after.calls == 0
