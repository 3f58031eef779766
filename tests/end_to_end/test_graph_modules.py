"""A torch.fx.GraphModule is rewritten as the graph it is, however the norm is written in it."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery import IMAGE, error, net, swapped
from torch import fx, nn

import normswap
from fixtures.nets import case
from normswap import BatchlessNorm
from normswap.detect import functional

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))
aten = torch.ops.aten

# Every way to write the same call: s is the net, y the output of its conv.
FORMS = {
    "positional": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, 1e-3),
    "keywords": lambda s, y, n: F.batch_norm(
        input=y, eps=1e-3, bias=n.bias, weight=n.weight, running_var=n.running_var, running_mean=n.running_mean
    ),
    "mixed": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, bias=n.bias, weight=n.weight, eps=1e-3),
    "no affine": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, eps=1e-3),
    "weight only": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, n.weight, eps=1e-3),
    "bias only": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, bias=n.bias, eps=1e-3),
    "eps by default": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias),
    "eps an int": lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1),
    "torch": lambda s, y, n: torch.batch_norm(y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3, True),
    "torch, cudnn off": lambda s, y, n: torch.batch_norm(y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3, False),
    "torch, native": lambda s, y, n: torch.native_batch_norm(y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3)[0],
    "aten": lambda s, y, n: aten.batch_norm.default(y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3, False),
    "aten, native": lambda s, y, n: aten.native_batch_norm.default(y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3)[0],
    "aten, no_training": lambda s, y, n: aten._native_batch_norm_legit_no_training.default(
        y, n.weight, n.bias, n.running_mean, n.running_var, 0.1, 1e-3
    )[0],
    "aten, no_update": lambda s, y, n: aten._batch_norm_no_update.default(y, n.weight, n.bias, n.running_mean, n.running_var, 0.1, 1e-3)[0],
}


def traced(form: Any) -> Any:
    model = net(nn.BatchNorm2d(5, eps=1e-3), run=lambda s, x: F.relu(form(s, s.conv(x), s.norm)))
    return fx.symbolic_trace(model).eval()


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_rewritten(form: str) -> None:
    model = traced(FORMS[form])
    code = model.code
    decided = normswap.plan(model)
    assert (decided.backend, decided.skips) == ("graph", ())
    (site,) = decided.swaps
    assert (site.kind, site.calls, site.producer) == ("batch_norm", 1, "conv")
    result = swapped(model)
    assert error(model, result, X) <= 1e-6
    assert type(result).__name__ == "GraphModule"
    assert model.code == code  # the original's graph is not touched
    assert [n.op for n in result.graph.nodes if n.op == "get_attr"] == []
    assert not any("running" in key for key in result.state_dict() if "source" not in key)
    assert error(model, normswap.revert(result), X) <= 1e-6


DECLINED = {
    "training": (
        lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, training=True),
        "normalizes by each batch's own statistics (training=True was traced); trace the model in eval mode",
    ),
    "batch statistics": (lambda s, y, n: F.batch_norm(y, None, None, training=True), "has no running statistics to start from"),
    "always training": (
        lambda s, y, n: aten._batch_norm_with_update_functional.default(y, None, None, n.running_mean, n.running_var, 0.1, 1e-5)[0],
        "normalizes by each batch's own statistics",
    ),
    "computed mean": (
        lambda s, y, n: F.batch_norm(y, y.mean((0, 2, 3)), n.running_var),
        "takes a running_mean that the graph computes (mean), so it is not a constant",
    ),
    "computed weight": (
        lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var, n.weight * 2),
        "takes a weight that the graph computes (mul), so it is not a constant",
    ),
    "layer_norm": (lambda s, y, n: F.layer_norm(y, [5]), "torch.nn.functional.layer_norm takes its statistics from each sample"),
    "torch.layer_norm": (lambda s, y, n: torch.layer_norm(y, [5]), "torch.layer_norm takes its statistics from each sample"),
    "torch.group_norm": (lambda s, y, n: torch.group_norm(y, 5), "torch.group_norm takes its statistics from each sample"),
    "torch.rms_norm": (lambda s, y, n: torch.rms_norm(y, [5]), "torch.rms_norm takes its statistics from each sample"),
    "torch.instance_norm": (
        lambda s, y, n: torch.instance_norm(y, None, None, None, None, True, 0.1, 1e-5, False),
        "torch.instance_norm takes its statistics from each sample",
    ),
}


@pytest.mark.parametrize("what", DECLINED)
def test_calls_that_stay(what: str) -> None:
    form, reason = DECLINED[what]
    model = traced(form)
    decided = normswap.plan(model)
    assert decided.swaps == ()
    (skip,) = decided.skips
    assert skip.reason.startswith(reason)
    assert error(model, swapped(model), X) == 0


def test_an_output_that_is_indexed() -> None:
    """[0] of a call that gives a tensor is its first sample, of one that gives a tuple the tensor."""
    model = traced(lambda s, y, n: F.batch_norm(y, n.running_mean, n.running_var)[0])
    assert error(model, swapped(model), X) <= 1e-6


def test_call_module() -> None:
    model, (x,) = case("graph_module").make(), case("graph_module").inputs()
    result = swapped(model)
    assert isinstance(result.norm, BatchlessNorm)
    assert [n.target for n in result.graph.nodes if n.op == "call_module"] == ["conv", "norm"]
    assert error(model, result, x) <= 1e-6


def test_used_tensors_stay() -> None:
    """A call that stays reads the mean and the variance; nothing reads the weight and the bias any more."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        n, y = s.norm, s.conv(x)
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)
        return F.batch_norm(y, n.running_mean, n.running_var)

    model = fx.symbolic_trace(net(run=run))
    result = swapped(model, exclude=("batch_norm_1",))
    assert error(model, result, X) <= 1e-6
    kept = [key for key in result.state_dict() if not key.startswith(("batch_norm.", "conv"))]
    assert kept == ["norm.running_mean", "norm.running_var"]


