"""Private training: what Opacus computes for a converted model, against a loop over the samples."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normswap
from fixtures.nets import randomise
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training.loss import layers_of
from normswap.training.opacus import per_sample_gradients

# Said by Opacus of every model: its hook on the first layer, and that its noise is not cryptographic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
]

X = torch.randn(8, 2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    """In-place activations after norms, and a residual connection that adds in place. `norm` is called twice with `twice`."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, *, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(inplace=True)
        self.last = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        if self.twice:
            x = self.norm(x)
        out = self.last(torch.tanh(x))
        out += x
        return self.head(self.relu(out).mean((2, 3)))  # type: ignore[no-any-return]


def norm_act(features: int) -> nn.Module:
    from timm.layers.norm_act import BatchNormAct2d

    return BatchNormAct2d(features, act_layer=nn.SiLU)


@functools.cache
def _converted(stats: str, norm: Any, twice: bool, std: Any) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(Residual(norm, twice=twice), 3).double().eval()
    return normswap.convert(model, X[:2], stats=stats, std=std, coupling="none").model.train()


def converted(stats: str = "natural", norm: Any = nn.BatchNorm2d, twice: bool = False, std: Any = "log") -> Any:
    return copy.deepcopy(_converted(stats, norm, twice, std))


def assert_per_sample_gradients(model: nn.Module, private: nn.Module, x: Tensor, y: Tensor) -> None:
    """Every parameter of `private` that is trained has those of a loop over the samples with `model`."""
    cross_entropy(GradSampleModule(private)(x), y).backward()
    for i in range(len(x)):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for (name, expected), actual in zip(model.named_parameters(), private.parameters(), strict=True):
            if not expected.requires_grad:
                assert getattr(actual, "grad_sample", None) is None
                continue
            assert expected.grad is not None, name
            assert expected.grad.abs().max() > 0, name
            scale = float(expected.grad.abs().max())
            torch.testing.assert_close(actual.grad_sample[i], expected.grad, rtol=0, atol=1e-12 * scale, msg=lambda m, name=name: name + m)  # type: ignore[attr-defined]


# --- per-sample gradients -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole", "norms"), [(False, 10), pytest.param(True, 20, marks=pytest.mark.slow)])
def test_a_converted_resnet_is_valid_and_its_per_sample_gradients_are_those_of_a_loop(whole: bool, norms: int) -> None:
    """torchvision's resnet18, in-place activations and additions and all, at its own width (slow), or its first half."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    original = resnet18(num_classes=3)
    if not whole:
        original.layer3, original.layer4, original.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
    randomise(original, 4).double().eval()
    with torch.no_grad():
        for module in original.modules():  # weights of both signs and means off 0 would explode over 20 layers
            if isinstance(module, nn.BatchNorm2d):
                module.weight.div_(4)  # type: ignore[arg-type]
    assert not ModuleValidator.is_valid(original)
    x, y = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2])
    model = normswap.convert(original, x, coupling="none").model.train()
    private = normswap.for_opacus(model)
    assert ModuleValidator.validate(private, strict=True) == []
    assert len(layers_of(private)) == norms
    torch.testing.assert_close(private(x), model(x), rtol=0, atol=0)
    # what it starts from is public: the statistics of the original
    torch.testing.assert_close(private.bn1.mean.detach(), original.bn1.running_mean)  # type: ignore[union-attr]
    assert_per_sample_gradients(model, private, x, y)


@pytest.mark.parametrize("stats", ["natural", "raw"])
@pytest.mark.parametrize(
    "options",
    [{}, {"std": "abs"}, {"std": "inv"}, {"twice": True}, {"norm": norm_act}, {"norm": nn.SyncBatchNorm}],
    ids=lambda value: (
        value if isinstance(value, str) else " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in value.items()) or "default"
    ),
)
def test_per_sample_gradients(stats: str, options: dict[str, Any]) -> None:
    model = converted(stats, **options)
    assert_per_sample_gradients(model, normswap.for_opacus(model), X, Y)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BatchlessNorm(3, aux="auto"), (5, 3)),
        (BatchlessNorm(3, aux="auto", affine=False), (5, 3, 4)),
        (BatchlessNorm(4, aux="auto", channel_axis=-1, reduction="sum", stats="raw"), (5, 3, 2, 4)),
        (BatchlessNorm((3, 4), aux="auto", channel_axis=(1, 3), shared_axes=(3,), stats="raw"), (5, 3, 2, 4)),
        (BatchlessNorm((3, 4), aux="auto", channel_axis=(1, 2), shared_axes=(1, 2)), (5, 3, 4)),
        (BatchlessNorm(3, aux="auto"), (1, 3, 4)),
    ],
    ids=str,
)
def test_layers_of_every_form(layer: BatchlessNorm, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    x = torch.randn(shape, dtype=torch.float64)
    by_output = torch.randn(shape, dtype=torch.float64)
    found = per_sample_gradients(layer, x, by_output)
    assert set(found) == set(layer.parameters())
    for i in range(len(x)):
        layer.zero_grad()
        (layer(x[i : i + 1]) * by_output[i : i + 1]).sum().backward()
        for parameter, actual in found.items():
            torch.testing.assert_close(actual[i], parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stats", ["natural", "raw"])
def test_they_are_those_of_torch_func(stats: str) -> None:
    """Opacus' other way, which knows nothing of the formulas."""
    ours, theirs = (normswap.for_opacus(converted(stats)) for _ in range(2))
    for private, functorch in ((ours, False), (theirs, True)):
        cross_entropy(GradSampleModule(private, force_functorch=functorch)(X), Y).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad_sample, b.grad_sample, rtol=1e-11, atol=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("frozen", [["norm.mean", "norm.log_std"], ["norm.weight", "last.mean"], ["conv.weight", "conv.bias"]])
