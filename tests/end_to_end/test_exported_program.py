"""An ExportedProgram comes out as an ExportedProgram, with the axes open that were open."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from surgery import IMAGE, error, net, swapped
from torch import nn
from torch.export import Dim, ExportedProgram

import normswap
from fixtures.nets import case

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))


def export(model: nn.Module, *args: Any, **options: Any) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        return torch.export.export(model, args, **options)


def test_it_stays_a_program() -> None:
    program = export(net(nn.BatchNorm2d(5, eps=1e-3)), X)
    before = {k: v.clone() for k, v in program.state_dict.items()}
    conversion = normswap.convert(program)
    assert type(conversion.model) is ExportedProgram
    assert conversion.parity.passed
    assert conversion.inputs.origin == "program"
    assert not any("batch_norm" in str(n.target) for n in conversion.model.graph.nodes if n.op == "call_function")
    with torch.no_grad():
        torch.testing.assert_close(conversion.model.module()(X), program.module()(X))
    assert before.keys() == program.state_dict.keys()
    assert all(torch.equal(before[k], program.state_dict[k]) for k in before)


def test_names_and_producer() -> None:
    (site,) = normswap.plan(export(net(), X)).swaps
    assert (site.name, site.kind, site.calls) == ("norm.batch_norm", "batch_norm", 1)


@pytest.mark.parametrize("given", ["positional", "keyword"])
def test_a_dynamic_batch_stays_dynamic(given: str) -> None:
    arguments: dict[str, Any] = {"args": (X,)} if given == "positional" else {"args": (), "kwargs": {"x": X}}
    program = torch.export.export(net(), **arguments, dynamic_shapes={"x": {0: Dim("batch", min=1)}})
    result = normswap.convert(program).model
    for batch in (2, 6):
        x = torch.randn(batch, *IMAGE[1:])
        with torch.no_grad():
            mine, theirs = (p.module()(x) if given == "positional" else p.module()(x=x) for p in (result, program))
        torch.testing.assert_close(mine, theirs)


def test_a_fixed_batch_stays_fixed() -> None:
    result = normswap.convert(export(net(), X)).model
    with pytest.raises(AssertionError, match="Guard failed"):
        result.module()(torch.randn(1, *IMAGE[1:]))


def test_nested_inputs_with_one_dynamic() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, pair: tuple[torch.Tensor, torch.Tensor], factor: float) -> torch.Tensor:
            return self.norm(pair[0]) * factor + pair[1]

    program = export(Nested().eval(), (X, torch.ones(1)), 2.0, dynamic_shapes=(({0: Dim("batch")}, {}), None))
    result = normswap.convert(program).model
    x = torch.randn(5, *IMAGE[1:])
    with torch.no_grad():
        torch.testing.assert_close(result.module()((x, torch.ones(1)), 2.0), program.module()((x, torch.ones(1)), 2.0))


def test_decomposed_programs() -> None:
    for table in ({}, None):
        program = export(net(nn.BatchNorm2d(5, eps=1e-3)), X)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions(table)
        assert any("no_training" in str(n.target) for n in program.graph.nodes)
        (site,) = normswap.plan(program).swaps
        assert site.kind == "batch_norm"
        assert normswap.convert(program).parity.passed


def test_traced_in_train_mode_is_skipped() -> None:
    (skip,) = normswap.plan(export(net().train(), X)).skips
    assert skip.reason == "normalizes by each batch's own statistics (training=True was traced); trace the model in eval mode"


def test_without_statistics_is_skipped() -> None:
    (skip,) = normswap.plan(export(case("no_running_stats").make(), X)).skips
    assert skip.reason.startswith("has no running statistics to start from")


def test_a_shared_norm_is_one_layer_again() -> None:
    (x,) = case("aliased_same_parent").inputs()
    program = export(case("aliased_same_parent").make(), x)
    decided = normswap.plan(program)
    assert [s.calls for s in decided.swaps] == [2]
    result = normswap.convert(program).model
    assert sum(key.endswith(".log_std") for key in result.state_dict) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_arity_follows_the_flags(enabled: bool) -> None:
    with torch.backends.cudnn.flags(enabled=enabled):
        program = export(net(), X)
    assert len(normswap.plan(program).swaps) == 1
    assert error(program.module(), swapped(program.module(), X), X) <= 1e-6


def test_the_module_of_a_program() -> None:
    """It refuses train() and eval(), and so does what it becomes."""
    module = export(net(), X).module()
    result = normswap.convert(module, X).model
    for refuses in (module, result):
        with pytest.raises(NotImplementedError):
            refuses.eval()
    assert "norm.running_mean" not in result.state_dict()
    assert "norm.num_batches_tracked" not in result.state_dict()


def test_convert_twice() -> None:
    once = normswap.convert(export(net(), X)).model
    twice = normswap.convert(once)
    assert (twice.plan.swaps, twice.plan.skips) == ((), ())
    assert list(twice.model.state_dict) == list(once.state_dict)
