"""--dynamic: which sizes of the inputs are free, and that the file is the same function at other sizes than the example's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported import assert_same, norm
from torch import Tensor, nn

import normswap
from fixtures.architectures import GPT, ViT
from normswap.errors import UsageError
from normswap.export.to_onnx import export
from normswap.parity.probes import resized
from normswap.parity.result import ParityError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


class UNet(nn.Module):
    """Two levels: its input must be a multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 2, stride=2), nn.Conv2d(6, 8, 2, stride=2)
        self.norm, self.up, self.upper = norm(6), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(12, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.norm(self.b(a)).relu()
        return torch.cat([self.upper(torch.cat([self.up(self.c(b)), b], 1)), a], 1)


def convs() -> nn.Module:
    pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), norm(5), nn.ReLU(), *pool)


SPATIAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[int, str]]] = {
    "images": (convs, (2, 3, 13, 16), {0: "batch", 2: "height", 3: "width"}),
    "U-Net": (UNet, (2, 3, 12, 16), {0: "batch", 2: "height", 3: "width"}),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(3, 5, 2), norm(5)), (2, 3, 4, 5, 6), {0: "batch", 2: "depth", 3: "height", 4: "width"}),
    "signals": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3), norm(5), nn.ReLU()), (2, 3, 9), {0: "batch", 2: "length"}),
    "sequences": (lambda: nn.Sequential(nn.Linear(8, 5), nn.GELU(), norm(5, channel_axis=-1)), (2, 9, 8), {0: "batch", 1: "length"}),
}


@pytest.mark.parametrize("name", SPATIAL)
def test_spatial_axes_are_free_and_verified(name: str, path: Path) -> None:
    make, shape, free = SPATIAL[name]
    model, x = make().eval(), torch.randn(shape)
    result = normswap.export_onnx(model, x, path, dynamic="spatial")
    assert result.free == (free,)
    assert (result.dynamic, result.notes, result.residue) == (True, (), () if name != "sequences" else result.residue)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert {axis: dim.dim_param for axis, dim in enumerate(dims) if dim.dim_param} == free
    assert {dim.dim_value for dim in dims if not dim.dim_param} == {size for axis, size in enumerate(shape) if axis not in free}
    assert_same(model, path, (x,), (torch.randn(*(size * (1 if axis not in free else 2) for axis, size in enumerate(shape))),))


def test_the_other_sizes_are_a_leg_of_their_own(path: Path) -> None:
    from normswap.export.verified import verified_export
    from normswap.models.inputs import as_inputs

    _, found = verified_export(convs().eval(), as_inputs(torch.randn(2, 3, 13, 16)), path, dynamic="spatial")
    other = found.parities["onnxruntime (all), other sizes"]
    assert other.passed
    assert other.probes == ("example", "height 26", "height 6", "width 32", "width 8")
    _, found = verified_export(convs().eval(), as_inputs(torch.randn(2, 3, 13, 16)), path)
    assert not any("other sizes" in name for name in found.parities)


