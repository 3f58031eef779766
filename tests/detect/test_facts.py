"""What inspect knows of each norm, each hazard where it is and where it is not, and that nothing is changed by looking."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from surgery import IMAGE, net, untraceable
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import normswap
from fixtures.nets import case, randomise
from normswap.api.convert import inspect
from normswap.cli.app import app
from normswap.detect.facts import Facts
from normswap.detect.facts import facts as watch

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))
DIGITS = str(Path(__file__).parents[2] / "fixtures" / "digits_cnn.pt")


def facts(model: Any, *inputs: Any, **options: Any) -> dict[str, Facts]:
    return {known.name: known for known in inspect(model, inputs or None, **options)[1]}


def texts(known: Facts) -> dict[str, str]:
    return {hazard.code: hazard.text for hazard in known.warnings}


def trained(norm: Any, batches: int = 3) -> Any:
    """`norm` with statistics that look trained, and counted."""
    randomise(norm, 5)
    if getattr(norm, "num_batches_tracked", None) is not None:
        norm.num_batches_tracked.fill_(batches)
    return norm.eval()


def alone(norm: nn.Module, x: Tensor = X) -> Facts:
    """The facts about a norm that is the whole model; a model that is only a norm has no producer."""
    (known,) = facts(norm, x).values()
    return known


def changed(norm: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


@torch.no_grad()
def filled(norm: Any, name: str, index: Any, value: float) -> Any:
    getattr(norm, name)[index] = value
    return norm


# -- hazards that are read off the layer -----------------------------------------------------------------------------------------

FRESH = (
    "has running_mean 0 and running_var 1 in every channel, as they are initialised: it was never trained, or its statistics were "
    "not loaded"
)
UNCOUNTED = (
    "has num_batches_tracked 0, yet statistics that are not the initial ones: something set them without counting "
    "(weights converted from elsewhere, for one), and a swap takes them as they are"
)
UNTRACKED = (
    "keeps no running statistics (track_running_stats=False): it normalizes by each batch's own, in eval mode too, so the output "
    "for one sample depends on the others"
)
SWITCHED = "has running statistics, but track_running_stats=False: eval mode uses them, train mode no longer updates them"
CUMULATIVE = "has momentum=None: its statistics are the plain average of all batches so far, so training on moves them less and less"
ONE_VALUE = (
    "gets one value per channel and sample: train mode takes its variance over the batch alone and raises for a batch of 1, "
    "while eval mode runs"
)


META = torch.ones(4, device="meta")


def frozen(**options: Any) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(4, **options)  # type: ignore[no-any-return]


def norm_act() -> nn.Module:
    from timm.layers.norm_act import BatchNormAct2d

    return BatchNormAct2d(4, act_layer=nn.SiLU)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "code", "text"),
    [
        (lambda: nn.BatchNorm2d(4), "never_updated", FRESH),
        (lambda: changed(nn.BatchNorm2d(4), num_batches_tracked=torch.tensor(9)), "never_updated", FRESH),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True), "never_updated", FRESH),
        (frozen, "never_updated", FRESH),
        (norm_act, "never_updated", FRESH),
        (lambda: trained(nn.BatchNorm2d(4), 0), "not_counted", UNCOUNTED),
        (lambda: trained(nn.SyncBatchNorm(4), 0), "not_counted", UNCOUNTED),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "no_running_statistics", UNTRACKED),
        (lambda: changed(trained(nn.BatchNorm2d(4)), track_running_stats=False), "tracking_switched_off", SWITCHED),
        (lambda: trained(nn.BatchNorm2d(4, momentum=None)), "cumulative_momentum", CUMULATIVE),
        (
            lambda: nn.BatchNorm2d(4, momentum=None),
            "cumulative_momentum",
            f"{CUMULATIVE}, and the next batch replaces them, as num_batches_tracked is 0",
        ),
        (
            lambda: filled(trained(nn.BatchNorm2d(4)), "running_var", slice(1, 3), float("inf")),
            "not_finite",
            "has 2 of 4 values of running_var that are not finite",
        ),
        (
            lambda: filled(filled(nn.GroupNorm(2, 4), "weight", 3, float("nan")), "bias", 0, float("-inf")),
            "not_finite",
            "has 1 of 4 values of weight, 1 of 4 values of bias that are not finite",
        ),
    ],
)
def test_a_trap_is_named(make: Callable[[], nn.Module], code: str, text: str) -> None:
    assert texts(alone(make()))[code] == text


@pytest.mark.parametrize(
    ("make", "codes"),
    [
        (lambda: trained(nn.BatchNorm2d(4)), set()),
        (lambda: trained(nn.BatchNorm2d(4, affine=False)), set()),
        (lambda: trained(nn.BatchNorm2d(4, momentum=0.0)), set()),
        (lambda: trained(norm_act()), set()),
        (lambda: trained(frozen()), set()),  # it counts nothing and has no momentum
        (lambda: filled(nn.BatchNorm2d(4), "running_mean", 2, 0.5), {"not_counted"}),  # one channel is enough
        (lambda: filled(nn.BatchNorm2d(4), "running_var", 2, 0.5), {"not_counted"}),
        (lambda: nn.BatchNorm2d(4, momentum=None, track_running_stats=False), {"no_running_statistics"}),  # no average to speak of
        (lambda: nn.InstanceNorm2d(4, affine=True), set()),  # by sample, as it should be
        (lambda: trained(nn.InstanceNorm2d(4, track_running_stats=True)), set()),
        (lambda: nn.GroupNorm(2, 4), set()),
        (lambda: nn.LayerNorm(7), set()),
        (lambda: nn.RMSNorm(7), set()),
        (lambda: changed(nn.BatchNorm2d(4), running_mean=META, running_var=META), set()),
        (lambda: nn.BatchNorm2d(4, device="meta"), set()),  # its values are not known, which is not 0 and 1
    ],
)
def test_no_trap_is_imagined(make: Callable[[], nn.Module], codes: set[str]) -> None:
    norm = make()
    x = X.to("meta") if any(t.is_meta for t in norm.parameters()) else X
    assert set(texts(alone(norm, x))) == codes


@pytest.mark.parametrize(
    ("make", "shape", "fires"),
    [
        (lambda: nn.BatchNorm2d(4), (3, 4, 1, 1), True),
        (lambda: nn.BatchNorm1d(4), (3, 4), True),
        (lambda: nn.BatchNorm1d(4), (3, 4, 1), True),
        (lambda: nn.BatchNorm3d(4), (3, 4, 1, 1, 1), True),
        (norm_act, (3, 4, 1, 1), True),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 1, 1), True),
        (lambda: nn.BatchNorm2d(4), (1, 4, 1, 2), False),
        (lambda: nn.BatchNorm1d(4), (3, 4, 5), False),
        (frozen, (3, 4, 1, 1), False),  # train mode is eval mode
        (lambda: nn.LayerNorm(4), (3, 4), False),
        (lambda: nn.GroupNorm(2, 4), (3, 4, 1, 1), False),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (3, 4, 1, 1), False),
    ],
)
def test_one_value_per_channel(make: Callable[[], nn.Module], shape: tuple[int, ...], fires: bool) -> None:
    norm = make()
    found = texts(alone(trained(norm), torch.randn(shape)))
    assert found.get("one_value_per_channel") == (ONE_VALUE if fires else None)
    if fires:  # the claim
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            make().train()(torch.randn(1, *shape[1:]))


def test_tokens_that_are_flattened_into_the_batch_are_many_values() -> None:
    """As LeViT does: BatchNorm1d on (N * L, C), where a batch of 1 has L values per channel."""
    run = lambda self, x: self.norm(self.conv(x).movedim(1, -1).flatten(0, -2))  # noqa: E731
    (known,) = facts(net(trained(nn.BatchNorm1d(5)), run), X).values()
    assert known.shapes == ((3 * 7 * 5, 5),)
    assert texts(known) == {}


# -- hazards that take a look at the model ---------------------------------------------------------------------------------------


def test_calls() -> None:
    (twice,) = facts(case("called_twice").make(), *case("called_twice").inputs()).values()
    assert texts(twice)["called_repeatedly"] == (
        "is called 2 times in one forward: all calls share one set of statistics, and train mode mixes what it sees in each"
    )
    parts = facts(case("in_module_dict").make(), X)
    assert texts(parts["norms.photo"])["never_called"] == (
        "is not called by a forward pass in eval mode, so nothing measured says anything about it"
    )
    assert parts["norms.photo"].unseen is None
    for known in (parts["norms.sketch"], *facts(case("batch_norm_2d").make(), X).values()):
        assert not {"called_repeatedly", "never_called"} & set(texts(known))


IN_PLACE = (
    "has its output overwritten in place by {}: a swap keeps that safe, as BatchlessNorm returns a new tensor too; "
    "but a hook or feature extractor that keeps the output sees it after the write"
)


def set_item(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.norm(self.conv(x))
    y[:, 1] = 0.0
    return y


def iadd(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.norm(self.conv(x))
    y += 1.0
    return y.relu_()


@pytest.mark.parametrize(
    ("run", "by", "written_by"),
    [
        (lambda self, x: self.norm(self.conv(x)).relu_(), "relu_", ("relu_",)),
        (lambda self, x: F.relu(self.norm(self.conv(x)), inplace=True), "relu", ("relu",)),
        (lambda self, x: self.norm(self.conv(x)).view(3, -1).mul_(2.0), "mul_", ("mul_",)),  # through a view
        (lambda self, x: torch.sigmoid(y, out=y) if (y := self.norm(self.conv(x))).sum() else y, "sigmoid", ("sigmoid",)),
        (untraceable(set_item), "__setitem__", ("__setitem__",)),
        (iadd, "add_, relu_", ("add_", "relu_")),
    ],
)
def test_written_in_place_in_code(run: Callable[[Any, Tensor], Tensor], by: str, written_by: tuple[str, ...]) -> None:
    (known,) = facts(net(trained(nn.BatchNorm2d(5)), run), X).values()
    assert texts(known)["written_in_place"] == IN_PLACE.format(by)
    assert known.written_by == written_by


def test_written_in_place_by_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), trained(nn.BatchNorm2d(5)), nn.Sequential(nn.LeakyReLU(0.1, inplace=True)))
    known = facts(model.eval(), X)["1"]
    assert texts(known) == {"written_in_place": IN_PLACE.format("LeakyReLU")}
    assert known.written_by == ("2.0",)


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: self.norm(self.conv(x)).relu(),
        lambda self, x: self.norm(self.conv(x)).clone().relu_(),
        lambda self, x: (self.norm(self.conv(x)) + 1).relu_(),
        lambda self, x: self.norm(self.conv(x).relu_()),  # its input
        lambda self, x: F.dropout(self.norm(self.conv(x)), 0.5, training=False, inplace=True),  # does nothing in eval mode
        lambda self, x: [self.norm(self.conv(x)).sum(), torch.zeros(3, 5, 7, 5).add_(1)][1],  # perhaps where the output was
    ],
)
def test_not_written_in_place(run: Callable[[Any, Tensor], Tensor]) -> None:
    (known,) = facts(net(trained(nn.BatchNorm2d(5)), run), X).values()
    assert (texts(known), known.written_by) == ({}, ())


def test_what_a_norm_does_inside_itself_is_not_said() -> None:
    """timm's norm-act layer has an in-place activation of its own."""
    from timm.layers.norm_act import BatchNormAct2d

    known = facts(nn.Sequential(nn.Conv2d(4, 5, 3), trained(BatchNormAct2d(5, inplace=True))).eval(), X)["1"]
    assert (texts(known), known.written_by) == ({}, ())


