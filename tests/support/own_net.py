"""A user's own module of models, and what the tests of loading share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from normswap.errors import LoadError, NormswapError
from normswap.files.load import load

NET = "load_test_net"
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(x))

class Config:
    pass

class Odd(Net):
    def __init__(self):
        super().__init__()
        self.config = Config()

def net():
    print("built")
    return Net()

def broken():
    raise ValueError("no such data set")

def wrong():
    return [1]

def needs(size):
    return Net()

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def _load_from_state_dict(self, state, prefix, *rest):
        for key in [key for key in state if key.startswith(prefix + "norm.")]:
            state[prefix + "bn." + key[len(prefix) + 5:]] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *rest)

class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if (metadata.get("version") or 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)

class Lax(nn.Sequential):
    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)

class Raising(nn.Linear):
    def __init__(self):
        super().__init__(3, 5)

    def load_state_dict(self, state, strict=True):
        raise KeyError("backbone")

def norms():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))

def frozen():
    from torchvision.ops import FrozenBatchNorm2d
    return nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6))

def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)))

def renamed():
    return nn.Sequential(nn.Conv2d(3, 6, 3), Renamed())

def versioned():
    return nn.Sequential(Versioned(4, 4))

def lax():
    return Lax(nn.Linear(3, 5), nn.BatchNorm1d(5))

def lazy():
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())

def meta():
    with torch.device("meta"):
        return norms()

instance = Net()
nested = type("Holder", (), {"make": staticmethod(net)})
"""


def own_model(cls: str = "Net") -> nn.Module:
    return load(f"{NET}:{cls}").model  # type: ignore[return-value]


def fails(source: str | Path, kind: type[NormswapError] = LoadError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(str(source), **options)
    assert type(caught.value) is kind
    assert caught.value.message.count("\n") < 8
    return str(caught.value)