def test_a_file_that_is_right_at_the_example_alone_is_not_written(path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((2, 3)) / (12 * 16) if torch.compiler.is_exporting() else x.mean((2, 3))

    x = torch.randn(2, 3, 12, 16)
    with pytest.raises(ParityError, match=r"converted, but onnxruntime \(all\) is not the same function: .* at the probe 'height 24'"):
        normswap.export_onnx(Mean().eval(), x, path, dynamic="spatial")
    assert not path.exists()
    assert normswap.export_onnx(Mean().eval(), x, path).parity  # right at the size that it was made for


def test_a_model_of_one_size_keeps_it(path: Path) -> None:
    """A ViT without interpolation: torch makes a graph with a free height of it, which only runs at one."""
    model, x = ViT(blocks=1).eval(), torch.randn(2, 3, 12, 12)
    result = normswap.export_onnx(model, x, path, dynamic="spatial")
    assert result.free == ({0: "batch"},)
    assert result.notes == ("fixed: height, width; the model itself runs at no other size that was tried",)


def test_axes_that_torch_fixes_are_named(path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] == 9
            return x * 2

    result = normswap.export_onnx(Fixed().eval(), torch.randn(2, 3, 9, 8), path, dynamic="spatial")
    assert result.free == ({0: "batch"},)
    assert len(result.notes) == 1
    assert result.notes[0].startswith("the spatial axes are fixed, as torch refuses free ones: ")


def test_a_length_with_an_end(path: Path) -> None:
    """Twice the example is more positions than the model has; half of it is not."""
    result = normswap.export_onnx(GPT(blocks=1).eval(), torch.randint(13, (2, 7)), path, dynamic="spatial")
    assert result.free == ({0: "batch", 1: "length"},)
    assert result.notes == ()


@pytest.mark.parametrize(("dynamic", "free"), [(True, {0: "batch"}), ("batch", {0: "batch"}), (False, {}), ("none", {})])
def test_the_other_choices(dynamic: Any, free: dict[int, str], path: Path) -> None:
    assert export(convs().eval(), (torch.randn(2, 3, 13, 16),), {}, path, dynamic=dynamic).free == (free,)


def test_vectors_have_no_spatial_axes(path: Path) -> None:
    result = normswap.export_onnx(nn.Sequential(nn.Linear(7, 5), norm(5)).eval(), torch.randn(3, 7), path, dynamic="spatial")
    assert (result.free, result.notes) == (({0: "batch"},), ())


def test_a_choice_that_there_is_not(path: Path) -> None:
    with pytest.raises(UsageError, match="dynamic is 'all'; expected True, False or one of 'batch', 'spatial', 'none'"):
        export(convs().eval(), (torch.randn(2, 3, 13, 16),), {}, path, dynamic="all")  # type: ignore[arg-type]


def test_an_exported_program_keeps_the_axes_it_has(path: Path) -> None:
    x = torch.randn(2, 3, 13, 16)
    shapes = ({2: torch.export.Dim("rows", min=8)},)
    program = torch.export.export(convs().eval(), (x,), dynamic_shapes=shapes)
    result = normswap.export_onnx(program, x, path)
    ((axis, _),) = result.free[0].items()
    assert (axis, result.dynamic, result.notes) == (2, False, ())


def test_probes_of_other_sizes() -> None:
    x, mask = torch.arange(12.0).reshape(2, 2, 3), torch.arange(6).reshape(2, 3)
    found = list(resized((x,), {"mask": mask, "flag": True}, [{0: "batch", 2: "length"}, {0: "batch", 1: "length"}]))
    assert [(name, probe.name) for name, probe in found] == [("length", "length 6"), ("length", "length 1")]
    twice, half = (probe for _, probe in found)
    assert twice.args[0].shape == (2, 2, 6)
    assert torch.equal(twice.args[0][..., 3:], x)
    assert torch.equal(twice.kwargs["mask"], torch.cat([mask, mask], 1))
    assert twice.kwargs["flag"] is True
    assert torch.equal(half.args[0], x[..., :1])
    assert list(resized((x,), {}, [{0: "batch"}])) == []


def test_one_sample_is_example_enough(path: Path) -> None:
    """Of GPT-2 with one sample, torch takes for granted that the batch broadcasts against the positions, and fixes it without a word."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=12, vocab_size=23, use_cache=False, bos_token_id=1, eos_token_id=1
    )
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(3, 23, (1, 9))
    result = normswap.export_onnx(model, {"input_ids": tokens}, path)
    assert (result.free, result.notes) == (({0: "batch"},), ())
    assert result.parity


class OneDict(nn.Module):
    """Takes what many a data loader gives: one dict; alone, or after a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.norm, self.table = nn.Conv2d(3, 5, 3), norm(5), nn.Linear(4, 5)

    def forward(self, batch: dict[str, Tensor], more: dict[str, Tensor] | None = None) -> Tensor:
        table = (more or batch)["table"]
        return self.norm(self.image(batch["image"])).mean((2, 3)) + self.table(table)  # type: ignore[no-any-return]


@pytest.mark.parametrize("several", [False, True])
def test_a_dict_may_be_an_argument(several: bool, path: Path) -> None:
    image, table = {"image": torch.randn(2, 3, 6, 7)}, {"table": torch.randn(2, 4)}
    result = normswap.export_onnx(OneDict().eval(), (image, table) if several else (image | table,), path)
    assert result.parity
    assert result.free == ({0: "batch"}, {0: "batch"})


def test_a_dict_for_a_model_that_takes_one_dict(path: Path) -> None:
    with pytest.raises(UsageError, match=r"unexpected keyword argument[^$]*a model that takes one dict is given \(\{\.\.\.\},\)"):
        normswap.export_onnx(OneDict().eval(), {"image": torch.randn(2, 3, 6, 7), "table": torch.randn(2, 4)}, path)


class Sentences(nn.Module):
    """Takes what a tokenizer of BERT gives, under other places: ids, types, mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.types = nn.Embedding(11, 8), nn.Embedding(3, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return (self.words(input_ids) + self.types(token_type_ids)) * attention_mask[..., None]


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_keyword_arguments_in_another_order_than_the_models(samples: int, path: Path) -> None:
    ids, types, mask = torch.randint(11, (samples, 7)), torch.randint(3, (samples, 7)), torch.arange(7).lt(5).long().repeat(samples, 1)
    batch = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    result = normswap.export_onnx(Sentences().eval(), batch, path)
    assert result.parity
    assert result.free == ({0: "batch"},) * 3
    assert [i.name for i in onnx.load(path).graph.input] == list(batch)


def test_a_file_gets_keyword_arguments_by_their_names(path: Path) -> None:
    ids, types, mask = torch.randint(11, (2, 7)), torch.randint(3, (2, 7)), torch.arange(7).lt(5).long().repeat(2, 1)
    normswap.export_onnx(Sentences().eval(), (ids, mask, types), path)
    again = {"token_type_ids": types, "attention_mask": mask, "input_ids": ids}
    assert normswap.verify(Sentences().eval(), path, again)
    assert normswap.verify(Sentences().eval(), path, (ids, mask, types))