# -- functional calls ----------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Norms as calls, two of a kind in one forward, on inputs of different shapes."""

    def __init__(self, training: bool = False) -> None:
        super().__init__()
        self.conv, self.linear, self.training_flag = nn.Conv2d(4, 5, 3), nn.Linear(5, 6), training
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
        self.register_buffer("var", torch.tensor([1.0, 2.0, 1e-10, 4.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mean, self.var, eps=1e-3, training=self.training_flag)
        y = F.layer_norm(y, (5,), eps=1e-4)
        return F.layer_norm(self.linear(y), normalized_shape=(6,))


class Holder(nn.Module):
    def __init__(self, *, traceable: bool) -> None:
        super().__init__()
        self.body, self.traceable = Calls(), traceable

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y if self.traceable or float(y.detach().abs().max()) < 1e9 else x


@pytest.mark.parametrize("traceable", [True, False])
def test_functional_calls(traceable: bool) -> None:
    model = Holder(traceable=traceable).eval()
    plan = normswap.plan(model, X)
    assert plan.backend == ("fx" if traceable else "walk")
    found = facts(model, X)
    norm, *layers = (found[name] for name in ("body.batch_norm", "body.layer_norm", "body.layer_norm_1"))
    assert list(found) == [known.name for known in (norm, *layers)]  # in execution order
    assert (norm.shapes, norm.callers, norm.channels, norm.eps, norm.dead_channels) == (((3, 5, 7, 5),), ("body",), 5, 1e-3, 2)
    assert [known.shapes for known in layers] == [((3, 5, 7, 5),), ((3, 5, 7, 6),)]
    assert [known.eps for known in layers] == [1e-4, 1e-5]
    assert all(known.unseen is None and not known.warnings for known in found.values())


def test_a_call_that_trains_in_eval_mode() -> None:
    model = Calls(training=True).eval()
    before = model.mean.clone()  # type: ignore[operator]
    assert texts(facts(model, X)["batch_norm"])["batch_statistics"] == (
        "is called with training=True in a forward pass in eval mode: the output for one sample depends on the others"
    )
    assert torch.equal(model.mean, before)  # type: ignore[arg-type]
    assert not texts(facts(Calls().eval(), X)["batch_norm"])


# -- statistics ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("var", "weight", "dead", "zero"),
    [
        ([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 2.0, 1.0], 0, 0),
        ([1.0, 2.0, 0.0, 1e-12], [1.0, -1.0, 2.0, 0.0], 2, 1),
        ([1.0, 2.0, 1e-7, 2.0], [1.0, -1.0, -1e-9, 1e-3], 0, 1),  # small is not about 0
        ([1e-14, 1e-14, 2e-14, 1e-14], [1e-9, 1e-9, 1e-9, 1e-9], 0, 0),  # relative to the others
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 4, 4),
        ([1e9, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1e9], 0, 0),  # one outlier does not make the others dead
        ([1.0, 1.0, float("inf"), 0.0], [1.0, 1.0, float("nan"), 0.0], 1, 1),
    ],
)
def test_dead_channels_and_zero_weights(var: list[float], weight: list[float], dead: int, zero: int) -> None:
    norm = nn.BatchNorm2d(4, eps=2e-3, momentum=0.25)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor(var))  # type: ignore[union-attr]
        norm.weight.copy_(torch.tensor(weight))
    norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    known = alone(norm)
    assert (known.dead_channels, known.zero_weights) == (dead, zero)
    assert (known.channels, known.eps, known.momentum, known.batches) == (4, 2e-3, 0.25, 7)


