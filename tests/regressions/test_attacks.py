"""What an attacker found: each of these was once wrong, and none of them is a peer's bug."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.errors import SwapError, UsageError
from normswap.parity.result import ParityError

IMAGE = torch.randn(3, 4, 9, 7)


class Closure(nn.Module):
    """copy.deepcopy does not copy functions: the copy's lambda goes on calling the original's layers."""

    def __init__(self, *, captures_self: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        bn = self.bn
        self.f = (lambda x: self.bn(self.conv(x))) if captures_self else (lambda x: bn(x))
        self.captures_self = captures_self

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x if self.captures_self else self.conv(x)).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("captures_self", [True, False])
def test_a_norm_that_only_a_closure_reaches_is_an_error(captures_self: bool) -> None:
    model = randomise(Closure(captures_self=captures_self), 0).eval()
    with pytest.raises(ParityError, match=r"it still uses (conv|bn)\.\w+ of the original, which a function .* holds") as error:
        normswap.convert(model, IMAGE)
    assert error.value.parity.failure is not None


def test_a_closure_without_the_model_in_it_is_none() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)), 0).eval()
    model.scale = lambda x: x * 2
    assert normswap.convert(model, IMAGE).parity


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.linear(x).transpose(1, 2))
        return y.view(y.shape[0], -1)  # type: ignore[no-any-return]


def test_the_output_is_laid_out_as_batch_norms_is() -> None:
    """BatchNorm of a transposed tensor is contiguous, and code relies on it."""
    assert normswap.convert(randomise(Transposed(), 0).eval(), torch.randn(3, 8, 6)).parity
    layer, source = normswap.BatchlessNorm(4), nn.BatchNorm2d(4).eval()
    for x in (
        IMAGE,
        IMAGE.contiguous(memory_format=torch.channels_last),
        IMAGE.transpose(2, 3),
        IMAGE[:, :, ::2],
        IMAGE.permute(0, 1, 3, 2),
    ):
        assert layer(x).stride() == source(x).stride()


def test_the_argument_has_batch_norms_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=x)  # type: ignore[no-any-return]

    assert normswap.convert(randomise(ByName(), 0).eval(), IMAGE).parity


def test_a_norm_inside_vmap() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: self.bn(row))(x)

    # The lambda is made in forward, so it holds the copy's norm.
    assert normswap.convert(randomise(Mapped(), 0).eval(), torch.randn(3, 2, 5)).parity


def test_a_sparse_output_is_compared() -> None:
    class Sparse(nn.Module):
        def __init__(self, factor: float = 1.0) -> None:
            super().__init__()
            self.bn, self.factor = nn.BatchNorm1d(5), factor

        def forward(self, x: Tensor) -> Tensor:
            return (self.bn(x) * self.factor).to_sparse()  # type: ignore[no-any-return]

    x = torch.randn(3, 5)
    assert normswap.convert(randomise(Sparse(), 0).eval(), x).parity
    assert not normswap.verify(Sparse().eval(), Sparse(1.001).eval(), x)


class Opaque:
    """Neither a container nor a dataclass."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.me = value, self


def test_tensors_in_any_object_are_compared() -> None:
    class Returns(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"aux": x, "main": Opaque(x * self.factor), "law": torch.distributions.Normal(x * self.factor, 1.0)}

    same = normswap.verify(Returns(1.0), Returns(1.0), IMAGE)
    assert same
    assert "output['main'].value" in {d.name for d in same.outputs}
    assert not normswap.verify(Returns(1.0), Returns(2.0), IMAGE)


def test_hooks_are_not_handed_what_tracing_uses() -> None:
    model = randomise(nn.Sequential(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)), nn.ReLU()), 0).eval()
    seen: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert len(normswap.plan(model, IMAGE).swaps) == 1
    assert seen == []


@pytest.mark.parametrize("name", ["LayerNormalization", "BatchNormalization", "GRN", "ABN", "FRN", "CrossMapLRN2d", "MyNorm"])
def test_what_calls_itself_a_norm_is_listed(name: str) -> None:
    cls = type(name, (nn.Module,), {"forward": lambda self, x: x})
    assert [s.name for s in normswap.plan(nn.Sequential(nn.Linear(3, 5), cls())).skips] == ["1"]


