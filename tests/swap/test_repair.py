"""Repair in closed form: closer to the original on samples that it has not seen, and nothing else is changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.api.convert import Conversion
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, max_position_embeddings=16
    )
    torch.manual_seed(0)
    return randomise(transformers.BertModel(config, add_pooling_layer=False), 1).eval()


def _texts(samples: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Two batches of token ids, of which the second is padded."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(1, 40, (samples, 11), generator=generator)
    b = torch.randint(1, 40, (samples + 3, 7), generator=generator)
    mask = torch.ones_like(b)
    mask[::2, 5:] = 0
    return [{"input_ids": a, "attention_mask": torch.ones_like(a)}, {"input_ids": b, "attention_mask": mask}]


def _vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    return randomise(model, 2).eval()


def _images(samples: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 32, 32, generator=generator) * torch.linspace(0.3, 3, samples)[:, None, None, None]
    return list(x.split(samples // 2))


def _converted(model: nn.Module, data: Any, **options: Any) -> Conversion[nn.Module]:
    return normswap.convert(model, calibration=data, approximate=True, **options)


def _output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state if isinstance(batch, dict) else model(batch)  # type: ignore[no-any-return]


def _distance(model: nn.Module, original: nn.Module, batch: Any) -> float:
    a, b = _output(model, batch), _output(original, batch)
    return float((a - b).norm() / b.norm())


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "post-norm": (_bert, _texts(60), _texts(20, seed=1)[0]),
    "pre-norm": (_vit, _images(60), _images(20, seed=1)[0]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_comes_closer_on_samples_that_it_has_not_seen(name: str) -> None:
    make, data, unseen = CASES[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    repaired, plain = _converted(model, data), _converted(model, data, repair="none")
    assert _distance(repaired.model, model, unseen) < 0.8 * _distance(plain.model, model, unseen)
    assert all(not fit.repaired for fit in plain.fits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_linears_around_post_norms_are_named_and_nothing_else_changes() -> None:
    model = _bert()
    conversion = _converted(model, _texts(60))
    changed = {name for fit in conversion.fits for name in fit.repaired}
    dense = {f"encoder.layer.{i}.{part}output.dense" for i in (0, 1) for part in ("", "attention.")}
    assert changed
    assert changed <= dense
    after = conversion.model.state_dict()
    norms = {f"{fit.name}." for fit in conversion.fits}
    for key, value in model.state_dict().items():
        if not any(key.startswith(norm) for norm in norms):
            moved = not torch.equal(value, after[key])
            assert moved == (key.rpartition(".")[0] in changed and key.endswith("weight")), key


def test_producers_and_readers_of_a_stream_are_repaired() -> None:
    changed = {name for fit in _converted(_vit(), _images(60)).fits for name in fit.repaired}
    assert {name.partition(".")[2].partition(".")[2] for name in changed} <= {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert any(name.endswith(("qkv", "fc1")) for name in changed)
    assert any(name.endswith(("proj", "fc2")) for name in changed)


@pytest.mark.parametrize("name", CASES)
def test_what_was_fitted_is_what_the_model_computes(name: str) -> None:
    """The errors that the fits tell are those of the finished model, run from its beginning."""
    make, data, _ = CASES[name]
    model = make()
    conversion = _converted(model, data)
    outputs: list[dict[str, list[Tensor]]] = []
    for each in (conversion.model, model):
        found: dict[str, list[Tensor]] = {fit.name: [] for fit in conversion.fits}
        handles = [
            module.register_forward_hook(lambda module, args, output, mine=found[key]: mine.append(output))
            for key, module in each.named_modules()
            if key in found
        ]
        for batch in data:
            _output(each, batch)
        for handle in handles:
            handle.remove()
        outputs.append(found)
    masks = [batch["attention_mask"].bool() if isinstance(batch, dict) else ... for batch in data]
    for fit in conversion.fits:
        part = (slice(None), 0) if fit.name == "norm" else ...  # of the ViT's last norm only the first token is read
        ours, source = (torch.cat([t[mask][part].flatten(0, -2) for t, mask in zip(o[fit.name], masks, strict=True)]) for o in outputs)
        assert fit.error == pytest.approx(float((ours - source).norm() / source.norm()), rel=1e-3)


def test_masked_positions_do_not_count() -> None:
    model, data = _bert(), _texts(40)
    other = [{**batch} for batch in data]
    other[1]["input_ids"] = torch.where(other[1]["attention_mask"].bool(), other[1]["input_ids"], 39)
    state, expected = (_converted(model, batches).model.state_dict() for batches in (other, data))
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """One norm that is called twice, or two in an order that the data decide."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.m = self.n if shared else nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.n, self.m) if len(x) % 2 else (self.m, self.n)
        return self.b(second(self.b(first(self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shared", [True, False])
def test_layers_that_cannot_be_taken_one_after_the_other_are_fitted_alone(shared: bool) -> None:
    model = randomise(Twice(shared=shared), 0).eval()
    data = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (41, 40)]
    asked, plain = _converted(model, data), _converted(model, data, repair="none")
    assert all(not fit.repaired for fit in asked.fits)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(asked.model.state_dict()[key], value), key


def test_a_norm_between_convs_is_fitted_alone() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)), 0).eval()
    data = [torch.randn(12, 3, 9, 8, generator=torch.Generator().manual_seed(0))]
    asked, plain = (_converted(model, data, **options) for options in ({}, {"repair": "none"}))
    assert all(torch.equal(asked.model.state_dict()[key], value) for key, value in plain.model.state_dict().items())