def test_a_layer_called_and_read() -> None:
    """The layer stays, as its statistics are read; the call that reads them is rewritten."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        n = s.norm
        return F.batch_norm(n(s.conv(x)), n.running_mean, n.running_var, n.weight, n.bias)

    model = fx.symbolic_trace(net(run=run))
    decided = normswap.plan(model)
    assert [s.name for s in decided.swaps] == ["batch_norm"]
    assert [(s.name, s.reason) for s in decided.skips] == [
        ("norm", "has tensors that batch_norm reads directly instead of calling the layer; call the layer there, or leave it")
    ]
    result = swapped(model)
    assert error(model, result, X) <= 1e-6
    assert {"norm.running_mean", "norm.running_var", "norm.weight"} <= result.state_dict().keys()


def test_two_calls_with_the_same_tensors_are_one_layer() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        n, y = s.norm, s.conv(x)
        for _ in range(2):
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias).relu()
        return F.batch_norm(y, n.running_mean, n.running_var, eps=0.5)

    model = fx.symbolic_trace(net(run=run))
    result = swapped(model)
    targets = [n.target for n in result.graph.nodes if n.op == "call_module" and n.target != "conv"]
    assert targets == ["batch_norm", "batch_norm", "batch_norm_2"]
    assert [(s.name, s.calls) for s in normswap.plan(model).swaps] == [("batch_norm", 2), ("batch_norm_2", 1)]
    assert error(model, result, X) <= 1e-6


def test_batch_statistics_that_the_graph_reads() -> None:
    root, graph = nn.Module(), fx.Graph()
    root.norm = nn.BatchNorm2d(4).eval()
    x = graph.placeholder("x")
    tensors = [graph.get_attr(f"norm.{name}") for name in ("weight", "bias", "running_mean", "running_var")]
    call = graph.call_function(aten.native_batch_norm.default, (x, *tensors, False, 0.1, 1e-5))
    first, second = (graph.call_function(operator.getitem, (call, i)) for i in (0, 1))
    graph.output((first, second))
    (skip,) = normswap.plan(fx.GraphModule(root, graph)).skips
    assert skip.reason == "returns batch statistics that the graph reads; leave it, or change the code that reads them"


@pytest.mark.parametrize("training", [True, False])
def test_a_flag_that_was_baked_in(training: bool) -> None:
    """`training=self.training` is a constant of the trace."""
    model = net(run=lambda s, x: F.batch_norm(s.conv(x), s.norm.running_mean, s.norm.running_var, training=s.training)).train(training)
    decided = normswap.plan(fx.symbolic_trace(model))
    assert (len(decided.swaps), len(decided.skips)) == ((0, 1) if training else (1, 0))


def test_what_is_unused_and_what_was_set_stays() -> None:
    """GraphModule's own copy forgets attributes that somebody set."""
    model = fx.symbolic_trace(net())
    model.spare, model.extra = nn.BatchNorm2d(3), nn.Parameter(torch.ones(2))
    model.labels = {"first": ["cat", model.conv]}
    result = swapped(model)
    assert isinstance(result.spare, BatchlessNorm)
    assert result.labels["first"][1] is result.conv
    mine, theirs = ([k for k in m.state_dict() if k.partition(".")[0] in ("conv", "extra")] for m in (result, model))
    assert mine == theirs


def test_names_that_are_taken() -> None:
    model = traced(FORMS["mixed"])
    model.batch_norm = nn.Identity()
    result = swapped(model)
    assert isinstance(result.batch_norm_1, BatchlessNorm)
    assert error(model, result, X) <= 1e-6


def test_convert_twice() -> None:
    model = traced(FORMS["mixed"])
    once = normswap.convert(model, X)
    twice = normswap.convert(once.model, X)
    assert (twice.plan.swaps, twice.plan.skips) == ((), ())
    assert list(twice.model.state_dict()) == list(once.model.state_dict())


def test_metadata_is_kept() -> None:
    model = traced(FORMS["mixed"])
    node = next(n for n in model.graph.nodes if n.name == "batch_norm")
    node.meta["mine"] = 7
    result = swapped(model)
    assert next(n for n in result.graph.nodes if n.target == "batch_norm").meta["mine"] == 7


def test_a_norm_inside_a_layer_that_the_graph_calls_as_one() -> None:
    """Its calls cannot be told, which is not the same as none."""

    class Whole(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Sequential(nn.BatchNorm2d(5))).eval()
    graph_module = fx.GraphModule(model, Whole().trace(model))
    (site,) = normswap.plan(graph_module).swaps
    assert (site.name, site.calls) == ("1.0", None)
    assert error(graph_module, swapped(graph_module), X) <= 1e-6


def test_defaults_are_filled_in() -> None:
    """Exporters drop trailing arguments that equal them."""
    for function in (aten.layer_norm.default, torch.layer_norm, F.layer_norm):
        assert functional.bind(function, (None, [3]), {"weight": 7})["eps"] == 1e-5
        assert functional.bind(function, (None, [3]), {"weight": 7})["weight"] == 7