def test_what_does_not_apply_is_none() -> None:
    layer = alone(nn.LayerNorm(7, eps=1e-3))
    assert (layer.channels, layer.eps, layer.momentum, layer.batches, layer.dead_channels, layer.zero_weights) == (
        7,
        1e-3,
        None,
        None,
        None,
        0,
    )
    bare = alone(nn.BatchNorm2d(4, affine=False, momentum=None))
    assert (bare.channels, bare.momentum, bare.batches, bare.dead_channels, bare.zero_weights) == (4, "cumulative", 0, 0, None)


def test_a_weight_of_0_is_none_where_the_layer_adds_1_to_it() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    gemma, llama = GemmaRMSNorm(7, eps=1e-3), LlamaRMSNorm(7, eps=1e-3)
    assert gemma.weight.abs().max() == 0
    assert [(known.zero_weights, known.eps) for known in (alone(gemma), alone(llama))] == [(None, 1e-3), (None, 1e-3)]


def test_one_norm_at_two_shapes() -> None:
    model = net(trained(nn.BatchNorm2d(5)), lambda self, x: self.norm(F.avg_pool2d(self.norm(self.conv(x)), 2)))
    known = facts(model, X)["norm"]
    assert (known.shapes, known.callers) == (((3, 5, 7, 5), (3, 5, 3, 2)), ("",))
    (shared,) = facts(case("aliased_two_parents").make(), X).values()
    assert (shared.name, shared.shapes, shared.callers) == ("first.1", ((3, 4, 9, 7),), ("first", "second"))


