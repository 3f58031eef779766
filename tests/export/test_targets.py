"""What an ONNX file is written for: the opset that is chosen, where weights go, and what the file says of itself."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from exported import assert_same, norm, swapped
from torch import Tensor, nn

import normswap
from fixtures.architectures import GPT, ViT
from normswap.errors import ExportError, UsageError
from normswap.export.opset import wants_newer
from normswap.export.to_onnx import Export, export


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# -- the opset ---------------------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Attention over (N, L, D), called by `call(q, k, v)`, between linears, with a norm before and `after` behind."""

    def __init__(self, call: Callable[..., Tensor], after: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = norm(6, channel_axis=-1), nn.Linear(6, 24), nn.Linear(8, 5)
        self.call, self.after = call, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.after(self.out(self.call(q, k, v).transpose(1, 2).flatten(2)))
        return y


def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) * 0.5).softmax(-1) @ v


MASK = torch.rand(7, 7) > 0.3
CALLS: dict[str, Callable[..., Tensor]] = {
    "plain": F.scaled_dot_product_attention,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scaled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "a mask of floats": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK.to(q) * -3),
    "a mask of booleans": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK | torch.eye(7, dtype=torch.bool)),
    "fewer keys than queries": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5]),
}


@pytest.mark.parametrize("case", CALLS)
def test_attention_stays_one_operator(case: str, path: Path) -> None:
    model = Attends(CALLS[case]).eval()
    result = export(model, (torch.randn(3, 7, 6),), {}, path)
    assert result.opset == 23
    assert result.nodes["Attention"] == 1
    assert "Softmax" not in result.nodes
    assert (result.folded, result.extra, result.notes) == (("norm",), {}, ())
    assert result.cuda is not None
    assert result.cuda.without_kernel == ()
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(model, path, *((torch.randn(batch, 7, 6),) for batch in (1, 2, 7)))


def test_an_opset_that_was_asked_for_is_kept(path: Path) -> None:
    model = Attends(CALLS["plain"]).eval()
    result = export(model, (torch.randn(3, 7, 6),), {}, path, opset=20)
    assert (result.opset, result.nodes["Softmax"]) == (20, 1)
    assert "Attention" not in result.nodes
    assert_same(model, path, (torch.randn(2, 7, 6),))


def test_attention_that_is_written_out_by_hand_is_left_as_it_is(path: Path) -> None:
    result = export(Attends(own).eval(), (torch.randn(3, 7, 6),), {}, path)
    assert (result.opset, result.nodes["Softmax"], result.folded) == (20, 1, ("norm",))


def test_attention_that_torch_writes_only_before_opset_23(path: Path) -> None:
    model = Attends(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)).eval()  # with as many heads of each
    result = export(model, (torch.randn(3, 7, 6),), {}, path)
    assert (result.opset, result.nodes["Softmax"]) == (20, 1)
    assert len(result.notes) == 1
    assert result.notes[0].startswith("opset 20: torch cannot write the model in opset 23: ")
    assert_same(model, path, (torch.randn(2, 7, 6),))


def test_attention_that_torch_cannot_write_at_all_is_an_error(path: Path) -> None:
    model = Attends(lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])[:, None].expand(-1, 2, -1, -1)).eval()
    with pytest.raises(ExportError, match="only 4D query, key, and value are supported"):
        export(model, (torch.randn(3, 7, 6),), {}, path)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x[:, None], (2, 1)).flatten(1)


def test_attention_costs_no_other_node_its_cuda_kernel(path: Path) -> None:
    """MaxPool changed in opset 22, and its CUDA kernel is that of opset 12."""
    model = Attends(CALLS["plain"], Pooled()).eval()
    result = export(model, (torch.randn(3, 7, 6),), {}, path)
    assert result.opset == 20
    assert result.notes == ("opset 20: in opset 23, MaxPool would be without a CUDA kernel",)
    assert result.cuda is not None
    assert result.cuda.without_kernel == ()
    assert_same(model, path, (torch.randn(2, 7, 6),))


