"""R17: pre-activation residual blocks with an in-place ReLU, when nothing is left of the norm before it.

In a pre-activation block the norm reads the residual stream, and the ReLU after it works in place on what the norm gave. Put nn.Identity in
the place of the norm once it was folded, and the ReLU overwrites the stream itself, which the sum at the end of the block reads again. The
file must be folded completely all the same, and compute what the model computes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported import assert_same
from torch import Tensor, nn

import normswap


class Block(nn.Module):
    def __init__(self, channels: int, width: int, how: str) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, channels, 3, padding=1)
        self.relu, self.how = nn.ReLU(inplace=True), how

    def activated(self, x: Tensor) -> Tensor:
        if self.how == "module":
            return self.relu(x)  # type: ignore[no-any-return]
        return F.relu(x, inplace=True) if self.how == "function" else x.relu_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.activated(self.norm1(x)))
        return self.conv2(self.activated(self.norm2(y))) + x  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, how: str, negative: bool) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(*(Block(6, width, how) for width in (5, 7, 4)))
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.3, 2)
                nn.init.uniform_(module.weight, 0.3, 2)
                nn.init.normal_(module.bias)
                if negative:
                    module.weight.data[1] *= -1
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x))), inplace=True).mean((2, 3)))  # type: ignore[no-any-return]


# which signs the weights have is a matter of folding, which gets the same graph whatever the ReLU was: of the mixed ones, one is enough
@pytest.mark.parametrize(
    ("negative", "how"),
    [
        *(pytest.param(False, how, id=f"positive-{how}") for how in ("module", "function", "method")),
        pytest.param(True, "module", id="mixed-module"),
        *(pytest.param(True, how, id=f"mixed-{how}", marks=pytest.mark.slow) for how in ("function", "method")),
    ],
)
def test_an_in_place_relu_after_a_folded_norm_leaves_the_stream_alone(how: str, negative: bool, tmp_path: Path) -> None:
    model, x = Net(how, negative), torch.randn(3, 3, 9, 8)
    conversion = normswap.convert(model, x)
    result = normswap.export_onnx(conversion, path=tmp_path / "m.onnx")
    assert result.parity
    assert len(result.sites) == 7
    if not negative:
        assert (result.residue, result.extra) == ((), {})
        assert "BatchNormalization" not in result.nodes
    else:
        assert all("negative" in site.reason for site in result.sites if site.left)
    assert_same(model, tmp_path / "m.onnx", *((torch.randn(batch, 3, 9, 8),) for batch in (1, 2, 7)))


def test_an_identity_in_its_place_would_be_wrong() -> None:
    """What this is about: the same fold by hand, as tools do it that put an Identity where a norm was."""
    model, x = Net("module", negative=False), torch.randn(2, 3, 9, 8)
    folded: Any = copy.deepcopy(model)
    norm, conv = folded.blocks[0].norm1, folded.blocks[0].conv1
    with torch.no_grad():
        want = model(x)
        norm.reset_running_stats()  # a norm that does nothing, so that an Identity is the same function
        norm.eps = 0.0
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
        plain = folded(x)
        folded.blocks[0].norm1 = nn.Identity()
        overwritten = folded(x)
    assert conv.bias is None
    assert not torch.allclose(want, plain)
    assert float((overwritten - plain).abs().max()) > 1e-2 * float(plain.abs().max())