@pytest.mark.parametrize("name", ["Normalize", "NormalizeImages", "Learned", "GNNLayer", "Born"])
def test_what_does_not_is_not(name: str) -> None:
    cls = type(name, (nn.Module,), {"forward": lambda self, x: x})
    assert normswap.plan(nn.Sequential(nn.Linear(3, 5), cls())).skips == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_that_rounding_does_not_decide_are_equal_or_wrong(dtype: torch.dtype) -> None:
    """The limit of half precision would let the ids of 2000 classes be off by one."""

    class Ids(nn.Module):
        def __init__(self, offset: int) -> None:
            super().__init__()
            self.bn, self.offset = nn.BatchNorm1d(2003), offset

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x).argmax(-1) + self.offset  # type: ignore[no-any-return]

    x = torch.zeros(3, 2003)
    x[torch.arange(3), torch.tensor([1997, 2000, 1990])] = 9
    assert normswap.verify(Ids(0).to(dtype), Ids(0).to(dtype), x.to(dtype))
    assert not normswap.verify(Ids(0).to(dtype), Ids(1).to(dtype), x.to(dtype))


def test_a_pruned_model() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)), 0).eval()
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    conversion = normswap.convert(model, IMAGE)
    assert len(conversion.plan.swaps) == 1
    assert torch.nn.utils.prune.is_pruned(conversion.model)


def test_a_part_that_copies_itself_by_sharing_is_an_error() -> None:
    class Shares(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Shares:
            return self

    model = randomise(nn.Sequential(Shares(3, 5), nn.BatchNorm1d(5)), 0).eval()
    with pytest.raises(SwapError, match=r"^0\.weight of the copy is not a copy: it shares memory with 0\.weight of the original"):
        normswap.convert(model, torch.randn(2, 3))


@pytest.mark.parametrize("what", [None, "model.pt", {}, nn.BatchNorm2d])
def test_what_is_no_model_is_a_usage_error(what: Any) -> None:
    with pytest.raises(UsageError, match=r"^a model is a torch\.nn\.Module or an ExportedProgram, not (NoneType|str|dict|type)"):
        normswap.convert(what)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_an_error() -> None:
    """torch copies it into tensors that are not leaves: training the copy would train the original."""
    model = randomise(nn.Sequential(torch.jit.trace(nn.Linear(3, 5), torch.randn(2, 3)), nn.BatchNorm1d(5)), 0).eval()
    with pytest.raises(SwapError, match=r"of the copy is not a leaf.*\nhint: convert the model before a part of it is scripted"):
        normswap.convert(model, torch.randn(2, 3))


def test_an_exported_program_cannot_be_reverted() -> None:
    program: Any = torch.export.export(nn.Linear(3, 5), (torch.randn(2, 3),))
    with pytest.raises(SwapError, match=r"^a ExportedProgram cannot be reverted"):
        normswap.revert(program)


def test_each_layer_may_store_its_std_in_its_own_form(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return randomise(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6)), 0).eval()

    first = normswap.convert(factory(), IMAGE, include=["1"], std="log").model
    both = normswap.convert(first, IMAGE, std="abs").model
    loaded = normswap.load(normswap.save(both, tmp_path / "both"), factory)
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(IMAGE), both(IMAGE))


def test_a_converted_module_can_be_read_again(tmp_path: Path) -> None:
    """The pickle that `convert` writes passes the review of pickles."""
    model = randomise(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)), 0).eval()
    torch.save(model, tmp_path / "model.pt")
    _, directory = convert_to_directory(str(tmp_path / "model.pt"), tmp_path / "out", ConvertOptions(inputs=["2x4x9x7"], onnx=False))
    assert normswap.verify(tmp_path / "model.pt", directory)
    reverted = normswap.revert(normswap.load(directory))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in reverted.state_dict().items())