def test_frozen_parameters(frozen: list[str]) -> None:
    model = converted()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert_per_sample_gradients(model, normswap.for_opacus(model), X, Y)


@pytest.mark.parametrize("aux", ["explicit", "none"])
def test_frozen_statistics_need_no_term(aux: str) -> None:
    model = converted()
    for layer in layers_of(model).values():
        layer.aux = aux  # type: ignore[assignment]
        layer.mean.requires_grad_(False)
        layer.log_std.requires_grad_(False)  # type: ignore[union-attr,operator]
    assert_per_sample_gradients(model, normswap.for_opacus(model), X, Y)


def test_opacus_does_not_take_the_model_as_it_is() -> None:
    """Were this to pass, for_opacus would have no reason to be."""
    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(converted())


# --- the copy -----------------------------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_is() -> None:
    model = converted().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    private = normswap.for_opacus(model)
    assert private is not model
    assert (private.training, model.training) == (True, False)
    assert type(model.norm) is BatchlessNorm
    assert (private.relu.inplace, model.relu.inplace) == (False, True)
    assert isinstance(private.norm, BatchlessNorm)
    assert len(list(model.norm.buffers())) == 3
    with torch.no_grad():
        for parameter in private.parameters():
            parameter.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_state_dict_goes_back() -> None:
    model = converted().eval()
    private = normswap.for_opacus(model)
    with torch.no_grad():
        for parameter in private.parameters():
            parameter.add_(0.1)
    assert not torch.equal(model(X), private.eval()(X))
    model.load_state_dict(GradSampleModule(private).to_standard_module().state_dict())
    assert torch.equal(model(X), private(X))


# --- PrivacyEngine ------------------------------------------------------------------------------------------------------------------------


def engine(
    model: nn.Module, batch: int = 4, *, noise: float = 0.0, clip: float = 1e9, seed: int = 0, lr: float = 0.1, **options: Any
) -> Any:
    private = normswap.for_opacus(model)
    optimizer = torch.optim.SGD(normswap.param_groups(private, lr=lr), momentum=0.9)
    loader = DataLoader(TensorDataset(X, Y), batch_size=batch)
    generator = torch.Generator().manual_seed(seed)
    return PrivacyEngine().make_private(
        module=private,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=clip,
        noise_generator=generator,
        **options,
    )


