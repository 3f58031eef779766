"""Sensitivity: one layer at a time, the ranking, the set that stays inside a budget, and what is done and skipped."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import importlib
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap
from fixtures.nets import randomise
from normswap.api.neighbours import nearest
from normswap.api.sensitivity import By, Sensitivity, _globs, value
from normswap.cli.app import app
from normswap.detect.sites import Site
from normswap.errors import SwapError, UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.result import ParityError
from normswap.report.studies import convert_arguments, sensitivity_json, sensitivity_summary, sensitivity_table
from normswap.rules import DEFAULT_RULES
from normswap.swap import calibrate

MODULE = importlib.import_module("normswap.api.sensitivity")
APPROXIMATE = ("1", "7", "9")
RENAMED = dataclasses.replace(next(rule for rule in DEFAULT_RULES if rule.kind == "layer_norm" and rule.build), kind="renamed")


def conv_net() -> nn.Sequential:
    """GroupNorm before an activation that works in place, BatchNorm, InstanceNorm, LayerNorm over channels and space."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 7, 3),
            nn.BatchNorm2d(7),
            nn.ReLU(),
            nn.Conv2d(7, 6, 2),
            nn.InstanceNorm2d(6, affine=True, eps=1e-2),
            nn.Flatten(),
            nn.LayerNorm(6 * 3 * 4),
            nn.Linear(6 * 3 * 4, 5),
        )
    return cast(nn.Sequential, randomise(model, 0).eval())


