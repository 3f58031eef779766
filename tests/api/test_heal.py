"""Healing: closer to the original on samples it was not trained on, the same curve after an interruption, and an end where it diverges."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import REPOSITORY
from processes import run as run_processes
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.api.heal import DivergedError, Healing, heal
from normswap.errors import LoadError, UsageError
from normswap.healing import run
from normswap.healing.run import trained
from normswap.layer.batchless_norm import BatchlessNorm


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        *(nn.Linear(6, 24), nn.LayerNorm(24), nn.GELU()),
        *(nn.Linear(24, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3)),
    )
    return randomise(nn.Sequential(*layers), 1).eval().double()  # float64, which no machine rounds to bfloat16  # type: ignore[return-value]


def batches(count: int, seed: int = 2, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


HEALER = str(REPOSITORY / "tests/support/two_healers.py")
NET = _net()
CONVERSION = normswap.convert(NET, calibration=batches(4, seed=3), approximate=True, repair="none")
HELD_OUT = batches(4, seed=4)


def _healed(data: Any = None, **options: Any) -> Healing[nn.Module]:
    options = {"tokens": 32 * 60, "lr": 3e-3, "held_out": HELD_OUT, **options}
    return heal(CONVERSION, NET, batches(60) if data is None else data, **options)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _distance(model: nn.Module, data: list[Tensor]) -> float:
    """|y - t| / |t - mean t| on all samples at once, computed otherwise than healing does."""
    x = torch.cat(data)
    with torch.no_grad():
        y, t = model(x), NET(x)
    return ((y - t).norm() / (t - t.mean(0)).norm()).item()


# --- what it does -------------------------------------------------------------------------------------------------------------------------


def test_the_model_comes_closer_on_samples_that_it_has_not_seen() -> None:
    found = _healed()
    assert found.before == pytest.approx(_distance(CONVERSION.model, HELD_OUT), rel=1e-4)
    assert found.after == pytest.approx(_distance(found.model, HELD_OUT), rel=1e-4)
    assert _distance(found.model, batches(6, seed=9)) < 0.75 * _distance(CONVERSION.model, batches(6, seed=9))
    assert (found.curve[0].step, found.curve[-1].step, found.curve[-1].tokens) == (0, 60, 1920)
    assert len(found.curve) == run.MEASUREMENTS + 1
    assert (found.diverged, found.ended, found.rolled_back, found.epochs) == (False, False, 0, 0)


def test_neither_model_is_touched() -> None:
    before = _state(CONVERSION.model), _state(NET)
    random = torch.random.get_rng_state()
    found = _healed(tokens=32 * 5)
    assert _same(_state(CONVERSION.model), before[0])
    assert _same(_state(NET), before[1])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(
        m._forward_hooks for model in (CONVERSION.model, NET, found.model) for m in model.modules() if isinstance(m, nn.LayerNorm)
    )
    assert all(p.grad is None for p in CONVERSION.model.parameters())


class _Halves(nn.Module):
    """Two halves of the channels, each through a net; what is in between, in float32 or rounded, is up to the test."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.GELU())
        self.second = nn.Sequential(nn.Linear(24, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x), x))


def _cancels(y: Tensor, x: Tensor) -> Tensor:
    return (y + 1e4) @ torch.eye(y.shape[-1]) - 1e4


def _takes_one_dtype(y: Tensor, x: Tensor) -> Tensor:
    z = torch.zeros_like(y, dtype=x.dtype)
    z[:, :2] = y[:, :2] @ torch.eye(2)
    return z.index_put((torch.arange(2),), y[:2] @ torch.eye(y.shape[-1])) + y