# -- where nothing can be watched ----------------------------------------------------------------------------------------------


def test_no_forward_can_run() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 5, 3), trained(nn.BatchNorm2d(5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + y  # type: ignore[no-any-return]

    known = facts(Two().eval())["norm"]
    assert (known.shapes, known.unseen) == ((), "no example inputs are known, so no forward pass was watched")
    assert (known.batches, known.folds_into, known.warnings) == (3, "conv", ())


def test_a_forward_that_stops() -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), trained(nn.BatchNorm2d(5)), nn.Linear(6, 2), trained(nn.BatchNorm2d(5))).eval()
    found = facts(model, X)
    assert (found["1"].shapes, found["1"].unseen) == (((3, 5, 7, 5),), None)
    assert found["3"].shapes == ()
    assert found["3"].unseen == (
        "the watched forward pass stopped before it: RuntimeError: mat1 and mat2 shapes cannot be multiplied (105x5 and 6x2)"
    )


def test_nothing_to_say() -> None:
    assert facts(case("norm_free").make(), X) == {}


# -- what it could fold into ---------------------------------------------------------------------------------------------------

OWN_AXIS = "its channels lie on another axis than those of {}"
NOBODY = "no conv or linear layer feeds it and nothing else"


@pytest.mark.parametrize(
    ("name", "site", "into", "why_not"),
    [
        ("batch_norm_1d", "1", "0", None),
        ("batch_norm_3d", "1", "0", None),
        ("transposed_conv_groups", "1", "0", None),
        ("batch_norm_act", "1", "0", None),
        ("linear_on_sequence", "norm", None, OWN_AXIS.format("linear")),
        ("shared_conv", "norm", None, NOBODY),
        ("pre_activation", "norm", None, NOBODY),
        ("root_is_norm", "", None, NOBODY),
        ("called_twice", "norm", None, "it is called 2 times"),
        ("in_module_dict", "norms.photo", None, "no call of it is known"),
        ("subclass_overriding_forward", "1.norm", "0", None),
        ("graph_module", "norm", "conv", None),
        ("graph_module_functional", "batch_norm", "conv", None),
    ],
)
def test_folds_into(name: str, site: str, into: str | None, why_not: str | None) -> None:
    known = facts(case(name).make(), *case(name).inputs())[site]
    assert (known.folds_into, known.why_not_folded) == (into, why_not)


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "into"),
    [
        (nn.Linear(4, 5), nn.LayerNorm(5), (3, 4), True),
        (nn.Linear(4, 5), nn.LayerNorm(5), (3, 6, 4), True),
        (nn.Linear(4, 5), nn.LayerNorm((6, 5)), (3, 6, 4), False),
        (nn.Linear(4, 5), nn.GroupNorm(2, 6), (3, 6, 4), False),
        (nn.Conv2d(4, 5, 3), nn.GroupNorm(5, 5), (3, 4, 9, 7), True),
        (nn.Conv2d(4, 5, 3), nn.LayerNorm(5), (3, 4, 9, 7), False),  # along the width, which happens to be 5
        (nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), (3, 4, 9, 7), True),
    ],
)
def test_an_approximate_swap_folds_where_the_channels_meet(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], into: bool) -> None:
    known = facts(nn.Sequential(layer, norm).eval(), torch.randn(shape))["1"]
    assert known.approximate
    assert (known.folds_into, known.why_not_folded) == (("0", None) if into else (None, OWN_AXIS.format("0")))


