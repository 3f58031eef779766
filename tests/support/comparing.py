"""Nets, ONNX files, and how the tests of the judge compare them."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fixtures.nets import randomise
from normswap.parity.judge import compare, judge
from normswap.parity.result import Parity


def verify(reference: nn.Module | Path, candidate: nn.Module | Path, args: Any, kwargs: Any, **options: Any) -> Parity:
    sites = options.pop("sites", ())
    return compare(judge(reference, args, kwargs, sites=sites), candidate, **options)


X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(7))
LARGER = torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(4))
SITES = ("bn1", "bn2")


class Net(nn.Module):
    """conv - bn1 - relu - conv - bn2, statistics of its own, `end` applied to the output."""

    def __init__(self, end: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.end = end
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)

    def forward(self, x: Tensor) -> Any:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return y if self.end is None else self.end(self, y)


def compared(reference: nn.Module, candidate: nn.Module | None = None, *args: Any, **options: Any) -> Parity:
    return verify(reference, candidate or copy.deepcopy(reference), args or (X,), {}, **options)


def changed(change: Callable[[Net], Any], reference: Net | None = None) -> Parity:
    """A net against a copy of it with a change, its layers compared, too."""
    reference = reference or Net()
    candidate = copy.deepcopy(reference)
    with torch.no_grad():
        change(candidate)
    return compared(reference, candidate, sites=SITES)


def ending(end: Callable[[Any, Tensor], Any], other: Callable[[Any, Tensor], Any]) -> Parity:
    """Two nets that differ in what they do to the same output."""
    return compared(Net(end), Net(other))


@dataclass
class Result:
    logits: Tensor
    extra: Any = None


Pair = namedtuple("Pair", ["a", "b"])


class Bag(dict[str, Any]):
    """A dict that torch's pytree does not know."""


class Cancels(nn.Module):
    """x, by way of x + 1, off by a factor of 1 + small or 1 + large where it is not run in float64."""

    def __init__(self, small: float = 0.0, large: float = 0.0) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, x: Tensor) -> Tensor:
        size, y = x.abs().max(), x + 1 - 1
        if x.dtype is torch.float64:
            return y
        return y * (1 + self.small) if size < 0.1 else y * (1 + self.large) if size > 10 else y


class Raises(nn.Module):
    def __init__(self, batch: int | None = None) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        if self.batch in (None, len(x)):
            raise RuntimeError(f"no batch of {len(x)}\nand a second line")
        return x


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5))
    return randomise(nn.Sequential(*layers), seed).eval()  # type: ignore[return-value]


def fused(model: nn.Sequential) -> nn.Sequential:
    result = copy.deepcopy(model)
    for i in (0, 3):
        result[i], result[i + 1] = fuse_conv_bn_eval(result[i], result[i + 1]), nn.Identity()  # type: ignore[type-var]
    return result


class Saturates(nn.Module):
    """As a pitch tracker does: nothing of its output is left at large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(-self.norm(self.conv(x)).square().mean((2, 3)) - 1)


def onnx_file(path: Path, *, gain: float = 2.0, dtype: int = TensorProto.FLOAT, outputs: int = 1, batch: int | str = "n") -> Path:
    """y = (x @ w) * gain + 1, the gain as a Constant with `value_float`, the 1 by a Cast: (n, 3) -> (n, 2)."""
    narrow = helper.tensor_dtype_to_np_dtype(dtype)
    weight = torch.arange(6).view(3, 2).sub(2).div(7).numpy().astype(narrow)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=dtype),
        helper.make_node("MatMul", ["h", "w"], ["a"]),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["gain"], value_float=gain),
        helper.make_node("Mul", ["b", "gain"], ["c"]),
        *(helper.make_node("Add", ["c", "one"], [f"y{i}"]) for i in range(outputs)),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [batch, 2]) for i in range(outputs)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(torch.ones(()).numpy(), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


class Linear(nn.Module):
    """What onnx_file computes."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.arange(6).view(3, 2).sub(2).div(7)), gain

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.gain + 1


ROWS = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