def test_nothing_is_repaired_from_fewer_rows_than_a_linear_has_inputs() -> None:
    model = randomise(nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 3)), 0).eval()
    for samples, some in ((4, False), (9, False), (200, True)):
        data = [torch.randn(samples, 9, generator=torch.Generator().manual_seed(0))]
        assert any(fit.repaired for fit in _converted(model, data).fits) == some, samples


def test_readers_alone_bring_their_outputs_closer() -> None:
    """An activation stands before the norm, so that only what reads it can be repaired; one reader has no bias."""
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)), 4).eval()
    x = torch.randn(900, 5, generator=torch.Generator().manual_seed(0))
    repaired, plain = _converted(model, [x[:600]]), _converted(model, [x[:600]], repair="none")
    assert repaired.fits[0].repaired == ("3",)
    assert torch.equal(repaired.model[0].weight, model[0].weight)
    assert _distance(repaired.model, model, x[600:]) < 0.9 * _distance(plain.model, model, x[600:])


def test_samples_without_an_axis_of_their_own_are_fitted_alone() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)), 0).eval()
    generator = torch.Generator().manual_seed(0)
    conversion = _converted(model, [torch.randn(5, generator=generator) for _ in range(150)])
    assert not conversion.fits[0].repaired
    assert conversion.fits[0].samples == 150


def test_what_a_model_raises_in_the_middle_is_told_and_no_thread_is_left() -> None:
    class Picky(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if len(x) == 7:
                raise ValueError("seven rows are too many")
            return y  # type: ignore[no-any-return]

    model = randomise(Picky(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)), 0).eval()
    threads = threading.active_count()
    with pytest.raises(UsageError, match="does not take the calibration data: ValueError: seven rows are too many"):
        _converted(model, [torch.randn(n, 5) for n in (40, 7)])
    assert threading.active_count() == threads


def test_hooks_and_modes_are_as_they_were() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Dropout(), nn.Linear(6, 3)), 0).train()
    conversion = _converted(model, [torch.randn(50, 5, generator=torch.Generator().manual_seed(0))])
    assert "0" in conversion.fits[0].repaired
    assert all(module.training for module in conversion.model.modules())
    assert isinstance(conversion.model[1], BatchlessNorm)
    of_coupling = conversion.model[0]._forward_pre_hooks.values()
    assert all(type(hook).__module__.startswith("normswap.layer") for hook in of_coupling)
    assert not conversion.model[3]._forward_pre_hooks
    assert not conversion.model[1]._forward_pre_hooks


def test_the_option_has_two_words() -> None:
    with pytest.raises(UsageError, match="repair is 'all'"):
        _converted(_vit(), _images(10), repair="all")


def test_the_linears_of_gpt2_are_seen() -> None:
    """transformers' Conv1D is a linear whose weight is transposed."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    model = randomise(transformers.GPT2LMHeadModel(config), 3).eval()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(30, (n, 9), generator=generator)} for n in (40, 31)]
    unseen = {"input_ids": torch.randint(30, (20, 9), generator=generator)}
    repaired, plain = _converted(model, data), _converted(model, data, repair="none")
    names = {name.rpartition("h.")[2].partition(".")[2] for fit in repaired.fits for name in fit.repaired}
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    with torch.no_grad():
        distances = [float((c.model(**unseen).logits - model(**unseen).logits).norm()) for c in (repaired, plain)]
    assert distances[0] < 0.8 * distances[1]