@pytest.mark.parametrize(
    ("between", "has_units", "expected"),
    [
        (lambda y, x: y, True, {torch.bfloat16}),
        (lambda y, x: y, False, {torch.float32}),
        (_cancels, True, {torch.float32}),
        (_takes_one_dtype, True, {torch.float32}),
    ],
    ids=["rounds", "no units", "rounding is large", "raises in bfloat16"],
)
def test_steps_are_in_bfloat16_where_the_cpu_has_units_for_it_and_the_model_bears_it(
    between: Callable[[Tensor, Tensor], Tensor], has_units: bool, expected: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "multiplies_bfloat16", lambda: has_units)
    net = _Halves(between).eval()
    data = [x.float() for x in batches(60)]
    conversion = normswap.convert(net, calibration=data[:4], approximate=True, repair="none")
    trained_in, losses_of, measured_in = set[torch.dtype](), set[torch.dtype](), set[torch.dtype]()

    def loss(batch: Any, y: Tensor, t: Tensor) -> Tensor:
        losses_of.update({y.dtype, t.dtype})
        return y.sum() * 0

    step, layer = run._Healing._step, nn.Linear.forward

    def in_step(self: Any, group: Any) -> bool:
        def seen(linear: nn.Linear, x: Tensor) -> Tensor:
            y = layer(linear, x)
            trained_in.add(y.dtype)
            return y

        with monkeypatch.context() as inside:
            inside.setattr(nn.Linear, "forward", seen)
            return step(self, group)

    def measured(self: Any) -> tuple[float, float]:
        with torch.no_grad():
            measured_in.add(self.ours.model(data[0]).dtype)
        return on_held_out(self)

    on_held_out = run._Healing._on_held_out
    monkeypatch.setattr(run._Healing, "_step", in_step)
    monkeypatch.setattr(run._Healing, "_on_held_out", measured)
    found = heal(conversion, net, data, tokens=32 * 60, lr=3e-3, held_out=[x.float() for x in HELD_OUT], loss=loss)
    assert trained_in == expected
    assert losses_of == measured_in == {torch.float32}
    assert found.after < 0.9 * found.before
    assert all(p.dtype == torch.float32 for p in found.model.parameters())


def test_the_layers_have_the_statistics_of_what_they_get() -> None:
    found = _healed()
    seen: dict[str, Tensor] = {}
    layers = {name: m for name, m in found.model.named_modules() if isinstance(m, BatchlessNorm)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        found.model(torch.cat(HELD_OUT))
    for name, layer in layers.items():
        mean, std = layer.statistics()
        z = (seen[name] - mean) / std
        assert z.mean(0).abs().max() < 1e-4, name
        assert (z.var(0, unbiased=False) - 1).abs().max() < 1e-3, name


def test_modes_frozen_weights_and_coupling_stay() -> None:
    model = copy.deepcopy(CONVERSION.model).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    coupled = [m.producer is not None for m in model if isinstance(m, BatchlessNorm)]
    assert any(coupled)
    found = heal(model, NET, batches(60), tokens=32 * 60, held_out=HELD_OUT, lr=3e-3)
    assert [m.training for m in found.model] == [m.training for m in model]
    assert torch.equal(found.model[0].weight, model[0].weight)
    assert not torch.equal(found.model[3].weight, model[3].weight)
    assert [m.producer is not None for m in found.model if isinstance(m, BatchlessNorm)] == coupled


def test_one_sample_at_a_time_learns_as_a_batch_does() -> None:
    """V is measured once, on the held-out batches, so that a batch of one has it too."""
    single = [row[None] for batch in batches(12) for row in batch]
    one, many = (_healed(data, tokens=32 * 12, accumulate=n) for data, n in ((single, 32), (batches(12), 1)))
    assert [p.distance for p in one.curve] == pytest.approx([p.distance for p in many.curve], rel=1e-4)
    assert all(torch.isfinite(p).all() for p in one.model.parameters())


def test_a_loss_of_ones_own_is_added() -> None:
    seen = []

    def loss(batch: Any, output: Tensor, target: Tensor) -> Tensor:
        seen.append((batch.shape, output.requires_grad, target.requires_grad))
        return 1000 * (output - target - 0.02).square().mean()

    found, without = _healed(loss=loss), _healed()
    assert ((32, 6), True, False) in seen  # trained on
    assert ((32, 6), False, False) in seen  # measured on the held-out batches
    x = torch.cat(HELD_OUT)
    with torch.no_grad():
        assert (found.model(x) - NET(x)).mean() > 0.01
        assert (without.model(x) - NET(x)).mean().abs() < 0.005


def test_the_loss_kl_is_added_to_what_is_measured() -> None:
    found = _healed(loss="kl", tokens=32 * 5)
    with torch.no_grad():
        q, p = (torch.log_softmax(net(torch.cat(HELD_OUT)), -1) for net in (CONVERSION.model, NET))
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found.curve[0].score - found.curve[0].distance ** 2 == pytest.approx(divergence, rel=1e-6)


def test_the_metric_is_measured_of_the_original_before_and_after() -> None:
    found = _healed(metric=lambda model: _distance(model, HELD_OUT))
    assert found.metric == pytest.approx((0, found.before, found.after), rel=1e-4, abs=1e-6)
    agreement = _healed(metric="neighbours").metric
    assert agreement is not None
    assert agreement[0] == 1
    assert agreement[1] < agreement[2] < 1


# --- text ---------------------------------------------------------------------------------------------------------------------------------


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )
    torch.manual_seed(0)
    return randomise(transformers.BertModel(config, add_pooling_layer=False), 1).eval()