@pytest.mark.parametrize(
    "name",
    [
        *("linear_on_sequence", "pre_activation", "transposed_conv_groups"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("batch_norm_1d", "batch_norm_2d")),
    ],
)
def test_what_folds_is_what_the_exporter_folds(name: str, tmp_path: Path) -> None:
    model, inputs = case(name).make(), case(name).inputs()
    exported = normswap.export_onnx(normswap.convert(model, inputs), inputs, tmp_path / "m.onnx")
    folded = {known.name for known in facts(model, *inputs).values() if known.folds_into}
    assert folded == {site.name for site in exported.sites if site.how == "into_producer"}


# -- approximately -------------------------------------------------------------------------------------------------------------


def test_what_an_approximate_conversion_would_swap() -> None:
    model = case("other_norms").make()
    plan, _ = inspect(model, (X,))
    assert [swap.name for swap in plan.swaps] == ["1"]
    wider = normswap.plan(model, (X,), approximate=True)
    found = facts(model, X)
    assert {name for name, known in found.items() if known.approximate} == {"2", "3", "4"}
    assert {swap.name for swap in wider.swaps} == {"1", "2", "3", "4"}
    kept = facts(model, X, exclude=["group_norm"])
    assert {name for name, known in kept.items() if known.approximate} == {"2", "4"}


