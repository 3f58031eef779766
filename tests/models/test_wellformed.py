"""Names and nesting that nothing can work on are told before code is made of them; from Python, and from a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from fixtures.hostile import NAMES
from fixtures.nets import randomise
from normswap.errors import LoadError, SwapError
from normswap.files.load import load
from normswap.models import wellformed

X = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(3))


def net(**extra: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model._modules.update(extra)  # add_module would look at the name
    return randomise(model, 3).eval()  # type: ignore[return-value]


GOOD = ["0", "layer1", "layer-1", "_hidden", "Schicht_ä", "层", "x" * 500]


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are_usual_are_kept(name: str, tmp_path: Path) -> None:
    model = net(**{name: nn.BatchNorm2d(5)})
    assert name in {swap.name for swap in normswap.plan(model).swaps}
    torch.save(model, tmp_path / "m.pt")
    assert name in dict(load(str(tmp_path / "m.pt")).model.named_children())  # type: ignore[union-attr]


def test_a_dot_in_the_name_of_a_layer_is_listed_from_python_and_refused_in_a_file(tmp_path: Path) -> None:
    model = net(**{"a.b": nn.BatchNorm2d(5)})
    assert "a.b" in {skip.name for skip in normswap.plan(model, X).skips}
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"^m\.pt has a layer named 'a\.b'"):
        load(str(tmp_path / "m.pt"))


@pytest.mark.parametrize("what", [what for what in NAMES if what != "a dot"])
def test_a_name_of_a_layer_that_code_cannot_hold(what: str, tmp_path: Path) -> None:
    model = net(**{NAMES[what]: nn.Identity()})
    for function in (normswap.plan, normswap.inspect, normswap.convert):
        with pytest.raises(SwapError, match=r"^the model has a layer named ") as caught:
            function(model, X)
        assert caught.value.hint == "names of layers, parameters and buffers have letters, digits, _ and - only"
        assert caught.value.message.isprintable()
    with pytest.raises(SwapError, match="has a layer named "):
        normswap.export_onnx(model, X, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"^m\.pt has a layer named ") as refused:
        load(str(tmp_path / "m.pt"))
    assert refused.value.message.isprintable()


@pytest.mark.parametrize("kind", ["parameter", "buffer", "tensor"])
def test_a_name_of_a_tensor_that_code_cannot_hold(kind: str) -> None:
    model, name = net(), NAMES["a quotation mark"]
    tensor = torch.ones(5)
    held = {"parameter": model[0]._parameters, "buffer": model[0]._buffers, "tensor": model[0].__dict__}[kind]
    held[name] = nn.Parameter(tensor) if kind == "parameter" else tensor
    with pytest.raises(SwapError, match=f"^the model has a {kind} named 'a\"\\), .*, in 0\nhint: names of layers"):
        normswap.convert(model, X)


def test_attributes_of_other_types_may_have_any_name_in_python(tmp_path: Path) -> None:
    """Nothing makes code of them. torch.save writes them, and a file has less freedom than Python."""
    model = net()
    model.__dict__["a note"] = "text"
    assert normswap.convert(model, X).parity
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"^m\.pt has an attribute named 'a note'"):
        load(str(tmp_path / "m.pt"))


def test_names_of_a_program() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        program = torch.export.export(net(), (X,))
    assert normswap.plan(program).swaps
    program.state_dict['0.a"); print("'] = torch.ones(1)
    with pytest.raises(SwapError, match=r"^the program has a tensor named '0\.a"):
        normswap.plan(program)


def inside_itself() -> nn.Module:
    model = net()
    model.add_module("inner", nn.Sequential(model))
    return model


def deep(levels: int) -> nn.Module:
    model: nn.Module = nn.BatchNorm2d(3)
    for _ in range(levels - 1):
        model = nn.Sequential(model)
    return model


def shared(levels: int) -> nn.Module:
    model: nn.Module = nn.BatchNorm2d(3)
    for _ in range(levels):
        model = nn.ModuleDict({"a": model, "b": model})
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (inside_itself, "has a Sequential that contains itself"),
        (lambda: deep(101), "has layers inside layers 101 deep; expected 100 at most"),
        (
            lambda: shared(40),
            "has layers under 2,199,023,255,551 names, as layers are shared inside shared layers; expected 100,000 at most",
        ),
    ],
)
def test_nesting_without_end(make: Callable[[], nn.Module], text: str, tmp_path: Path) -> None:
    model = make()
    with pytest.raises(SwapError, match=f"^the model {text}$"):
        normswap.plan(model, X)
    stream = io.BytesIO()
    torch.save(model, stream)
    (tmp_path / "m.pt").write_bytes(stream.getvalue())
    with pytest.raises(LoadError, match=rf"^m\.pt {text}"):
        load(str(tmp_path / "m.pt"))


def test_nesting_with_an_end(tmp_path: Path) -> None:
    model = deep(100)
    assert len(normswap.plan(model, X).swaps) == 1
    torch.save(model, tmp_path / "m.pt")
    assert load(str(tmp_path / "m.pt")).form == "module"
    assert wellformed.problem(shared(12)) is None
    mutual = net()
    mutual[0].__dict__["parent"] = mutual  # an attribute is no layer
    assert normswap.convert(mutual, X).parity


@pytest.mark.parametrize("eps", [None, "1e-5", float("nan"), b"1"])
def test_an_eps_that_is_no_number(eps: Any, tmp_path: Path) -> None:
    for norm in (nn.BatchNorm2d(5), nn.InstanceNorm2d(5), nn.GroupNorm(5, 5)):
        model = net(last=norm)
        norm.eps = eps
        with pytest.raises(
            SwapError, match=rf"^the model has a {type(norm).__name__} last with eps .*\nhint: it cannot run so: eps is a number"
        ):
            normswap.plan(model, X)
        torch.save(model, tmp_path / "m.pt")
        with pytest.raises(LoadError, match=rf"^m\.pt has a {type(norm).__name__} last with eps .*: no constructor leaves it so"):
            load(str(tmp_path / "m.pt"))


class Own(nn.BatchNorm2d):
    """Reads its eps in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps or 1e-3)