def _texts(count: int, filler: int, seed: int = 5) -> list[dict[str, Tensor]]:
    """Padded batches; filler: the token at positions that do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 300, (6, 11), generator=generator)
        mask = (torch.arange(11) < torch.randint(4, 12, (6, 1), generator=generator)).long()
        found.append({"input_ids": torch.where(mask == 1, ids, filler), "attention_mask": mask})
    return found


def test_padding_does_not_count() -> None:
    model = _bert()
    conversion = normswap.convert(model, calibration=_texts(4, 0), approximate=True, repair="none")
    found = [heal(conversion, model, _texts(20, filler), tokens=600, held_out=_texts(3, filler, 6), lr=1e-3) for filler in (0, 17)]
    assert [p.distance for p in found[0].curve] == pytest.approx([p.distance for p in found[1].curve], rel=1e-4)
    assert found[0].curve[-1].tokens == found[1].curve[-1].tokens >= 600
    assert found[0].after < found[0].before


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    model = _bert()
    conversion = normswap.convert(model, calibration=_texts(4, 0), approximate=True, repair="none")
    empty = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    held_out = _texts(3, 0, 6)
    plain, mixed = (
        heal(conversion, model, data, tokens=300, held_out=[*held_out, *more], lr=1e-3)
        for data, more in ((_texts(20, 0), []), (_texts(20, 0), [empty]))
    )
    assert [p.distance for p in mixed.curve] == pytest.approx([p.distance for p in plain.curve], rel=1e-4)
    among = heal(conversion, model, [empty, *_texts(20, 0)], tokens=300, held_out=held_out, lr=1e-3)
    assert among.rolled_back == 0
    assert among.curve[-1].tokens == plain.curve[-1].tokens


def test_a_table_with_rows_that_a_batch_does_not_have_stays_and_a_tied_one_trains() -> None:
    names = trained(_bert(), 66)
    assert "embeddings.position_embeddings.weight" in names
    assert "embeddings.word_embeddings.weight" not in names
    assert "embeddings.word_embeddings.weight" in trained(_bert(), 400)
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 300, bias=False))
    assert "0.weight" not in trained(tied, 66)
    tied[1].weight = tied[0].weight
    assert "0.weight" in trained(tied, 66)


# --- data ---------------------------------------------------------------------------------------------------------------------------------


def test_the_first_samples_are_held_out_and_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out batches are run to measure, 21 times and once for V; what is trained on is run once."""
    seen: list[float] = []

    def loss(batch: Any, output: Tensor, target: Tensor) -> Tensor:
        if output.requires_grad:
            seen.append(batch[0, 0].item())
        return output.sum() * 0

    data = batches(20)
    for given in (data, iter(data)):
        seen.clear()
        _healed(given, held_out=None, tokens=32 * 12, loss=loss)
        assert seen == [batch[0, 0].item() for batch in data[4:16]]  # 4 x 32 = 128


def test_data_that_end_begin_again_where_they_can() -> None:
    again, once = _healed(batches(8), tokens=32 * 20), _healed(iter(batches(8)), tokens=32 * 20)
    assert (again.epochs, again.ended, again.curve[-1].step) == (2, False, 20)
    assert (once.epochs, once.ended, once.curve[-1].step) == (0, True, 8)


def test_the_order_of_an_epoch_is_asked_for() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches(4, seed=self.epochs[-1]))

    shuffled = Shuffled()
    _healed(shuffled, tokens=32 * 9)
    assert shuffled.epochs == [0, 1, 2]


