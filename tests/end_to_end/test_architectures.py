"""Whole architectures, from plan to revert. fixtures/architectures.py says what each is for."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery import swapped
from torch import Tensor, nn

import normswap
from fixtures.architectures import ARCHITECTURES, DfpNet, architecture
from normswap import BatchlessNorm
from normswap.api.convert import inspect
from normswap.errors import SwapError

# name -> (back-end, one row for each norm in the order in which they run: name, kind, calls, aliases)
Row = tuple[str, str, int, tuple[str, ...]]


def rows(kind: str, *names: str, calls: int = 1) -> list[Row]:
    return [(name, kind, calls, ()) for name in names]


LEVELS = (*(f"layer{i}" for i in range(1, 8)), *(f"dlayer{i}" for i in range(7, 1, -1)))
TURB = ("layer2", "layer2b", "layer3", "layer4", "layer5", "dlayer6", "dlayer5", "dlayer4", "dlayer3", "dlayer2b", "dlayer2")
TOWER = ("stem.1", *(f"tower.{i}.bn{j}" for i in (0, 1) for j in (1, 2)), "policy.1", "value.1")
EXPECTED: dict[str, tuple[str, list[Row]]] = {
    "dfp_net": ("fx", rows("batch_norm", *(f"{level}.bn" for level in LEVELS))),
    "turb_net_g": ("fx", rows("batch_norm", *(f"{level}.bn" for level in TURB))),
    "alpha_zero": ("fx", rows("batch_norm", *TOWER)),
    "layer_norm_lstm": ("walk", rows("layer_norm", "cell.norm_input", "cell.norm_hidden", "cell.norm_cell", calls=7)),
    "gpt": ("walk", rows("flavour", "h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f")),
    "convnext": ("fx", [*rows("group_norm", "stem.1", "blocks.0.norm", "blocks.1.norm"), *rows("layer_norm", "norm")]),
    "vit": ("fx", rows("layer_norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)), "norm")),
    "two_places": ("fx", [("near.1", "batch_norm", 2, ("far.1",)), ("norm", "layer_norm", 2, ())]),
}
NAMES = [a.name for a in ARCHITECTURES]
EXACT = ["dfp_net", "turb_net_g", "alpha_zero", "two_places"]
APPROXIMATE = ["layer_norm_lstm", "gpt", "convnext", "vit", "two_places"]
BATCHES = 4


@functools.cache
def converted(name: str) -> Any:
    """Exactly where that is possible, approximately elsewhere. Not to be changed."""
    a = architecture(name)
    return normswap.convert(a.make(), a.inputs(), calibration=a.batches(BATCHES), approximate=name in APPROXIMATE)


def test_each_architecture_is_held_to_something() -> None:
    assert list(EXPECTED) == NAMES
    assert set(EXACT) | set(APPROXIMATE) == set(NAMES)
    assert len(EXPECTED["dfp_net"][1]) == 13


# -- the plan ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_has_every_norm(name: str) -> None:
    a = architecture(name)
    decided = normswap.plan(a.make(), a.inputs(), approximate=True)
    assert decided.skips == ()
    assert (decided.backend, [(s.name, s.kind, s.calls, s.aliases) for s in decided.swaps]) == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_approximate_stays_unless_asked_for(name: str) -> None:
    a = architecture(name)
    decided = normswap.plan(a.make(), a.inputs())
    assert {s.kind for s in decided.swaps} == ({"batch_norm"} if name in EXACT else set())
    assert len(decided.swaps) + len(decided.skips) == len(EXPECTED[name][1])
    for skip in decided.skips:
        assert skip.reason.endswith(
            "takes its statistics from each sample, so an exact swap does not exist; "
            "ask for an approximate one with approximate=True and calibration=... (--approximate, --data)"
        )


# -- the same function ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_batch_norms_are_exact_also_in_onnx(name: str, tmp_path: Path) -> None:
    a = architecture(name)
    x = a.inputs()
    conversion = normswap.convert(a.make(), x) if name in APPROXIMATE else converted(name)
    assert conversion.parity
    assert len(conversion.parity.sites) == len(conversion.plan.swaps)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in conversion.model.modules())
    wide = tuple(t.double() for t in x)
    in_float64 = swapped(a.make().double(), *wide)  # without the judge: this is another comparison than its own
    for reference, found in zip(outputs(a.make().double(), wide), outputs(in_float64, wide), strict=True):
        assert float((reference - found).abs().max()) <= 1e-12 * float(reference.abs().max())
    exported = normswap.export_onnx(conversion, x, tmp_path / "model.onnx")
    assert exported.parity


def outputs(model: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = model(*x)
    return found if isinstance(found, tuple) else (found,)


def test_a_hook_sees_the_skips_of_turb_net_g_overwritten_as_before() -> None:
    """The activation of the next block works on what the layer put out, whether that is a BatchNorm or its replacement."""
    a = architecture("turb_net_g")
    model: Any = a.make()
    kept: list[Tensor] = []
    model.layer2b.bn.register_forward_hook(lambda module, args, output: kept.append(output))
    candidate = normswap.convert(model, a.inputs()).model
    kept.clear()
    for net in (model, candidate):
        outputs(net, a.inputs())
    # LeakyReLU(0.2) of a normal variable: the negative side is five times as short as the positive one
    assert float(-kept[0].min()) < 0.5 * float(kept[0].max())
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_swaps_are_calibrated_and_measured(name: str) -> None:
    conversion = converted(name)
    approximate = [s.name for s in conversion.plan.swaps if s.preserves == "approximate"]
    assert conversion.parity  # of the exact swaps alone
    assert 0 < conversion.drift.max_rel < 1
    assert [fit.name for fit in conversion.fits] == approximate
    assert all(0 < fit.error < 0.5 for fit in conversion.fits)
    layers = dict(conversion.model.named_modules())
    assert all(isinstance(layers[s.name], BatchlessNorm) for s in conversion.plan.swaps)


def test_statistics_of_a_cell_are_of_all_its_steps() -> None:
    a = architecture("layer_norm_lstm")
    conversion = converted("layer_norm_lstm")
    samples, steps = a.shapes[0][:2]
    assert [fit.samples for fit in conversion.fits] == [BATCHES * samples * steps] * 3
    reference: Any = a.make()
    fed = [reference.cell.of_input(step) for (x,) in a.batches(BATCHES) for step in x.unbind(1)]
    torch.testing.assert_close(conversion.model.cell.norm_input.mean.detach(), torch.cat(fed).mean(0).detach(), rtol=1e-5, atol=1e-6)


# -- training ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_at_batch_1(name: str) -> None:
    model = copy.deepcopy(converted(name).model).train()
    x = tuple(t[:1] for t in architecture(name).inputs())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BatchlessNorm)}
    before = {n: m.weight.detach().clone() for n, m in layers.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = model(*x)
    loss = sum(((y - 1) ** 2).mean() for y in (found if isinstance(found, tuple) else (found,)))
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert [n for n, m in layers.items() if torch.equal(m.weight, before[n])] == []


def test_the_original_does_not_train_at_batch_1() -> None:
    a = architecture("dfp_net")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        a.make().train()(*(t[:1] for t in a.inputs()))


# -- back ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_revert_gives_the_original_back(name: str) -> None:
    a = architecture(name)
    model, x = a.make(), a.inputs()
    back = normswap.revert(swapped(model, *x))
    assert type(back) is type(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(back, x), outputs(model, x), strict=True))
    state, expected = back.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_revert_names_what_cannot_come_back(name: str) -> None:
    conversion = converted(name)
    approximate = [s.name for s in conversion.plan.swaps if s.preserves == "approximate"]
    with pytest.raises(SwapError, match=r"cannot be reverted: no source layer with statistics was recorded") as raised:
        normswap.revert(conversion.model)
    assert str(raised.value).startswith(", ".join(approximate))
    kept = [m for m in normswap.revert(conversion.model, skip=True).modules() if isinstance(m, BatchlessNorm)]
    assert len(kept) == len(approximate)


# -- warnings ------------------------------------------------------------------------------------------------------------------------------

LOOKED_AT = ("one_value_per_channel", "written_in_place", "called_repeatedly")
# name -> warning -> what it is about; everything that is not here is not warned of
WARNED: dict[str, dict[str, list[str]]] = {
    "dfp_net": {"one_value_per_channel": ["layer7.bn"], "written_in_place": [f"{level}.bn" for level in LEVELS]},
    "turb_net_g": {"written_in_place": [f"{level}.bn" for level in TURB[:5]]},
    "alpha_zero": {"written_in_place": ["stem.1", "tower.0.bn1", "tower.1.bn1"]},
    "layer_norm_lstm": {"called_repeatedly": ["cell.norm_input", "cell.norm_hidden", "cell.norm_cell"]},
    "two_places": {"called_repeatedly": ["near.1", "norm"]},
}


@pytest.mark.parametrize("name", NAMES)
def test_inspect_warns_of_the_traps_and_of_nothing_else(name: str) -> None:
    a = architecture(name)
    _, facts = inspect(a.make(), a.inputs())
    found = {code: [f.name for f in facts if code in {w.code for w in f.warnings}] for code in LOOKED_AT}
    assert {code: names for code, names in found.items() if names} == WARNED.get(name, {})


def test_inspect_says_who_overwrites_a_skip() -> None:
    a = architecture("turb_net_g")
    _, facts = inspect(a.make(), a.inputs())
    by_name = {f.name: f for f in facts}
    assert by_name["layer2.bn"].written_by == ("layer2b.activation",)
    assert by_name["layer5.bn"].written_by == ("layer6.activation",)
    assert by_name["dlayer3.bn"].written_by == ()  # its output is copied into a concatenation first


def test_the_bottleneck_is_one_value_only_for_the_size_it_was_built_for() -> None:
    _, facts = inspect(DfpNet(2).eval(), torch.randn(1, 3, 256, 256))
    assert not any(w.code == "one_value_per_channel" for f in facts for w in f.warnings)