def epochs(parts: Any, n: int = 2) -> dict[str, Tensor]:
    model, optimizer, loader = parts
    for _ in range(n):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return {n: t.clone() for n, t in model._module.state_dict().items()}


def plainly(model: nn.Module, batch: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1), momentum=0.9)
    for _ in range(2):
        for x, y in zip(X.split(batch), Y.split(batch), strict=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return dict(model.state_dict())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("stats", ["natural", "raw"])
def test_without_noise_and_clipping_it_is_plain_training(stats: str) -> None:
    """The statistics too: BatchNorm's running averages. And nothing is warned of, though Opacus replaces every gradient."""
    assert_same(epochs(engine(converted(stats), poisson_sampling=False)), plainly(converted(stats), 4))


def test_a_batch_in_virtual_steps_is_one_batch() -> None:
    """Gradients are zeroed in place between the parts, and their number must not be taken for passes without `attach`."""
    model, optimizer, loader = engine(converted(), 8, poisson_sampling=False)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        state = epochs((model, optimizer, parts))
    assert_same(state, plainly(converted(), 8))


@pytest.mark.parametrize("stats", ["natural", "raw"])
def test_noise_reaches_the_statistics(stats: str) -> None:
    """Or epsilon would be wrong. The same seed gives the same, another one something else, in every parameter."""
    first, again, other = (epochs(engine(converted(stats), noise=1.0, clip=1.0, seed=s, poisson_sampling=False)) for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    trained = [n for n in first if "source" not in n]
    assert len(trained) == 12
    assert all(bool((first[n] != other[n]).all()) for n in trained)


def test_one_sample_moves_everything_by_the_clipping_norm_at_most() -> None:
    """Sensitivity, measured: two batches that differ in one sample, in the gradients that the optimizer steps with."""

    def gradients(x: Tensor) -> Tensor:
        model, optimizer, _ = engine(converted(), 8, clip=0.5, poisson_sampling=False)
        cross_entropy(model(x), Y).backward()
        optimizer.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()]) * 8

    changed = X.clone()
    changed[3] = 1e3
    moved = float((gradients(X) - gradients(changed)).norm())
    assert 0.5 < moved <= 2 * 0.5 * (1 + 1e-9)


def test_poisson_batches_may_be_empty() -> None:
    parts = engine(converted(), 1, noise=1.0, clip=1.0)
    sizes = []
    parts[0]._module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    state = epochs(parts, 3)
    assert 0 in sizes
    assert max(sizes) > 0
    assert all(bool(t.isfinite().all()) for t in state.values())


# --- what it refuses ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ["explicit", "none"])
def test_statistics_that_would_get_noise_and_no_gradient(aux: str) -> None:
    model = converted()
    model.last.aux = aux
    with pytest.raises(UsageError, match=rf"statistics of last are trained, with aux='{aux}': they would get noise") as error:
        normswap.for_opacus(model)
    assert "requires_grad_(False)" in str(error.value)


def test_channels_where_opacus_expects_samples() -> None:
    with pytest.raises(UsageError, match="channels of the model lie on axis 0, where Opacus expects the samples"):
        normswap.for_opacus(BatchlessNorm(3, channel_axis=0, aux="auto"))


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(UsageError, match="private training needs Opacus, which is not installed") as error:
        normswap.for_opacus(converted())
    assert "normswap[private]" in str(error.value)


def test_masks() -> None:
    private = normswap.for_opacus(converted())
    with (
        normswap.masked(private, torch.ones(8, dtype=torch.bool)),
        pytest.raises(UsageError, match=r"without the mask of normswap\.masked"),
    ):
        private(X)
    private(X)


def test_a_model_that_was_not_converted() -> None:
    with pytest.raises(UsageError, match="Residual has no BatchlessNorm layer"):
        normswap.for_opacus(Residual())