# --- interrupted --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [7, 31])
def test_an_interrupted_run_goes_on_to_the_same_curve(stop: int, tmp_path: Path) -> None:
    path = tmp_path / "state"
    whole = _healed(batches(25))
    steps = 0

    def progress(distance: float, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _healed(batches(25), checkpoint=path, progress=progress)
    assert path.exists()
    found = _healed(batches(25), checkpoint=path)
    assert [(p.step, p.tokens, p.loss, p.distance) for p in found.curve][1:] == [
        (p.step, p.tokens, p.loss, p.distance) for p in whole.curve
    ][1:]
    assert _same(_state(found.model), _state(whole.model))
    assert (found.epochs, found.rolled_back) == (whole.epochs, whole.rolled_back)
    assert not path.exists()


def test_the_state_of_another_healing_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "state"

    def stop(distance: float, done: int, total: int) -> None:
        if done >= 32 * 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _healed(checkpoint=path, progress=stop)
    with pytest.raises(UsageError, match=r"state is of a healing with lr 0\.003, and this one has 0\.1") as error:
        _healed(checkpoint=path, lr=0.1)
    assert error.value.hint == f"delete {path} to begin anew"
    torch.save(torch.zeros(3), path)
    with pytest.raises(LoadError, match="is not the state of a healing: another program wrote it, or another version of normswap"):
        _healed(checkpoint=path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(LoadError, match="state is not the state of a healing"):
        _healed(checkpoint=path)
    assert path.read_bytes() == b"PK\x03\x04 something else"


# --- divergence ---------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_ends_with_the_best_state() -> None:
    with pytest.raises(
        DivergedError, match=r"healing diverged: the distance to the original rose 4 times, the smallest was 0\.\d+"
    ) as error:
        _healed(lr=1e4)
    found = error.value.healing
    assert error.value.exit_code == 3
    assert found.diverged
    assert found.rolled_back == 4
    assert found.after == found.before == pytest.approx(_distance(found.model, HELD_OUT), rel=1e-4)


def test_one_bad_batch_is_gone_back_from() -> None:
    data = batches(60)
    data[20] = torch.full_like(data[20], torch.nan)
    found = _healed(data)
    assert found.rolled_back == 1
    assert not found.diverged
    assert found.after < 0.8 * found.before


class Put(nn.Module):
    """A net, and what is made of its output and its input."""

    calls: Tensor

    def __init__(self, out: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.out = _net(), out
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        return self.out(self.net(x), x)


def _put(out: Callable[[Tensor, Tensor], Any], **options: Any) -> Healing[Put]:
    model = Put(out).eval()
    conversion = normswap.convert(model, calibration=batches(4, seed=3), approximate=True, repair="none")
    found = heal(conversion, model, batches(20), tokens=32 * 20, held_out=HELD_OUT, lr=3e-3, **options)
    assert conversion.model.calls == found.model.calls == 0  # as in the model
    return found


ODD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "masked with -inf": lambda y, x: y.masked_fill(torch.tensor([True, False, False]), -torch.inf),
    "complex": lambda y, x: torch.fft.fft(y),
    "no samples, and some": lambda y, x: (y[:0], y[:, :0], y),
    "sparse, and dense": lambda y, x: (y.to_sparse(), y, None, 3),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_outputs_are_healed(case: str) -> None:
    found = _put(ODD[case])
    assert found.after < found.before


@pytest.mark.parametrize("masked", [False, True])
def test_an_output_for_each_position_of_texts_of_several_lengths(masked: bool) -> None:
    """Logits of where an answer begins, (N, T), and a map of attention, (N, T, T)."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
            y = self.net(x)
            return y[..., 0], y @ y.mT

    torch.manual_seed(0)
    data: list[Any] = [torch.randn(4, length, 6, dtype=torch.float64) for length in (3, 5, 4, 7) * 6]
    if masked:
        data = [{"x": x, "attention_mask": (torch.arange(x.shape[1]) < 3).long().expand(4, -1)} for x in data]
    model = Places().eval()
    conversion = normswap.convert(model, calibration=data[:8], approximate=True, repair="none")
    found = heal(conversion, model, data, tokens=800, held_out=data[:4], lr=3e-3)
    assert found.after < found.before


@torch.no_grad()
def _without_gradient(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)  # type: ignore[no-any-return]


class Untrainable(Put):
    def forward(self, x: Tensor) -> Any:
        return _without_gradient(self.net, x)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], dict[str, Any], str]] = {
    "one number": (lambda y, x: y.sum(), {}, "the model returns no floating tensor of samples"),
    "a loss that raises": (lambda y, x: y, {"loss": lambda *given: 1 / 0}, "loss raised ZeroDivisionError: division by zero"),
    "a loss per sample": (
        lambda y, x: y,
        {"loss": lambda b, y, t: y - t},
        r"loss returned a tensor of shape \(32, 3\); expected one number",
    ),
    "a loss that is nan": (lambda y, x: y, {"loss": lambda *given: torch.nan}, "loss is nan on the held-out batches, before any step"),
    "a metric that raises": (lambda y, x: y, {"metric": lambda model: 1 / 0}, "raised ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_distance_is_said(case: str) -> None:
    out, options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        _put(out, **options)


def test_outputs_that_are_not_numbers_are_said() -> None:
    nan = [torch.full_like(batch, torch.nan) for batch in HELD_OUT]
    with pytest.raises(UsageError, match="an output of the original has no finite number on the held-out batches"):
        _healed(held_out=nan)


def test_another_original_and_a_model_without_gradients_are_said() -> None:
    other = nn.Sequential(*list(NET)[:6], nn.Linear(20, 4).double()).eval()
    with pytest.raises(UsageError, match=r"returns a tensor of shape \(32, 3\), and in the original one of shape \(32, 4\)"):
        heal(CONVERSION, other, batches(9), tokens=32, held_out=HELD_OUT)
    model = Untrainable(lambda y, x: y).eval()
    conversion = normswap.convert(model, calibration=batches(4, seed=3), approximate=True)
    with pytest.raises(UsageError, match="the outputs of the model have no gradient, so it cannot be trained"):
        heal(conversion, model, batches(9), tokens=32, held_out=HELD_OUT)


def test_it_heals_in_inference_mode_and_the_last_batches_of_a_step_are_not_lost() -> None:
    with torch.inference_mode():
        found = _healed(iter(batches(20)), tokens=640, accumulate=3)
    assert (found.curve[-1].step, found.curve[-1].tokens) == (7, 640)
    assert found.curve[-1].distance != found.before


def test_a_metric_that_ends_in_train_mode_changes_nothing() -> None:
    def metric(model: nn.Module) -> float:
        assert not model.training
        model.train()
        return 1.0

    model = copy.deepcopy(NET).train()
    found = heal(CONVERSION, model, batches(9), tokens=32 * 9, held_out=HELD_OUT, lr=3e-3, metric=metric)
    assert model.training
    plain = heal(CONVERSION, NET, batches(9), tokens=32 * 9, held_out=HELD_OUT, lr=3e-3)
    assert _same(_state(found.model), _state(plain.model))


# --- refused ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": None}, "healing needs a budget"),
        ({"tokens": 0}, "the budget is None minutes and 0 tokens; expected numbers above 0"),
        ({"minutes": float("inf")}, "the budget is inf minutes and 1920 tokens; expected numbers above 0"),
        ({"loss": "kld"}, r"loss is 'kld'; expected one of 'kl'"),
        ({"lr": 0.0}, r"lr is 0\.0 and accumulate 1; expected numbers above 0"),
        ({"tokens": float("nan")}, "the budget is None minutes and nan tokens; expected numbers above 0"),
        ({"lr": float("inf")}, "lr is inf and accumulate 1; expected numbers above 0"),
        ({"accumulate": 1.5}, r"lr is 0\.003 and accumulate 1\.5; expected numbers above 0, and a whole one for accumulate"),
        ({"data": []}, "the data hold no batch"),
        ({"data": "texts"}, "the data are a str; expected an iterable of batches"),
        ({"data": 5}, "the data are an int; expected an iterable of batches"),
        ({"data": [torch.zeros(0, 6).double()] * 200}, "the held-out batches hold no position that counts"),
        ({"data": [torch.zeros(0, 6).double()] * 9, "held_out": HELD_OUT}, "the data hold no position that counts"),
        ({"held_out": HELD_OUT[0]}, "held_out is a Tensor; expected an iterable of batches"),
        ({"data": torch.zeros(2, 6)}, "the data are a Tensor; expected an iterable of batches"),
        ({"data": batches(2)}, "all of the data are held out, and none are left to train on"),
        ({"held_out": []}, "held_out holds no batch"),
        ({"data": [torch.zeros(2, 5).double()] * 30, "held_out": None}, "the model does not take the data: RuntimeError"),
        ({"metric": "rank"}, "metric is 'rank'; expected one of 'neighbours'"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], message: str) -> None:
    options = {"held_out": None, **options}
    with pytest.raises(UsageError, match=message):
        _healed(**options)


def test_a_model_in_half_precision_or_without_trainable_weights_is_refused() -> None:
    with pytest.raises(UsageError, match=r"0\.weight is torch\.bfloat16, in which small steps are lost"):
        heal(
            copy.deepcopy(CONVERSION.model).bfloat16(),
            copy.deepcopy(NET).bfloat16(),
            batches(9),
            tokens=9,
            held_out=[HELD_OUT[0].bfloat16()],
        )
    with pytest.raises(UsageError, match="no parameter of the model may be trained"):
        heal(copy.deepcopy(CONVERSION.model).requires_grad_(False), NET, batches(9), tokens=9, held_out=HELD_OUT)


# --- several processes --------------------------------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    run_processes([[sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", HEALER, str(tmp_path)]])
    alone = _healed(batches(40), tokens=32 * 40, accumulate=2)
    for rank in (0, 1):
        state, curve = torch.load(tmp_path / f"{rank}.pt")
        # float64, of which the held-out batches are summed in another order; a step sums two gradients, which has only one
        assert curve == pytest.approx([point.distance for point in alone.curve], rel=1e-12)
        for name, tensor in alone.model.state_dict().items():
            assert torch.equal(state[name], tensor), name