def test_a_node_that_has_no_kernel_anywhere_costs_no_attention(path: Path) -> None:
    """There is no CUDA kernel for Celu in any opset."""
    result = export(Attends(CALLS["plain"], nn.CELU(2.0)).eval(), (torch.randn(3, 7, 6),), {}, path)
    assert (result.opset, result.nodes["Attention"]) == (23, 1)
    assert result.notes == ()


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], int]] = {
    "ViT": (lambda: ViT(blocks=1), (torch.randn(2, 3, 12, 12),), 1),  # through nn.MultiheadAttention
    "GPT": (GPT, (torch.randint(13, (2, 9)),), 2),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_nets(name: str, path: Path) -> None:
    make, args, blocks = ARCHITECTURES[name]
    model = swapped(make())
    result = export(model, args, {}, path)
    assert (result.opset, result.nodes["Attention"], result.extra) == (23, blocks, {})
    assert result.cuda is not None
    assert result.cuda.without_kernel == ()
    if name == "ViT":
        assert_same(model, path, *((torch.randn(batch, 3, 12, 12),) for batch in (1, 7)))


def test_a_norm_that_was_folded_does_not_come_back_as_another(path: Path) -> None:
    result = export(Attends(CALLS["plain"], norm(5, channel_axis=-1)).eval(), (torch.randn(3, 7, 6),), {}, path)
    assert not {"RMSNormalization", "LayerNormalization", "BatchNormalization"} & set(result.nodes)


def test_a_norm_that_was_not_swapped_is_one_operator(path: Path) -> None:
    model = Attends(CALLS["plain"], nn.RMSNorm(5, eps=1e-3)).eval()
    result = export(model, (torch.randn(3, 7, 6),), {}, path)
    assert result.nodes["RMSNormalization"] == 1
    assert_same(model, path, (torch.randn(2, 7, 6),))


@pytest.mark.parametrize("make", [ViT, GPT, lambda: nn.TransformerEncoderLayer(6, 2, 7, batch_first=True)], ids=["vit", "gpt", "encoder"])
def test_a_call_is_seen(make: Callable[[], nn.Module]) -> None:
    args = (torch.randint(13, (2, 9)),) if make is GPT else (torch.randn(2, 3, 12, 12),) if make is ViT else (torch.randn(2, 7, 6),)
    model = make().eval()
    state = torch.get_rng_state()
    assert wants_newer(model, args, {})
    assert torch.equal(torch.get_rng_state(), state)
    program = torch.export.export(model, args)
    assert wants_newer(program, args, {}) == ("scaled_dot_product" in program.graph_module.code)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(6, 5),
        Attends(own),
        nn.Conv2d(3, 4, 2),  # which does not take this input at all
        nn.MultiheadAttention(6, 2, batch_first=True),  # which takes three
    ],
)
def test_no_call_is_seen_where_there_is_none(model: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    assert not wants_newer(model.eval(), (torch.randn(3, 7, 6),), {})
    assert capfd.readouterr() == ("", "")


def test_looking_leaves_the_inputs_alone() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.zero_()

    x = torch.ones(2, 3)
    assert not wants_newer(Writes().eval(), (x,), {})
    assert bool((x == 1).all())


@pytest.mark.parametrize("action", ["default", "always", "error"])
def test_looking_is_silent(action: Literal["default", "always", "error"], capfd: pytest.CaptureFixture[str]) -> None:
    class Talks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("so")
            print("so", file=sys.stderr)
            warnings.warn("it is said", stacklevel=1)
            warnings.simplefilter(action)
            if action != "error":
                warnings.warn("and again", stacklevel=1)
            return F.scaled_dot_product_attention(x, x, x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        assert wants_newer(Talks().eval(), (torch.randn(2, 3, 5),), {})
    assert caught == []
    assert capfd.readouterr() == ("", "")


# -- where the weights go ------------------------------------------------------------------------------------------------------------


def large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 300, 13), norm(300), nn.Conv2d(300, 70, 1)).eval()


def written(path: Path, **options: Any) -> Export:
    return export(large(), (torch.randn(2, 3, 14, 15),), {}, path, **options)


def test_weights_beside_the_file_when_asked_for(path: Path) -> None:
    model = large()
    export(model, (torch.randn(2, 3, 14, 15),), {}, path, external_data=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 10_000
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(model, path, (torch.randn(3, 3, 14, 15),))
    torch.manual_seed(0)
    inside = path.with_name("inside.onnx")
    export(model, (torch.randn(2, 3, 14, 15),), {}, inside)
    beside, within = ({t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer} for p in (path, inside))
    assert beside.keys() == within.keys()
    for name in beside:
        np.testing.assert_array_equal(beside[name], within[name])


def test_a_file_with_weights_beside_it_is_verified_before_both_appear(path: Path) -> None:
    result = normswap.export_onnx(large(), torch.randn(2, 3, 14, 15), path, external_data=True)
    assert result.parity
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert normswap.verify(path, path, torch.randn(2, 3, 14, 15))


def test_weights_are_in_the_file_otherwise(path: Path) -> None:
    for choice in (None, False):
        written(path, external_data=choice)
        assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_small_weights_stay_in_the_file(path: Path) -> None:
    """There is nothing to put elsewhere, so no second file."""
    export(nn.Sequential(nn.Linear(7, 5), norm(5)).eval(), (torch.randn(3, 7),), {}, path, external_data=True)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_weights_that_do_not_fit_into_one_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.export.file.INLINE_LIMIT", 400_000)
    with pytest.raises(UsageError, match=r"the weights take \d+ bytes, and one ONNX file holds 400000 at most") as caught:
        written(path, external_data=False)
    assert caught.value.hint == "leave the choice to normswap, or ask for external data"
    assert list(path.parent.iterdir()) == []


@pytest.mark.slow
def test_more_than_two_gibibytes_of_weights(path: Path) -> None:
    model = nn.Sequential(nn.Linear(18000, 16000), norm(16000), nn.ReLU(), nn.Linear(16000, 17000)).eval()
    result = export(model, (torch.randn(2, 18000),), {}, path)
    assert result.folded == ("1",)
    assert path.with_name("model.onnx.data").stat().st_size > 2**31
    assert path.stat().st_size < 200_000
    onnx.checker.check_model(str(path), full_check=True)
    x = torch.randn(3, 18000)
    with torch.no_grad():
        want = model(x).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {result.input_names[0]: x.numpy()})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


# -- what the file says of itself ------------------------------------------------------------------------------------------------------


def test_metadata_is_written(path: Path) -> None:
    export(norm(3).eval(), (torch.randn(2, 3),), {}, path, metadata={"normswap_recipe": "c0ffee"})
    found = Counter((p.key, p.value) for p in onnx.load(path).metadata_props)
    assert found["normswap_recipe", "c0ffee"] == 1
    assert {key for key, _ in found} == {"normswap_recipe", "normswap_version"}