# -- looking changes nothing ---------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """Draws from every generator, and counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(nn.BatchNorm2d(4))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        y: Tensor = self.norm(x)
        return y + torch.rand(1) + random.random() + float(np.random.rand())


def test_model_and_random_state_are_kept() -> None:
    model = Random().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = normswap.plan(model, X)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    watch(model, plan, lambda: ((X,), {}))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert np.array_equal(state[2], np.random.get_state()[1])
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- real models ---------------------------------------------------------------------------------------------------------------


def test_resnet() -> None:
    from torchvision.models import resnet18

    model = randomise(resnet18(weights=None), 0).eval()
    plan, found = inspect(model, (torch.randn(1, 3, 32, 32),))
    assert [known.name for known in found] == [swap.name for swap in plan.swaps]
    assert all(known.folds_into == swap.producer for known, swap in zip(found, plan.swaps, strict=True))
    by_name = {known.name: known for known in found}
    assert by_name["layer4.1.bn2"].shapes == ((1, 512, 1, 1),)
    assert by_name["layer1.0.bn1"].written_by == ("layer1.0.relu",)
    assert by_name["layer1.0.bn2"].written_by == ("layer1.0.add_", "layer1.0.relu")
    assert by_name["layer2.0.downsample.1"].written_by == ()
    assert {known.name for known in found if "one_value_per_channel" in texts(known)} == {n for n in by_name if n.startswith("layer4")}
    assert sum("written_in_place" in texts(known) for known in found) == 17


def test_timm() -> None:
    import timm

    found = facts(timm.create_model("convnext_atto").eval(), torch.randn(1, 3, 32, 32))
    assert all(known.approximate and known.unseen is None and not known.warnings for known in found.values())
    assert found["stages.0.blocks.0.norm"].folds_into == "stages.0.blocks.0.conv_dw"
    assert found["stages.1.downsample.0"].why_not_folded == NOBODY