def test_an_eps_that_is_a_number_of_another_kind_or_read_otherwise() -> None:
    for eps in (0, 1, 1e-3, torch.tensor(1e-3)):
        model = net()
        model[1].eps = eps
        assert wellformed.problem(model) is None
    assert wellformed.problem(nn.Sequential(nn.RMSNorm(6))) is None  # None is the eps of the dtype
    own = Own(5)
    own.eps = None  # type: ignore[assignment]
    assert wellformed.problem(own) is None


LACKS: dict[str, tuple[Callable[[nn.BatchNorm2d], object], str]] = {
    "its mean": (lambda norm: norm._buffers.pop("running_mean"), "without running_mean"),
    "its variance alone": (lambda norm: norm._buffers.update(running_var=None), "with one of running_mean and running_var"),
    "its eps": (lambda norm: norm.__dict__.pop("eps"), "without eps"),
    "its weight": (lambda norm: norm._parameters.pop("weight"), "without weight"),
    "a mean of its size": (
        lambda norm: norm._buffers.update(running_mean=torch.ones(4)),
        r"with running_mean of shape \(4,\) for 5 features",
    ),
    "a count of features": (lambda norm: norm.__dict__.update(num_features="5"), "with num_features '5'"),
    "an end to its count": (lambda norm: norm.__dict__.update(num_features=2**70), "with num_features 1180591620717411303424"),
    "a momentum": (lambda norm: norm.__dict__.update(momentum="x"), "with momentum 'x'"),
}


@pytest.mark.parametrize("what", LACKS)
def test_a_batch_norm_of_a_file_that_lacks_something(what: str, tmp_path: Path) -> None:
    change, text = LACKS[what]
    model = net()
    change(model[1])  # type: ignore[arg-type]
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=rf"^m\.pt has a BatchNorm2d 1 {text}: no constructor leaves it so\nhint: save the model again"):
        load(str(tmp_path / "m.pt"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda conv: conv.__dict__.pop("in_channels"), "a Conv2d 0 without in_channels"),
        (lambda conv: conv.__dict__.update(in_channels=2**70), "a Conv2d 0 with in_channels 1180591620717411303424"),
        (lambda conv: conv.__dict__.update(_forward_hooks=None), "a Conv2d 0 with _forward_hooks None"),
        (lambda conv: conv.__dict__.pop("_buffers"), "a Conv2d without _buffers, in 0"),
        (lambda conv: conv._parameters.update(weight=torch.ones(5, 3, 3, 3)), "a parameter 'weight', in 0 that is a Tensor"),
    ],
)
def test_another_layer_of_a_file_that_lacks_something(change: Callable[[nn.Conv2d], object], text: str, tmp_path: Path) -> None:
    model = net()
    change(model[0])  # type: ignore[arg-type]
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=rf"^m\.pt has {text}"):
        load(str(tmp_path / "m.pt"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", (1, 2)),
        ("affine", None),
        ("aux", b"z"),
        ("momentum", "x"),
        ("channel_axis", 1),
        ("calls", None),
    ],
)
def test_a_batchless_norm_of_a_file_that_normswap_did_not_make(name: str, value: Any, tmp_path: Path) -> None:
    model = normswap.convert(net(), X, coupling="none").model
    torch.save(model, tmp_path / "m.pt")
    assert load(str(tmp_path / "m.pt")).form == "module"
    model[1].__dict__[name] = value  # type: ignore[operator]
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"^m\.pt has a BatchlessNorm 1 as normswap makes none\nhint: convert the original model again"):
        load(str(tmp_path / "m.pt"))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "without affine": lambda: nn.BatchNorm2d(5, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "with a cumulative average": lambda: nn.BatchNorm2d(5, momentum=None),
    "synchronised": lambda: nn.SyncBatchNorm(5),
    "of each instance": lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
    "of groups": lambda: nn.GroupNorm(5, 5, affine=False),
    "of a layer": lambda: nn.LayerNorm((5, 4), elementwise_affine=False),
    "by the root mean square": lambda: nn.RMSNorm(4),
    "with an eps that is whole": lambda: nn.BatchNorm2d(5, eps=1),
    "in half": lambda: nn.BatchNorm2d(5).half(),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_that_constructors_make_are_read(kind: str, tmp_path: Path) -> None:
    torch.save(nn.Sequential(NORMS[kind]()), tmp_path / "m.pt")
    assert load(str(tmp_path / "m.pt")).form == "module"


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_scripted_part_is_looked_at_too() -> None:
    model = nn.Sequential(torch.jit.script(net()))
    assert wellformed.problem(model) is None