def images(*sizes: int, seed: int = 0) -> list[Tensor]:
    x = torch.randn(sum(sizes), 3, 8, 9, generator=torch.Generator().manual_seed(seed))
    return list((x * torch.linspace(0.3, 3, len(x))[:, None, None, None]).split(list(sizes)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return BertModel(config).eval()  # type: ignore[no-any-return]


def sentences(*sizes: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for size in sizes:
        ids = torch.randint(1, 50, (size, 9), generator=generator)
        mask = (torch.arange(9) < torch.randint(4, 10, (size, 1), generator=generator)).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def outputs_of(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """Each output over all batches, what is padding left out."""
    with torch.no_grad():
        if isinstance(batches[0], Tensor):
            return [torch.cat([model(b) for b in batches]).double()]
        found = [model(**b) for b in batches]
        hidden = torch.cat([f.last_hidden_state[b["attention_mask"].bool()] for f, b in zip(found, batches, strict=True)])
        return [hidden.double(), torch.cat([f.pooler_output for f in found]).double()]


def distance(original: nn.Module, swapped: nn.Module, batches: Sequence[Any]) -> tuple[float, float]:
    """(relative l2, max error over max value) of the worst output, by the formula and by nothing of normswap."""
    pairs = list(zip(outputs_of(original, batches), outputs_of(swapped, batches), strict=True))
    return max(((z - y).norm() / y.norm()).item() for y, z in pairs), max(((z - y).abs().max() / y.abs().max()).item() for y, z in pairs)


def few_sentences() -> list[dict[str, Tensor]]:
    return sentences(10, 7)


CASES: list[Any] = [
    pytest.param(conv_net, lambda: images(20, 13), id="conv net"),
    pytest.param(bert, few_sentences, id="bert"),
]
Make = Callable[[], nn.Module]
Data = Callable[[], list[Any]]


# -- ranking -----------------------------------------------------------------------------------------------------------------


@functools.cache
def alone(make: Make, data: Data) -> dict[str, tuple[float, float, float]]:
    """For each approximate layer, converted one at a time: the two distances, and the error of its fit."""
    model, batches = make(), data()
    found = {}
    for name in (s.name for s in normswap.plan(model, batches[0], approximate=True).swaps if s.preserves == "approximate"):
        one = normswap.convert(model, calibration=batches, approximate=True, repair="none", include=[name])
        assert [s.name for s in one.plan.swaps] == [name]
        found[name] = (*distance(model, one.model, batches), one.fits[0].error)
    return found


@functools.cache
def together(make: Make, data: Data) -> float:
    """The relative l2 distance of the model with every layer swapped."""
    return distance(make(), normswap.convert(make(), calibration=data(), approximate=True, repair="none").model, data())[0]


@pytest.mark.parametrize(("make", "data"), CASES)
@pytest.mark.parametrize("by", ["rel_l2", "max_rel"])
def test_the_ranking_is_that_of_converting_one_layer_at_a_time(make: Make, data: Data, by: By) -> None:
    model, brute = make(), alone(make, data)
    before = copy.deepcopy(model.state_dict())
    layers = [layer for layer in normswap.sensitivity(model, data(), by=by).layers if layer.preserves == "approximate"]
    assert len(layers) == len(brute) == (3 if make is conv_net else 5)
    for layer in layers:
        assert (layer.measured.rel_l2, layer.measured.max_rel, layer.calibration_error) == pytest.approx(brute[layer.name], rel=1e-3)
    which = ("rel_l2", "max_rel").index(by)
    assert [layer.name for layer in layers] == sorted(brute, key=lambda name: brute[name][which])
    assert len({round(value(layer.measured, by), 6) for layer in layers}) == len(layers), "a ranking of equals tells nothing"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_exact_swaps_come_first_and_cost_nothing() -> None:
    found = normswap.sensitivity(conv_net(), images(20, 13))
    assert [(layer.name, layer.kind) for layer in found.layers if layer.preserves == "exact"] == [("4", "batch_norm")]
    assert found.layers[0].name == "4"
    assert found.layers[0].measured.rel_l2 < 1e-5
    assert found.layers[0].calibration_error is None
    assert {layer.name for layer in found.layers[1:]} == set(APPROXIMATE)
    assert all(layer.measured.rel_l2 > 1e-3 for layer in found.layers[1:])
    assert found.chosen is None


def test_all_layers_are_calibrated_in_one_pass() -> None:
    """One pass of the original, one through both models that calibrates, one for each layer."""
    model, batches = bert(), sentences(4, 3)
    forwards = []
    model.register_forward_pre_hook(lambda module, args: forwards.append(type(module).__name__))
    normswap.sensitivity(model, batches, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    planning = len(forwards)
    forwards.clear()
    normswap.plan(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, approximate=True)
    # + 1: the forward of the first batch that finds which layer is called how often
    assert planning - len(forwards) == len(batches) * (1 + 2 + 5) + 1


def test_a_layer_that_runs_twice_in_one_forward() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.after = nn.Linear(6, 7), nn.LayerNorm(7), nn.LayerNorm(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.norm(self.norm(self.a(x)) * 2 + 1))  # type: ignore[no-any-return]

    model, batches = randomise(Twice(), 0).eval(), [torch.randn(9, 6), torch.randn(4, 6)]
    for layer in normswap.sensitivity(model, batches).layers:
        one = normswap.convert(model, calibration=batches, approximate=True, repair="none", include=[layer.name])
        assert (layer.measured.rel_l2, layer.measured.max_rel) == pytest.approx(distance(model, one.model, batches), rel=1e-3)


def test_padding_does_not_count() -> None:
    model, batches = bert(), sentences(10, 7)
    noisy = [dict(b) for b in batches]
    for b in noisy:  # other tokens where nothing counts
        b["input_ids"] = torch.where(b["attention_mask"].bool(), b["input_ids"], 33)
    a, b = (normswap.sensitivity(model, data) for data in (batches, noisy))
    for layer, other in zip(a.layers, b.layers, strict=True):
        assert layer.name == other.name
        assert layer.measured.rel_l2 == pytest.approx(other.measured.rel_l2, rel=1e-3)


def test_batches_of_any_size_give_the_same_ranking() -> None:
    whole, parts = (normswap.sensitivity(conv_net(), images(*sizes)) for sizes in ((33,), (1, 20, 12)))
    for layer, other in zip(whole.layers[1:], parts.layers[1:], strict=True):
        assert layer.name == other.name
        assert (layer.measured.rel_l2, layer.measured.max_rel) == pytest.approx((other.measured.rel_l2, other.measured.max_rel), rel=1e-3)


def test_outputs_that_do_not_fit_into_the_cache_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwards = conv_net(), list[int]()
    model.register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])))
    kept = normswap.sensitivity(model, images(20, 13))
    before = len(forwards)
    monkeypatch.setattr(MODULE, "CACHE", 20 * 5 * 4 - 1)  # the first batch does not fit, the second does
    assert normswap.sensitivity(model, images(20, 13)).layers == kept.layers
    assert len(forwards) - before == before + 4  # the first batch again, for the exact swap and three layers


class Masked(nn.Module):
    """Puts out -inf by design, as a mask of logits does."""

    def __init__(self, also: bool) -> None:
        super().__init__()
        self.norm, self.also = nn.LayerNorm(6), also

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = torch.where(torch.arange(6) == 2, -math.inf, y)
        # only where the values are those of a LayerNorm, whose square sum has a bound, is this finite
        return torch.where(y.abs() > 2.5, math.nan, y) if self.also else y


def test_infinities_of_the_original_are_no_error_and_new_ones_are() -> None:
    x = [torch.randn(40, 6) * torch.linspace(0.1, 9, 40)[:, None]]
    (fine,) = normswap.sensitivity(Masked(False).eval(), x).layers
    assert 0 < fine.measured.rel_l2 < 2
    (bad,) = normswap.sensitivity(Masked(True).eval(), x).layers
    assert (bad.measured.rel_l2, bad.measured.max_rel) == (math.inf, math.inf)
    assert normswap.sensitivity(Masked(True).eval(), x, budget=1e9).chosen.names == ()  # type: ignore[union-attr]


# -- a metric ----------------------------------------------------------------------------------------------------------------

X = torch.cat(images(20, 13))


def second_output(model: nn.Module) -> Tensor:
    assert not model.training
    assert not torch.is_grad_enabled()
    return model(X)[:, 1].mean()  # type: ignore[no-any-return]


def test_a_metric_ranks_by_how_far_it_moves() -> None:
    model = conv_net()
    found = normswap.sensitivity(model, images(20, 13), metric=second_output, by="change")
    with torch.no_grad():
        original = model(X)[:, 1].mean().item()
        assert found.metric == pytest.approx(original)
        for layer in found.layers[1:]:
            one = normswap.convert(model, calibration=images(20, 13), approximate=True, repair="none", include=[layer.name]).model
            assert layer.measured.metric == pytest.approx(one(X)[:, 1].mean().item(), rel=1e-3, abs=1e-5)
            assert layer.measured.metric is not None
            assert layer.measured.change == pytest.approx(abs(layer.measured.metric - original))
    changes = [value(layer.measured, "change") for layer in found.layers[1:]]
    assert changes == sorted(changes)
    by_l2 = normswap.sensitivity(model, images(20, 13), metric=second_output)
    assert [layer.name for layer in by_l2.layers] != [layer.name for layer in found.layers], "else `by` is not told apart"


def neighbours_of(embedding: Tensor) -> list[int]:
    """By the formula, one pair after the other."""
    each = [(float("-inf"), 0)] * len(embedding)
    for i, a in enumerate(embedding.double()):
        for j, b in enumerate(embedding.double()):
            if i != j:
                each[i] = max(each[i], ((a @ b / (a.norm() * b.norm())).item(), -j))
    return [-j for _, j in each]


def pooled(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """The embeddings of conv net and BERT: the outputs, or the mean of the hidden states that are no padding."""
    with torch.no_grad():
        if isinstance(batches[0], Tensor):
            return torch.cat([model(b) for b in batches])
        return torch.stack(
            [hidden[mask.bool()].mean(0) for b in batches for hidden, mask in zip(model(**b)[0], b["attention_mask"], strict=True)]
        )


@pytest.mark.parametrize(("make", "data"), CASES)
def test_the_share_of_samples_that_keep_their_neighbour(make: Make, data: Data) -> None:
    model, batches = make(), data()
    expected = neighbours_of(pooled(model, batches))
    found = normswap.sensitivity(model, batches, metric="neighbours", by="change", budget=0.2)
    assert found.metric == 1
    shares = set()
    for layer in found.layers:
        if layer.preserves == "exact":
            assert layer.measured.metric == 1
            continue
        one = normswap.convert(model, calibration=batches, approximate=True, repair="none", include=[layer.name]).model
        same = [a == b for a, b in zip(neighbours_of(pooled(one, batches)), expected, strict=True)]
        assert layer.measured.metric == pytest.approx(sum(same) / len(same))
        assert layer.measured.change == pytest.approx(1 - sum(same) / len(same))
        shares.add(layer.measured.metric)
    assert len(shares) > 1
    assert found.chosen is not None
    assert found.chosen.measured.change is not None
    assert found.chosen.measured.change <= 0.2


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (conv_net, lambda: images(2), "the metric neighbours compares samples, and the data hold 2"),
        (
            lambda: nn.Sequential(conv_net(), Summed()),
            lambda: images(9),
            "needs an output with one row for each sample, and the model has none",
        ),
    ],
)
def test_neighbours_of_nothing(model: Make, data: Data, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.sensitivity(model().eval(), data(), metric="neighbours")


class Summed(nn.Module):
    """One number for a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def test_a_metric_that_is_not_built_in() -> None:
    with pytest.raises(UsageError, match=r"^metric is 'neighbors'; expected one of 'neighbours'"):
        normswap.sensitivity(conv_net(), images(9), metric="neighbors")  # type: ignore[arg-type]


def test_neighbours_are_taken_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(23, 5, generator=torch.Generator().manual_seed(4))
    for block in (1, 7, 23, 1024):
        monkeypatch.setattr("normswap.api.neighbours.ROWS", block)
        assert nearest(rows).tolist() == neighbours_of(rows)


def test_without_a_metric_there_is_none() -> None:
    assert all(layer.measured.metric is layer.measured.change is None for layer in normswap.sensitivity(conv_net(), images(9)).layers)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda model: "good", "returned a str; expected a number"),
        (lambda model: model(X), "returned a Tensor; expected a number"),
        (lambda model: math.nan, "returned nan; expected a finite number"),
        (lambda model: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_metric_that_is_none(metric: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"the metric .*<lambda> {re.escape(message)}"):
        normswap.sensitivity(conv_net(), images(9), metric=metric)


# -- a budget ----------------------------------------------------------------------------------------------------------------


def globs_name(found: Sensitivity) -> None:
    """The globs of the choice name each chosen layer, and no other: by fnmatch, and by nothing of normswap."""
    assert found.chosen is not None
    assert found.chosen.include is not None
    assert found.chosen.exclude is not None
    for layer in found.layers:
        included = not found.chosen.include or any(fnmatch.fnmatchcase(layer.name, g) for g in found.chosen.include)
        excluded = any(fnmatch.fnmatchcase(layer.name, g) for g in found.chosen.exclude)
        swapped = included and not excluded and (layer.preserves == "exact" or bool(found.chosen.approximate))
        assert swapped == (layer.name in found.chosen.names)


@pytest.mark.parametrize(("make", "data"), CASES)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.3])
def test_the_chosen_set_was_measured_inside_the_budget(make: Make, data: Data, share: float) -> None:
    model, batches = make(), data()
    budget = share * together(make, data)
    found = normswap.sensitivity(model, batches, budget=budget)
    chosen = found.chosen
    assert chosen is not None
    globs_name(found)
    assert chosen.include is not None
    assert chosen.exclude is not None
    # an independent measurement of what `convert` makes of the globs
    some = normswap.convert(
        model, calibration=batches, approximate=bool(chosen.approximate), repair="none", include=chosen.include, exclude=chosen.exclude
    )
    assert tuple(s.name for s in some.plan.swaps) == chosen.names
    l2, largest = distance(model, some.model, batches)
    assert l2 <= budget * (1 + 1e-4)
    assert (chosen.measured.rel_l2, chosen.measured.max_rel) == pytest.approx((l2, largest), rel=1e-3, abs=1e-6)
    # the head of the ranking, and no longer one was possible
    ranked = [layer.name for layer in found.layers if layer.preserves == "approximate"]
    count = len(chosen.approximate)
    assert set(chosen.approximate) == set(ranked[:count])
    if count < len(ranked):
        exact = [layer.name for layer in found.layers if layer.preserves == "exact"]
        more = normswap.convert(model, calibration=batches, approximate=True, repair="none", include=[*exact, *ranked[: count + 1]])
        assert distance(model, more.model, batches)[0] > budget
    else:
        assert share > 1


def test_single_errors_are_not_summed() -> None:
    """Layers that stay inside the budget one at a time do not together: the sum, or the worst, of them says something else."""
    single = [distances[0] for distances in alone(bert, few_sentences).values()]
    measured = together(bert, few_sentences)
    assert max(single) < measured < sum(single)
    for budget in (max(single), measured, sum(single)):
        chosen = normswap.sensitivity(bert(), few_sentences(), budget=budget * (1 + 1e-4)).chosen
        assert chosen is not None
        assert (len(chosen.names) == 5) == (budget >= measured)
        assert chosen.measured.rel_l2 <= budget * (1 + 1e-4)


@pytest.mark.parametrize("budget", [0, 0.0])
def test_a_budget_of_nothing_leaves_the_exact_swaps(budget: float) -> None:
    found = normswap.sensitivity(conv_net(), images(20, 13), budget=budget)
    assert found.chosen is not None
    assert (found.chosen.names, found.chosen.approximate, found.chosen.tried) == (("4",), (), 0)
    assert convert_arguments(found.chosen) == []
    assert found.chosen.measured == found.layers[0].measured


def test_a_budget_of_nothing_and_no_exact_swap() -> None:
    found = normswap.sensitivity(bert(), sentences(4), budget=0)
    assert found.chosen is not None
    assert (found.chosen.names, found.chosen.measured.rel_l2) == ((), 0)
    assert "for normswap convert" not in sensitivity_summary(found)


def test_a_model_without_approximate_layers_needs_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "calibrate", None)
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)), 0).eval()
    found = normswap.sensitivity(model, images(4), budget=0)
    assert [(layer.name, layer.preserves) for layer in found.layers] == [("1", "exact"), ("4", "exact")]
    assert found.chosen is not None
    assert found.chosen.names == ("1", "4")


def test_a_model_without_norms() -> None:
    found = normswap.sensitivity(nn.Sequential(nn.Conv2d(3, 5, 3)).eval(), images(4), budget=0.5)
    assert found.layers == ()
    assert found.chosen is not None
    assert found.chosen.names == ()
    assert sensitivity_summary(found).startswith("0 layers measured on 1 batch, ranked by rel_l2")


def test_only_what_is_included_is_measured() -> None:
    found = normswap.sensitivity(conv_net(), images(20, 13), budget=10, include=["1", "batch_norm"], exclude=["9"])
    assert [layer.name for layer in found.layers] == ["4", "1"]
    assert found.chosen is not None
    assert found.chosen.names == ("1", "4")
    assert (found.chosen.include, found.chosen.exclude) == ((), ("7", "9"))
    globs_name(found)


class Hostile(nn.Module):
    """Layers called as a kind is, and nearly as another is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        self.blocks = nn.ModuleDict({"a-0": nn.LayerNorm(6), "a0": nn.LayerNorm(6), "-": nn.LayerNorm(6)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layer_norm, self.other, *self.blocks.values()):
            x = x + layer(x) * torch.linspace(0.1, 2, 6)
        return x


@pytest.mark.parametrize(
    ("names", "globs"),
    [
        (["layer_norm", "other", "blocks.a-0", "blocks.a0", "blocks.-"], 0),
        (["layer_norm", "other", "blocks.a-0", "blocks.a0"], 1),
        (["other", "blocks.a0"], 2),
        (["layer_norm"], 4),  # --include layer_norm would take the whole kind
        (["blocks.-"], 1),
    ],
)
def test_globs_name_the_layers_and_no_others(names: list[str], globs: int) -> None:
    model = randomise(Hostile(), 0).eval()

    def plan(include: Sequence[str], exclude: Sequence[str], approximate: bool) -> normswap.Plan:
        return normswap.plan(model, torch.randn(2, 6), include=include, exclude=exclude, approximate=approximate)

    include, exclude = _globs(plan, names, True)
    assert include is not None
    assert exclude is not None
    assert [s.name for s in plan(include, exclude, True).swaps] == names
    assert len(include) + len(exclude) == globs


def test_a_set_that_no_globs_tell_is_said_to_be_such() -> None:
    model = nn.Sequential()
    model.add_module("layer_norm", nn.LayerNorm(6))
    model.add_module("group_norm", nn.LayerNorm(6))
    model.add_module("x", nn.GroupNorm(2, 6))
    model.eval()

    def plan(include: Sequence[str], exclude: Sequence[str], approximate: bool) -> normswap.Plan:
        return normswap.plan(model, torch.randn(2, 6), include=include, exclude=exclude, approximate=approximate)

    assert _globs(plan, ["layer_norm", "x"], True) == (None, None)


# -- what cannot be measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (None, {}, "sensitivity is measured on data, and none were given"),
        ([], {}, "the data hold no batch"),
        (iter(()), {}, "the data hold no batch"),
        (X, {}, "the data are a Tensor; expected an iterable of batches"),
        ({"x": X}, {}, "the data are a dict; expected an iterable of batches"),
        ([X], {"by": "l2"}, "by is 'l2'; expected one of 'rel_l2', 'max_rel', 'change'"),
        ([X], {"by": "change"}, "ranked by the change of a metric, and none was given"),
        ([X], {"budget": -0.1}, "the budget is -0.1; expected a number that is 0 or more"),
        ([X], {"budget": math.nan}, "the budget is nan"),
        ([X], {"include": ["stem.*"]}, r"no normalization of the model is called 'stem\.\*'"),
        ([X, X[:, :2]], {}, "the model does not take the data: batch 2: RuntimeError"),
    ],
)
def test_usage_errors(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.sensitivity(conv_net(), data, **options)


def test_a_model_without_floating_outputs() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).argmax(1)  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match="puts out no floating tensor"):
        normswap.sensitivity(Decides().eval(), [torch.randn(4, 6)])