@pytest.mark.parametrize("form", ["training", "inference", "core"])
def test_an_exported_program(form: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 5, 3), trained(nn.BatchNorm2d(5, eps=1e-3)), nn.ReLU(inplace=True))
            self.head, self.norm, self.last = nn.Linear(5 * 7 * 6, 4), trained(nn.BatchNorm1d(4)), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(self.head(self.stem(x).flatten(1))))
            return y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        program = torch.export.export(Two().eval(), (torch.randn(2, 3, 9, 8),))
        if form != "training":
            program = program.run_decompositions({} if form == "inference" else None)
        first, second, layer = facts(program).values()
    assert [known.shapes for known in (first, second, layer)] == [((2, 5, 7, 6),), ((2, 4),), ((2, 4),)]
    assert (first.folds_into, first.eps, first.channels) == ("stem.0", 1e-3, 5)
    assert second.folds_into == "head"
    assert layer.why_not_folded == NOBODY
    assert set(texts(first)) == ({"written_in_place"} if form == "training" else set())
    assert texts(second) == {}  # a program has no train mode


# -- on the command line -------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "140"})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table() -> None:
    result = run(DIGITS)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert cells(lines[0]) == ["site", "kind", "input", "batches", "momentum", "eps", "folds into", "what"]  # no column that says nothing
    assert cells(lines[2]) == ["1", "batch_norm", "1x16x8x8", "315", "0.1", "1e-05", "0", "would swap, exact"]
    assert lines[6] == "would swap 4 of 4 normalization layers"
    assert lines[7] == "  paired: 4 of 4 with the conv or linear layer before them, to train with it"
    assert lines[8] == f"  warning: 1, 4, 8 and 1 more: each {IN_PLACE.format('ReLU')}"
    assert lines[9:] == [f"  warning: 13 {ONE_VALUE}"]


def test_the_table_of_kept_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixed.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.GroupNorm(3, 6), nn.Softmax(1))\n"
        "    model[1].running_var[:2] = 0\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = [line for line in run("mixed:build", "--input", "2x3x9x8").stdout.splitlines() if line.strip()]
    text = "\n".join(lines)
    assert cells(lines[0]) == [
        "site",
        "kind",
        "input",
        "batches",
        "momentum",
        "eps",
        "constant",
        "folds into",
        "what",
    ]
    assert "2 dead" in lines[2]
    assert text.count("kept, or") == 2
    assert text.count("  why not: 2, 3: each GroupNorm takes its statistics from each sample") == 1
    assert "would swap 1 of 3 normalization layers" in lines
    assert "  with --approximate --data DATA: would swap 2 more, approximately" in lines


def test_the_json() -> None:
    report = json.loads(run(DIGITS, "--json").stdout)
    assert [known["name"] for known in report["facts"]] == ["1", "4", "8", "13"]
    last = report["facts"][-1]
    assert last["warnings"][0] == {"code": "one_value_per_channel", "text": ONE_VALUE}
    assert (last["shapes"], last["folds_into"], last["batches"], last["approximate"]) == ([[1, 48]], "12", 315, False)


def test_the_table_when_no_forward_runs() -> None:
    result = run(DIGITS, "--input", "1x2x8x8")
    assert result.exit_code == 0
    why = "has an input of unknown shape: the watched forward pass stopped before it: RuntimeError: Given groups=1"
    assert f"  note: 1, 4, 8 and 1 more: each {why}" in result.stdout
    assert sum("unknown" in cells(line) for line in result.stdout.splitlines()) == 4


def test_every_warning_is_documented(repository: Path) -> None:
    source = (repository / "normswap/detect/hazards.py").read_text()
    codes = set(re.findall(r'Hazard\(\s*"(\w+)"', source))
    assert len(codes) == 11
    assert codes == set(re.findall(r"^    (\w+) {2,}\S", source.partition('"""\n')[0], re.MULTILINE))
    assert codes == set(re.findall(r"^\| `(\w+)` \|", (repository / "docs/inspect.md").read_text(), re.MULTILINE))
