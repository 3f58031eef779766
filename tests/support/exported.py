"""Small normalised nets, and whether the ONNX file of one computes what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from normswap.layer.batchless_norm import BatchlessNorm

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def norm(channels: Any, cls: type[BatchlessNorm] = BatchlessNorm, **options: Any) -> Any:
    """A norm that hides nothing: means off 0, stds off 1, weights of both signs and one of them zero."""
    layer = cls(channels, **options)
    with torch.no_grad():
        layer.set_statistics(torch.randn_like(layer.mean), torch.rand_like(layer.mean) * 2 + 0.2)
        if layer.affine:
            layer.weight.normal_()
            layer.bias.normal_()
            layer.weight.view(-1)[layer.weight.numel() // 2] = 0
    return layer


def normalised(model: nn.Module) -> nn.Module:
    """`model` with a random BatchlessNorm in the place of every BatchNorm."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, norm(child.num_features))
    return model


def flat(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def runner(path: Path, level: str = "ORT_ENABLE_ALL") -> Callable[[Sequence[Tensor]], list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda inputs: session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def relative(a: Any, b: Tensor) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b.numpy()).max() / max(float(b.abs().max()), 1e-30))


def assert_same(model: nn.Module, path: Path, *probes: Sequence[Tensor], levels: Sequence[str] = LEVELS) -> None:
    """Within ten times the error that the model itself makes against float64, as `verify` judges; 1e-6 is always allowed."""
    judge, own = copy.deepcopy(model).double().eval(), copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = [flat(judge(*(x.double() for x in inputs))) for inputs in probes]
        noises = [
            [relative(a, b) for a, b in zip(flat(own(*inputs)), want, strict=True)] for inputs, want in zip(probes, wanted, strict=True)
        ]
    for level in levels:
        session = runner(path, level)
        for inputs, want, noise in zip(probes, wanted, noises, strict=True):
            got = session(inputs)
            assert len(got) == len(want)
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                assert a.shape == tuple(b.shape)
                cap = 5e-3 if a.dtype == np.float16 else 1e-4
                assert relative(a, b) <= min(cap, max(10 * noise[index], 1e-6)), (level, len(inputs[0]), index)


def swapped(model: nn.Module) -> nn.Module:
    """`model` with a random BatchlessNorm in the place of every LayerNorm."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, norm(child.normalized_shape[0], channel_axis=-1))
    return model.eval()