def test_a_swapped_model_that_cannot_run_names_the_layer() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x)
            if not torch.jit.is_tracing() and isinstance(self.norm, BatchlessNorm) and y.std(1).max() > 1.5:
                raise ValueError("not normalized")
            return y

    with pytest.raises(SwapError, match=r"with norm swapped the model cannot run on batch 1: ValueError: not normalized"):
        normswap.sensitivity(Picky().eval(), [torch.randn(40, 6) * torch.linspace(0.1, 9, 40)[:, None]])


def test_exact_swaps_that_are_not_exact_are_a_parity_error() -> None:
    class Wrong(nn.BatchNorm2d):
        pass

    def build(site: Site, std: str) -> nn.Module:
        return normswap.BatchlessNorm(5)

    rule = normswap.Rule("wrong", lambda site: isinstance(site.module, Wrong), lambda site: None, build)
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), Wrong(5)), 0).eval()
    with pytest.raises(ParityError, match="is not the same function"):
        normswap.sensitivity(model, images(4), rules=(rule, *DEFAULT_RULES))


# -- what is done is skipped -------------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "done.jsonl"
    first = normswap.sensitivity(conv_net(), images(20, 13), metric=second_output, budget=0.5, skip_done=file)
    assert first.layers == normswap.sensitivity(conv_net(), images(20, 13), metric=second_output, budget=0.5).layers
    content = file.read_bytes()
    monkeypatch.setattr(MODULE, "calibrate", None)
    monkeypatch.setattr(MODULE, "module_runner", lambda model, sites: None)
    again = normswap.sensitivity(conv_net(), images(20, 13), metric=second_output, budget=0.5, skip_done=file)
    assert again == Sensitivity(again.plan, *(getattr(first, name) for name in ("layers", "by", "batches", "metric", "budget", "chosen")))
    assert file.read_bytes() == content


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_ctrl_c_keeps_the_rows(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, calls = tmp_path / "done.jsonl", [0]

    def metric(model: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == after + 1:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        normswap.sensitivity(conv_net(), images(20, 13), metric=metric, skip_done=file)
    assert len(file.read_text().splitlines()) == 1 + after
    with file.open("a") as opened:
        opened.write('{"swapped": ["1"], "rel_l')  # what a power cut leaves
    calibrated: list[str] = []

    def counting(model: nn.Module, original: nn.Module, names: Sequence[str], *rest: Any, **options: Any) -> Any:
        calibrated.extend(names)
        return calibrate.calibrate(model, original, names, *rest, **options)

    monkeypatch.setattr(MODULE, "calibrate", counting)
    calls[0] = 100
    again = normswap.sensitivity(conv_net(), images(20, 13), metric=metric, skip_done=file)
    assert calls[0] == 100 + 5 - after  # the original, the exact swaps, three layers
    assert calibrated == list(APPROXIMATE[max(0, after - 2) :])
    assert again.layers == normswap.sensitivity(conv_net(), images(20, 13), metric=lambda model: 1.0).layers
    assert all(json.loads(line) for line in file.read_text().splitlines())


def one_norm_less() -> nn.Module:
    model = conv_net()
    model[7] = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": one_norm_less()}, "of another model: '7' is a norm of the kind instance_norm there, and no norm in"),
        (
            {"rules": (RENAMED, *DEFAULT_RULES)},
            "of another model: '9' is a norm of the kind layer_norm there, and a norm of the kind renamed in",
        ),
        ({"data": images(33)}, "with another number of batches: 2; expected 1"),
        ({"metric": second_output}, "with another metric: None; expected second_output"),
    ],
    ids=["model", "rules", "batches", "metric"],
)
def test_a_file_of_something_else_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "done.jsonl"
    usual: dict[str, Any] = {"model": conv_net(), "data": images(20, 13), "skip_done": file}
    normswap.sensitivity(**usual)
    content = file.read_bytes()
    with pytest.raises(UsageError, match=re.escape(f"done.jsonl holds measurements {message}")):
        normswap.sensitivity(**usual | change)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        "notes",
        "[]",
        '{"swapped": ["1"], "rel_l2": 0.1}',
        '{"swapped": ["1"], "rel_l2": "0.1", "max_rel": 0.1, "metric": null, "change": null, "calibration_error": null}',
        '{"swapped": ["1"], "rel_l2": null, "max_rel": 0.1, "metric": null, "change": null, "calibration_error": null}',
        '{"swapped": ["2"], "rel_l2": 0.1, "max_rel": 0.1, "metric": null, "change": null, "calibration_error": null}',
        '{"swapped": 1, "rel_l2": 0.1, "max_rel": 0.1, "metric": null, "change": null, "calibration_error": null}',
        '{"swapped": [["1"]], "rel_l2": 0.1, "max_rel": 0.1, "metric": null, "change": null, "calibration_error": null}',
        '{"swapped": [], "rel_l2": 0.1, "max_rel": 0.1, "metric": null, "change": null, "calibration_error": 0.1}',
    ],
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "done.jsonl"
    normswap.sensitivity(conv_net(), images(9), skip_done=file)
    first, *rest = file.read_text().splitlines(keepends=True)
    content = "".join([first, rest[0], line + "\n", *rest[1:]])
    file.write_text(content)
    with pytest.raises(
        UsageError, match=r"^line 3 of .*done\.jsonl is no measurement\nhint: take that line out, or give the name of a new file"
    ):
        normswap.sensitivity(conv_net(), images(9), skip_done=file)
    assert file.read_text() == content


