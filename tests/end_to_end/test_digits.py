"""The promise on a real model: the digits classifier says the same about every test image before, after, and in onnxruntime."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import normswap
from fixtures import train_digits_cnn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return torch.load(Path(train_digits_cnn.__file__).with_name("digits_cnn.pt"), weights_only=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return train_digits_cnn.test_set().images


@torch.no_grad()
def _error(candidate: Tensor, reference: Tensor) -> float:
    return ((candidate.double() - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def test_every_image_gets_the_same_answer(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    conversion = normswap.convert(model)
    assert len(conversion.plan.swaps) == 4
    exported = normswap.export_onnx(conversion, path=tmp_path / "digits.onnx")
    session = onnxruntime.InferenceSession(exported.path)
    (in_onnx,) = session.run(None, {exported.input_names[0]: images.numpy()})
    before, after = model(images), conversion.model(images)
    truth = copy.deepcopy(model).double()(images.double())
    for logits in (after, torch.from_numpy(in_onnx)):
        assert torch.equal(logits.argmax(1), before.argmax(1))
        assert _error(logits, truth) <= 1e-5
    accuracy = (after.argmax(1) == train_digits_cnn.test_set().labels).double().mean().item()
    assert accuracy >= 0.98


@torch.no_grad()
def test_in_double_precision(model: nn.Module, images: Tensor) -> None:
    reference = copy.deepcopy(model).double()
    conversion = normswap.convert(reference)
    assert conversion.parity.max_rel <= 1e-12
    assert _error(conversion.model(images.double()), reference(images.double())) <= 1e-12


def test_no_norm_is_left_in_the_file(model: nn.Module, tmp_path: Path) -> None:
    exported = normswap.export_onnx(normswap.convert(model), path=tmp_path / "digits.onnx")
    assert exported.residue == ()
    assert len(exported.folded) == 4
    assert not {"BatchNormalization", "Mul", "Add", "Sub"} & set(exported.nodes)
