"""The auxiliary loss where the model is a graph: a converted GraphModule, an exported program, a program exported in train mode."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

import normswap
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.export_operator import inject_operator

X = torch.randn(6, 2, 7, 5, generator=torch.Generator().manual_seed(1))


class Source(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.2), nn.Linear(4, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu_(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Functional(Source):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        y = F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.2, n.eps)
        return self.head(F.relu_(y).mean((2, 3)))  # type: ignore[no-any-return]


def program(model: nn.Module) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        return torch.export.export(model, (X[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))


def grads(model: nn.Module) -> list[Tensor]:
    """Of every parameter, in an order that does not depend on names: by shape and content of the parameter."""
    model.zero_grad()
    model(X).square().mean().backward()
    found = [(p.detach().flatten().tolist(), p.grad) for p in model.parameters()]
    assert all(g is not None for _, g in found)
    return [g for _, g in sorted(found, key=lambda pair: pair[0])]  # type: ignore[misc]


def plain(**options: Any) -> nn.Module:
    return normswap.convert(Source().eval(), X[:2], coupling="none", **options).model


def expected(**options: Any) -> list[Tensor]:
    return grads(plain(**options).train())


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("source", [Source, Functional])
def test_a_converted_graph_module(source: type[nn.Module]) -> None:
    traced = torch.fx.symbolic_trace(source().eval())
    model = normswap.convert(traced, X[:2], coupling="none").model.train()
    assert isinstance(model, torch.fx.GraphModule)
    assert same(grads(model), expected())
    model.eval().zero_grad()
    model(X).sum().backward()
    assert all(m.mean.grad is None for m in model.modules() if isinstance(m, BatchlessNorm))


def test_a_functional_norm_trains_in_the_mode_of_its_graph() -> None:
    traced = torch.fx.symbolic_trace(Functional().eval())
    traced.train()
    assert same(grads(normswap.convert(traced, X[:2], coupling="none").model), expected())


def test_explicit_in_a_graph_module() -> None:
    model = normswap.convert(torch.fx.symbolic_trace(Source().eval()), X[:2], aux="explicit", coupling="none").model.train()
    (model(X).square().mean() + normswap.aux_loss(model)).backward()
    found = [g for _, g in sorted(((p.detach().flatten().tolist(), p.grad) for p in model.parameters()), key=lambda pair: pair[0])]
    assert same(found, expected())  # type: ignore[arg-type]


def test_a_converted_model_that_is_traced_in_train_mode() -> None:
    model = plain().train()
    traced = torch.fx.symbolic_trace(model)
    assert same(grads(traced), expected())


def test_a_converted_program_has_the_term_in_its_graph() -> None:
    conversion = normswap.convert(program(Source().eval()))
    assert sum(node.target is inject_operator() for node in conversion.model.graph.nodes) == 1
    assert same(grads(conversion.model.module()), expected())


def test_the_term_survives_decompositions_and_files(tmp_path: Any) -> None:
    converted = normswap.convert(program(Source().eval())).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        torch.export.save(converted, tmp_path / "it.pt2")
        others = converted.run_decompositions({}), torch.export.load(tmp_path / "it.pt2")
    for other in others:
        assert same(grads(other.module()), expected())


def test_none_leaves_the_graph_of_a_program_alone() -> None:
    converted = normswap.convert(program(Source().eval()), aux="none").model
    assert not any(node.target is inject_operator() for node in converted.graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_in_train_mode(strict: bool) -> None:
    """torch.export runs an autograd.Function and forgets its backward: the operator is there for this."""
    model = plain().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (X,), strict=strict)
    assert same(grads(exported.module()), expected())


def test_exported_in_eval_mode_there_is_nothing_of_it() -> None:
    targets = [[str(n.target) for n in program(m).graph.nodes] for m in (plain(), plain(aux="none"))]
    assert targets[0] == targets[1]


def test_explicit_terms_are_no_part_of_a_program() -> None:
    with pytest.raises(Exception, match="keeps the term of each call in train mode, which a traced graph cannot"):
        program(plain(aux="explicit").train())
    with pytest.raises(UsageError, match='an ExportedProgram cannot have aux="explicit"'):
        normswap.convert(program(Source().eval()), aux="explicit")


def test_onnx_of_a_program_has_no_term(tmp_path: Any) -> None:
    exports = [
        normswap.export_onnx(normswap.convert(program(Source().eval()), aux=aux), path=tmp_path / f"{aux}.onnx")  # type: ignore[arg-type]
        for aux in ("auto", "none")
    ]
    assert exports[0].nodes == exports[1].nodes


@pytest.mark.parametrize("grouped", [True, False])
def test_the_statistics_of_a_program_are_running_averages(grouped: bool) -> None:
    """Step for step those of the converted module, with an optimizer that would spoil them."""
    module = plain().train()
    graph = normswap.convert(program(Source().eval())).model.module()
    for model in (module, graph):
        given = normswap.param_groups(model, lr=1e-2) if grouped else model.parameters()
        optimizer = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    norm = module.norm
    for name, tensor in (("mean", norm.mean), ("log_std", norm.log_std)):
        (found,) = (p for n, p in graph.named_parameters() if n.endswith(name))
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, getattr(plain().norm, name), atol=1e-3)


def test_groups_of_a_program() -> None:
    graph = normswap.convert(program(Source().eval())).model.module()
    groups = normswap.param_groups(graph, lr=1e-2, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(1e-2, 0.1, 2), (1e-2, 0.0, 4), (0.2, 0.0, 2)]
    with pytest.raises(UsageError, match="no BatchlessNorm layer"):
        normswap.attach(graph, accumulate=2)


def test_accumulation_in_a_program_is_noticed() -> None:
    graph = normswap.convert(program(Source().eval())).model.module()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.0)
    for part in X.chunk(2):
        (graph(part).square().mean() / 2).backward()
    with pytest.warns(UserWarning, match="more backward passes have reached the statistics"):
        optimizer.step()


def test_a_copy_of_a_program_module_steps_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = copy.deepcopy(normswap.convert(program(Source().eval())).model.module())
    before = {n: p.detach().clone() for n, p in graph.named_parameters() if n.endswith("log_std")}
    graph(X).sum().backward()
    torch.optim.SGD(graph.parameters(), lr=0.0, momentum=0.9).step()
    assert all(not torch.equal(dict(graph.named_parameters())[n], p) for n, p in before.items())


def test_by_default_a_program_is_plain_and_says_so() -> None:
    pairs = normswap.convert(program(Source().eval())).pairs
    assert [pair.reason for pair in pairs] == ["is in the graph of an exported program, which keeps no state between steps"]
    assert normswap.convert(program(Source().eval()), coupling="none").pairs == ()


def test_by_default_a_module_in_train_mode_is_not_traced() -> None:
    with pytest.raises(UsageError, match=r'cannot be traced in train mode.*\nhint: trace in eval mode, or convert with coupling="none"'):
        torch.fx.symbolic_trace(normswap.convert(Source().eval(), X[:2]).model.train())