def test_what_does_not_change_a_measurement_may_change(tmp_path: Path) -> None:
    file = tmp_path / "done.jsonl"
    normswap.sensitivity(conv_net(), images(20, 13), skip_done=file)
    lines = len(file.read_text().splitlines())
    normswap.sensitivity(conv_net().train(), (b for b in images(20, 13)), by="max_rel", exclude=["7"], skip_done=file)
    assert len(file.read_text().splitlines()) == lines
    assert normswap.sensitivity(conv_net(), images(20, 13), budget=9.0, skip_done=file).chosen
    assert len(file.read_text().splitlines()) == lines + 1


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"some": "json"}\n', "[1]\n", '{"normswap sensitivity": 1, "key": "a"}\n'])
def test_a_file_that_is_not_ours_is_left_alone(content: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(UsageError, match="is no file of measurements, or one of another version of normswap"):
        normswap.sensitivity(conv_net(), images(9), skip_done=file)
    assert file.read_text() == content


def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    assert normswap.sensitivity(conv_net(), images(9), skip_done=tmp_path / "new").layers
    assert json.loads((tmp_path / "new").read_text().splitlines()[0])["normswap sensitivity"] == 2


# -- progress, JSON, the command ---------------------------------------------------------------------------------------------


def test_progress_is_told_after_each_forward() -> None:
    told: list[tuple[str, int, int]] = []
    normswap.sensitivity(conv_net(), images(20, 13), progress=lambda *what: told.append(what))
    assert [t[1:] for t in told if t[0] == "calibrating"] == [(1, 2), (2, 2)]
    assert [t[1:] for t in told if t[0] == "one layer at a time"] == [(i, 6) for i in range(1, 7)]


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {*value, *(k for v in value.values() for k in keys(v))} if "python" not in value else set()
    return {k for item in value for k in keys(item)} if isinstance(value, (list, tuple)) else set()


def test_the_documented_keys_are_the_keys(repository: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (repository / "docs/sensitivity.md").read_text(), re.MULTILINE))
    found = normswap.sensitivity(conv_net(), images(20, 13), metric=second_output, budget=0.5, exclude=["7"])
    assert documented == keys(sensitivity_json("net.pt", found))


