"""verify without inputs: a model and an ONNX file are given what both take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normswap


class Encoder(nn.Module):
    """Takes what a tokenizer gives, like the encoders of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types, self.norm = nn.Embedding(50, 6), nn.Embedding(2, 6), nn.LayerNorm(6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = x if token_type_ids is None else x + self.types(token_type_ids)
        return self.norm(x if attention_mask is None else x * attention_mask[..., None])  # type: ignore[no-any-return]


ALL = ("input_ids", "attention_mask", "token_type_ids")


def exported(path: Path, names: tuple[str, ...], length: int = 16, dynamic: str = "batch") -> Path:
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(1))
    values = dict(zip(ALL, (ids, (ids > 9).long(), ids % 2), strict=True))
    result = normswap.export_onnx(Encoder().eval(), {name: values[name] for name in names}, path, dynamic=dynamic)  # type: ignore[arg-type]
    assert result.input_names == names
    return path


@pytest.mark.parametrize("names", [ALL[:1], ALL[:2], ALL, (ALL[0], ALL[2])], ids=len)
def test_a_file_is_given_the_inputs_that_it_takes(names: tuple[str, ...], tmp_path: Path) -> None:
    file, model = exported(tmp_path / "m.onnx", names), Encoder().eval()
    assert normswap.verify(model, file)
    assert normswap.verify(file, model)
    with torch.no_grad():
        model.norm.bias[2] += 1e-2
    found = normswap.verify(model, file)
    assert not found
    assert found.failure is None


def test_a_file_of_another_length_too(tmp_path: Path) -> None:
    assert normswap.verify(Encoder().eval(), exported(tmp_path / "fixed.onnx", ALL, length=9))
    assert normswap.verify(Encoder().eval(), exported(tmp_path / "free.onnx", ALL, dynamic="spatial"))


def test_types_that_are_ignored_are_found(tmp_path: Path) -> None:
    """They are not all 0, where a file that ignores them would pass."""

    class Ignores(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
            return super().forward(input_ids, attention_mask, None if token_type_ids is None else token_type_ids * 0)

    assert not normswap.verify(Ignores().eval(), exported(tmp_path / "m.onnx", ALL))


def test_a_file_whose_inputs_have_other_names_is_refused(tmp_path: Path) -> None:
    class Other(Encoder):
        def forward(self, tokens: Tensor, mask: Tensor, types: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens, mask, types)

    ids = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(1))
    normswap.export_onnx(Other().eval(), (ids, (ids > 9).long(), ids % 2), tmp_path / "m.onnx")
    found = normswap.verify(Encoder().eval(), tmp_path / "m.onnx")
    assert found.failure is not None
    assert "the file has 3 inputs (tokens, mask, types), but 2 tensors were given" in found.failure