def test_json_is_strict() -> None:
    x = [torch.randn(40, 6) * torch.linspace(0.1, 9, 40)[:, None]]
    printed = sensitivity_json("net.pt", normswap.sensitivity(Masked(True).eval(), x, budget=math.inf))
    assert printed["layers"][0]["rel_l2"] == printed["budget"] == "inf"
    assert json.loads(json.dumps(printed, allow_nan=False)) == printed


def test_the_table_has_a_row_for_every_norm() -> None:
    found = normswap.sensitivity(conv_net(), images(20, 13), exclude=["7"], budget=0)
    table = sensitivity_table(found)
    rows = (*table.rows, *table.totals)
    assert [row[1] for row in rows] == ["4", *(x.name for x in found.layers[1:]), "7"]
    assert [row[-1] for row in rows] == ["yes", "", "", ""]
    assert "  kept 7: was excluded by name or kind; take it out of exclude to swap it" in sensitivity_summary(found).splitlines()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(conv_net(), tmp_path / "net.pt")
    (tmp_path / "data").mkdir()
    for i, batch in enumerate(images(20, 13)):
        torch.save(batch, tmp_path / "data" / f"{i}.pt")
    return tmp_path


def test_the_command_prints_what_convert_can_be_told(saved: Path) -> None:
    result = run("sensitivity", saved / "net.pt", "--data", saved / "data", "--budget", 0.12, "--skip-done", saved / "done")
    assert (result.exit_code, result.stderr) == (0, "")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("  for normswap convert: ")
    asked = shlex.split(last.partition(": ")[2])
    printed = run("sensitivity", saved / "net.pt", "--data", saved / "data", "--budget", 0.12, "--skip-done", saved / "done", "--json")
    assert (printed.exit_code, printed.stderr) == (0, "")
    content = json.loads(printed.stdout)
    assert 1 < len(content["chosen"]["names"]) < 4
    assert content["chosen"]["rel_l2"] <= 0.12
    converted = run("convert", saved / "net.pt", "-o", saved / "out", "--no-onnx", "--json", *asked)
    assert converted.exit_code == 0, converted.stderr
    assert [s["name"] for s in json.loads(converted.stdout)["plan"]["swaps"]] == content["chosen"]["names"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "error: sensitivity is measured on data, and none were given"),
        (["--data", "DATA", "--by", "change"], 2, "error: layers are to be ranked by the change of a metric"),
        (["--data", "DATA", "--metric", "nowhere:metric"], 2, "error: --metric nowhere:metric: there is no module nowhere"),
        (["--data", "DATA", "--metric", "math:pi"], 2, "error: --metric math:pi is a float; expected a function"),
        (["--data", "DATA", "--budget", "-1"], 2, "error: the budget is -1.0"),
        (["--data", "DATA", "--skip-done", "DATA/0.pt"], 2, "is no file of measurements"),
    ],
)
def test_exit_codes(options: list[str], code: int, message: str, saved: Path) -> None:
    result = run("sensitivity", saved / "net.pt", *(o.replace("DATA", str(saved / "data")) for o in options))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_metric_that_is_built_in_by_its_name(saved: Path) -> None:
    result = run("sensitivity", saved / "net.pt", "--data", saved / "data", "--metric", "neighbours", "--by", "change", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert (content["metric"], content["by"]) == (1.0, "change")
    assert all(0 <= layer["metric"] <= 1 for layer in content["layers"])


def test_a_metric_by_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "my_metric_module.py").write_text("def bias(model):\n    return model[10].bias.sum()\n")
    monkeypatch.syspath_prepend(saved)
    result = run("sensitivity", saved / "net.pt", "--data", saved / "data", "--metric", "my_metric_module:bias", "--by", "change", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert {layer["change"] for layer in content["layers"]} == {0.0}
    assert content["metric"] == pytest.approx(cast(Tensor, conv_net()[10].bias).sum().item())


def test_the_bar_is_shown_on_a_terminal_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sensitivity", saved / "net.pt", "--data", saved / "data", "--json")
    assert run(*command).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    result = run(*command)
    assert "one layer at a time" in result.stderr
    assert json.loads(result.stdout)["batches"] == 2
