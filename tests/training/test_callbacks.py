"""The callbacks in the real Trainers of transformers and Lightning: parameters as after a loop written by hand."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normswap
from fixtures.nets import randomise
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training import huggingface, lightning
from normswap.training.drift import drift

LR, DECAY = 0.05, 0.3


class Net(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), norm(7), nn.ReLU(inplace=True), nn.Linear(7, 6), norm(6), nn.Tanh(), nn.Linear(6, 3))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        if self.training:
            self.seen.append((x, labels))
        loss = cross_entropy(logits, labels)
        if any(isinstance(m, BatchlessNorm) and m.aux == "explicit" for m in self.modules()):
            loss = loss + normswap.aux_loss(self)
        return {"loss": loss, "logits": logits}


class CountsItems(Net):
    """As the language models of transformers do, where the Trainer leaves the loss as it is."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        found = super().forward(x, labels)
        items = kwargs.get("num_items_in_batch")
        return found if items is None else found | {"loss": found["loss"] * len(x) / items}


def net(cls: type[Net] = Net, coupling: Any = "none", **options: Any) -> Net:
    torch.manual_seed(1)
    original = randomise(cls(), 3).eval().double()
    return normswap.convert(original, torch.randn(4, 5).double(), coupling=coupling, **options).model


def data(n: int = 22) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(5, generator=generator).double() * 3 + 2, "labels": torch.tensor(i % 3)} for i in range(n)]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return normswap.param_groups(model, lr=LR, weight_decay=DECAY)


def by_hand(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: Iterable[int], *, clip: float | None = None, k: int | None = None
) -> None:
    """The loop that a Trainer stands for: `steps` are the numbers of micro-batches of each step; k: what the loss is divided by."""
    model.train()
    optimizer = torch.optim.AdamW(groups(model))
    task = [p for group in optimizer.param_groups if "normswap" not in group for p in group["params"]]
    left = iter(batches)
    for n in steps:
        if model_is_auto(model):
            normswap.attach(model, accumulate=k or n)
        optimizer.zero_grad()
        for _ in range(n):
            (model(*next(left))["loss"] / (k or n)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(task, clip)
        optimizer.step()
    assert next(left, None) is None


def model_is_auto(model: nn.Module) -> bool:
    return any(isinstance(m, BatchlessNorm) and m.aux == "auto" for m in model.modules())


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def moved(a: nn.Module, b: nn.Module) -> bool:
    return all(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def layers(model: nn.Module) -> list[BatchlessNorm]:
    return [m for m in model.modules() if isinstance(m, BatchlessNorm)]


# --- the drift ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ["auto", "explicit"])
@pytest.mark.parametrize("stats", ["natural", "raw"])
@pytest.mark.parametrize("options", [{}, {"std": "inv", "reduction": "sum"}, {"std": "abs"}])
def test_the_drift_is_that_of_z(aux: Any, stats: Any, options: dict[str, Any]) -> None:
    layer = BatchlessNorm(3, aux=aux, stats=stats, dtype=torch.float64, **options)
    layer.set_statistics(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 2.0, 3.0]))
    x = torch.randn(8, 3, 5, dtype=torch.float64) * 2 + 1
    if aux == "auto":
        normswap.attach(layer, accumulate=4)
    for part in x.chunk(4):
        loss = layer(part).square().mean() + (normswap.aux_loss(layer) if aux == "explicit" else 0)
        (loss / 4).backward()
    mean, std = (t.detach().view(3, 1) for t in layer.statistics())
    z = (x - mean) / std
    found = drift(layer)[""]
    torch.testing.assert_close(found.mean_z, z.mean((0, 2)).square().mean().sqrt())
    torch.testing.assert_close(found.mean_z2, z.square().mean())


def test_no_drift_where_the_statistics_fit() -> None:
    layer = BatchlessNorm(3, aux="auto", dtype=torch.float64)
    x = torch.randn(8, 3, 5, dtype=torch.float64) * 2 + 1
    layer.set_statistics(x.mean((0, 2)), x.transpose(0, 1).flatten(1).std(1, correction=0))
    layer(x).sum().backward()
    found = drift(layer)[""]
    assert abs(found.mean_z.item()) < 1e-12
    assert abs(found.mean_z2.item() - 1) < 1e-12
    assert found.limit_hits is None


def test_drift_of_a_layer_that_is_called_twice() -> None:
    layer = BatchlessNorm(2, aux="auto", stats="raw", dtype=torch.float64)
    layer.calls = 2
    a, b = (torch.randn(4, 2, dtype=torch.float64) + i for i in range(2))
    (layer(a).sum() + layer(b).sum()).backward()
    torch.testing.assert_close(drift(layer)[""].mean_z2, torch.cat([a, b]).square().mean())


def test_layers_without_a_gradient_have_no_drift() -> None:
    model = net().train()
    first, _ = layers(model)
    first.mean.requires_grad_(False)
    first.std_parameter.requires_grad_(False)
    model(torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert list(drift(model)) == ["body.4"]
    model.zero_grad()
    model.eval()(torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert drift(model) == {}


# --- transformers -----------------------------------------------------------------------------------------------------------------------


def trainer(model: nn.Module, tmp_path: Path, *, callback: Any = None, **options: Any) -> transformers.Trainer:
    optimizer = options.pop("optimizer", "groups")
    scaler = options.pop("scaler", None)
    arguments = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, "max_grad_norm": 0.0, "learning_rate": LR}
    args = transformers.TrainingArguments(
        tmp_path,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **(arguments | options),
    )
    made = torch.optim.AdamW(groups(model)) if optimizer == "groups" else optimizer
    callbacks = [callback or huggingface.NormswapCallback()]
    built = transformers.Trainer(model, args, train_dataset=data(), eval_dataset=data(3), optimizers=(made, None), callbacks=callbacks)
    if scaler is not None:  # accelerate makes one for fp16, which it refuses without a GPU
        built.accelerator.scaler = scaler
    return built


HF_STEPS = {1: [1] * 11, 4: [4, 4, 3]}  # 22 samples in batches of 2


@pytest.mark.parametrize("aux", ["auto", "explicit"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_transformers(accumulate: int, aux: Any, tmp_path: Path) -> None:
    model = net(aux=aux)
    before, reference = copy.deepcopy(model), copy.deepcopy(model)
    built = trainer(model, tmp_path, gradient_accumulation_steps=accumulate)
    built.train()
    assert moved(model, before)
    by_hand(reference, model.seen, HF_STEPS[accumulate])
    assert_same(model, reference)
    logs = [entry for entry in built.state.log_history if "loss" in entry]
    assert len(logs) == len(HF_STEPS[accumulate])
    for name in ("body.1", "body.4"):
        assert {f"normswap/{name}/mean_z", f"normswap/{name}/mean_z2"} <= set(logs[0])
    assert not any(key.startswith("normswap") for key in built.state.log_history[-1])


@pytest.mark.parametrize("trend", [True, False])
@pytest.mark.parametrize("cls", [Net, CountsItems])
def test_transformers_with_coupled_statistics(cls: Any, trend: bool, tmp_path: Path) -> None:
    """With the trend two whole steps: of a shorter last one the Trainer learns too late, and takes away a part of the trend."""
    model = net(cls, coupling="auto")
    for layer in layers(model):
        assert layer.producer is not None
        if not trend:
            layer.disable_trend()
    reference = copy.deepcopy(model)
    trainer(model, tmp_path, gradient_accumulation_steps=4, **({"max_steps": 2} if trend else {})).train()
    by_hand(reference, model.seen, [4, 4] if trend else HF_STEPS[4])
    assert_same(model, reference)


def test_transformers_with_a_loss_that_is_not_divided(tmp_path: Path) -> None:
    model = net(CountsItems)
    reference = copy.deepcopy(model)
    assert trainer(model, tmp_path, gradient_accumulation_steps=4).model_accepts_loss_kwargs
    trainer(model, tmp_path, gradient_accumulation_steps=4).train()
    by_hand(reference, model.seen, HF_STEPS[4])
    assert_same(model, reference)


def test_transformers_with_its_own_optimizer(tmp_path: Path) -> None:
    """Without weight decay its groups differ in nothing that matters: the statistics step by themselves."""
    model = net()
    reference = copy.deepcopy(model)
    trainer(model, tmp_path, optimizer=None).train()
    torch_model = copy.deepcopy(reference)
    by_hand_plain(torch_model, model.seen, weight_decay=0.0)
    assert_same(model, torch_model)


def by_hand_plain(model: nn.Module, batches: list[tuple[Tensor, Tensor]], weight_decay: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(normswap.param_groups(model, lr=LR, weight_decay=weight_decay))
    for x, labels in batches:
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()


def test_weight_decay_of_transformers_does_not_reach_the_statistics(tmp_path: Path) -> None:
    found = []
    for decay in (0.0, 0.9):
        model = net()
        for p in set(model.parameters()) - {p for layer in layers(model) for p in (layer.mean, layer.std_parameter)}:
            p.requires_grad_(p is model.body[6].weight)  # so that what the statistics see does not depend on the decay
        trainer(model, tmp_path, optimizer=None, weight_decay=decay).train()
        found.append(model)
    assert not torch.equal(found[0].body[6].weight, found[1].body[6].weight)
    for a, b in zip(*map(layers, found), strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.log_std, b.log_std)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_transformers_with_a_grad_scaler(accumulate: int, max_grad_norm: float | None, tmp_path: Path) -> None:
    model = net()
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    callback = huggingface.NormswapCallback(max_grad_norm=max_grad_norm)
    trainer(model, tmp_path, gradient_accumulation_steps=accumulate, scaler=scaler, callback=callback).train()
    by_hand(reference, model.seen, HF_STEPS[accumulate], clip=max_grad_norm)
    assert_same(model, reference)
    assert all(layer.run.scaler is None and layer.run.accumulate == 1 for layer in layers(model))


def test_transformers_logs_the_drift_of_the_step(tmp_path: Path) -> None:
    model = net()
    reference = copy.deepcopy(model)
    built = trainer(model, tmp_path, gradient_accumulation_steps=11)
    built.train()
    x = torch.cat([x for x, _ in model.seen])
    h = reference.body[0](x)
    mean, std = reference.body[1].statistics()
    z = (h - mean) / std
    log = built.state.log_history[0]
    assert log["normswap/body.1/mean_z"] == pytest.approx(z.mean(0).square().mean().sqrt().item())
    assert log["normswap/body.1/mean_z2"] == pytest.approx(z.square().mean().item())


@pytest.mark.parametrize("coupling", ["none", "auto"])
def test_transformers_clips_the_others_only(coupling: Any, tmp_path: Path) -> None:
    model = net(coupling=coupling)
    reference = copy.deepcopy(model)
    built = trainer(model, tmp_path, callback=huggingface.NormswapCallback(max_grad_norm=0.1))
    built.train()
    by_hand(reference, model.seen, HF_STEPS[1], clip=0.1)
    assert_same(model, reference)
    assert built.state.log_history[0]["normswap/grad_norm"] > 0.1


@pytest.mark.parametrize(("decay", "optimizer"), [(0.2, None), (0.0, None), (0.2, "groups")])
def test_weight_decay_of_transformers_on_the_weights_of_norms(decay: float, optimizer: Any, tmp_path: Path) -> None:
    """It knows norms by class and name, and these by neither."""
    built = trainer(net(), tmp_path, optimizer=optimizer, weight_decay=decay, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built.train()
    found = [str(w.message) for w in caught if "weight decay" in str(w.message)]
    expected = (
        "weight decay reaches the weights of body.1, body.4, which are norms. Give the Trainer an optimizer: Trainer(..., optimizers="
    )
    assert [m.startswith(expected) for m in found] == ([True] if (decay, optimizer) == (0.2, None) else [])


def test_transformers_that_clips_everything_is_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(net(), tmp_path, max_grad_norm=1.0, max_steps=1).train()
    messages = [str(w.message) for w in caught]
    assert any(
        m.startswith("max_grad_norm of TrainingArguments, whose default is 1.0, clips the gradients of all parameters together.")
        and "Say TrainingArguments(max_grad_norm=0.0) and NormswapCallback(max_grad_norm=...)" in m
        for m in messages
    )
    assert sum(re.match(r"the gradients of the statistics of .*BatchlessNorm.* were changed", m) is not None for m in messages) == 1


def test_transformers_with_raw_statistics_among_weights(tmp_path: Path) -> None:
    built = trainer(net(stats="raw"), tmp_path, optimizer=None, weight_decay=0.2, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built.train()
    assert (
        'the statistics of body.1, body.4 were converted with stats="raw" and are in a group with weights, with weight_decay 0.2. '
        "Give the Trainer an optimizer: Trainer(..., optimizers=(torch.optim.AdamW(normswap.param_groups(model, lr=...)), None)). "
        'Or convert with stats="natural"'
    ) in [str(w.message) for w in caught]


def test_transformers_with_raw_statistics_in_their_group(tmp_path: Path) -> None:
    trainer(net(stats="raw"), tmp_path, max_steps=1).train()


def test_transformers_whose_optimizer_lacks_the_statistics(tmp_path: Path) -> None:
    model = net()
    built = trainer(model, tmp_path, optimizer=torch.optim.SGD(model.body[0].parameters(), lr=LR), max_steps=1)
    with pytest.warns(
        UserWarning, match=r"^no optimizer holds the statistics of body.1, body.4, so they stay as they are. Give the Trainer"
    ):
        built.train()


def test_transformers_with_frozen_statistics_is_silent(tmp_path: Path) -> None:
    model = net()
    for layer in layers(model):
        layer.mean.requires_grad_(False)
        layer.log_std.requires_grad_(False)
    trainer(model, tmp_path, optimizer=None, max_steps=1, max_grad_norm=1.0).train()


def test_transformers_without_a_norm(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^Net has no BatchlessNorm layer\nhint: normswap.convert"):
        trainer(Net().double(), tmp_path, optimizer=None).train()


def test_transformers_evaluates_in_between(tmp_path: Path) -> None:
    model = net()
    reference = copy.deepcopy(model)
    built = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=4)
    built.train()
    by_hand(reference, model.seen, HF_STEPS[4])
    assert_same(model, reference)
    assert not any("normswap" in key for entry in built.state.log_history if "eval_loss" in entry for key in entry)


# --- Lightning --------------------------------------------------------------------------------------------------------------------------

QUIET = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.* is deprecated:FutureWarning")


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module, optimizer: str = "groups") -> None:
        super().__init__()
        self.net = net.train()
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "groups":
            return torch.optim.AdamW(groups(self))
        parameters = self.parameters() if self.optimizer == "all" else self.net.body[0].parameters()
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)


class ClipsItself(Module):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        task = [p for group in optimizer.param_groups if "normswap" not in group for p in group["params"]]
        nn.utils.clip_grad_norm_(task, gradient_clip_val)


def fit(module: Module, tmp_path: Path, *, callbacks: list[Any] | None = None, **options: Any) -> pl.Trainer:
    built = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks or [lightning.NormswapCallback()],
        **({"max_epochs": 1} | options),
    )
    rows = data()
    dataset = TensorDataset(torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows]))
    built.fit(module, DataLoader(dataset, batch_size=2))
    return built


@QUIET
@pytest.mark.parametrize("aux", ["auto", "explicit"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_lightning(accumulate: int, aux: Any, tmp_path: Path) -> None:
    model = net(aux=aux)
    before, reference = copy.deepcopy(model), copy.deepcopy(model)
    built = fit(Module(model), tmp_path, accumulate_grad_batches=accumulate)
    assert moved(model, before)
    by_hand(reference, model.seen, HF_STEPS[accumulate], k=accumulate)
    assert_same(model, reference)
    for name in ("net.body.1", "net.body.4"):
        assert {f"normswap/{name}/mean_z", f"normswap/{name}/mean_z2"} <= set(built.callback_metrics)
    assert all(layer.run.accumulate == 1 for layer in layers(model))


@QUIET
def test_lightning_with_scheduled_accumulation(tmp_path: Path) -> None:
    model = net()
    reference = copy.deepcopy(model)
    schedule = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 11})
    fit(Module(model), tmp_path, callbacks=[lightning.NormswapCallback(), schedule], max_epochs=2)
    by_hand(reference, model.seen, [1] * 11 + [11])
    assert_same(model, reference)


@QUIET
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_lightning_with_a_grad_scaler(accumulate: int, max_grad_norm: float | None, tmp_path: Path, monkeypatch: Any) -> None:
    """Without its autocast, so that the scaler alone is seen: float64 leaves nothing to tolerance."""
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda self: torch.autocast("cpu", enabled=False))
    model = net()
    reference = copy.deepcopy(model)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536.0))
    callback = lightning.NormswapCallback(max_grad_norm=max_grad_norm)
    fit(Module(model), tmp_path, plugins=[precision], accumulate_grad_batches=accumulate, callbacks=[callback])
    by_hand(reference, model.seen, HF_STEPS[accumulate], k=accumulate, clip=max_grad_norm)
    assert_same(model, reference)
    assert all(layer.run.scaler is None for layer in layers(model))


@QUIET
@pytest.mark.parametrize("coupling", ["none", "auto"])
def test_lightning_clips_the_others_only(coupling: Any, tmp_path: Path) -> None:
    model = net(coupling=coupling)
    reference = copy.deepcopy(model)
    built = fit(Module(model), tmp_path, callbacks=[lightning.NormswapCallback(max_grad_norm=0.1)])
    by_hand(reference, model.seen, HF_STEPS[1], clip=0.1)
    assert_same(model, reference)
    assert built.callback_metrics["normswap/grad_norm"] > 0.1


@QUIET
def test_lightning_that_clips_everything_is_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Module(net()), tmp_path, gradient_clip_val=1.0, max_steps=1)
    messages = [str(w.message) for w in caught]
    assert any(
        m.startswith("gradient_clip_val of the Trainer clips the gradients of all parameters together.")
        and "Say Trainer(gradient_clip_val=None) and NormswapCallback(max_grad_norm=...)" in m
        for m in messages
    )
    assert sum(re.match(r"the gradients of the statistics of .*BatchlessNorm.* were changed", m) is not None for m in messages) == 1


@QUIET
def test_lightning_with_a_module_that_clips_by_itself_is_silent(tmp_path: Path) -> None:
    fit(ClipsItself(net()), tmp_path, gradient_clip_val=1.0, max_steps=1)


@QUIET
def test_lightning_with_raw_statistics_among_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Module(net(stats="raw"), "all"), tmp_path, max_steps=1)
    assert (
        'the statistics of net.body.1, net.body.4 were converted with stats="raw" and are in a group with weights, with weight_decay 0.3. '
        "Return an optimizer of all of them from configure_optimizers: torch.optim.AdamW(normswap.param_groups(self, lr=...)). "
        'Or convert with stats="natural"'
    ) in [str(w.message) for w in caught]


@QUIET
@pytest.mark.parametrize(("stats", "optimizer"), [("raw", "groups"), ("natural", "all")])
def test_lightning_is_silent(stats: Any, optimizer: str, tmp_path: Path) -> None:
    fit(Module(net(stats=stats), optimizer), tmp_path, max_steps=1)


@QUIET
def test_lightning_whose_optimizer_lacks_the_statistics(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^no optimizer holds the statistics of net.body.1, net.body.4, so they stay as they are. Return"):
        fit(Module(net(), "first"), tmp_path, max_steps=1)


@QUIET
def test_lightning_without_a_norm(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^Module has no BatchlessNorm layer\nhint: normswap.convert"):
        fit(Module(Net().double(), "all"), tmp_path)


class Breaks(Module):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 2:
            raise RuntimeError("broken")
        return super().training_step(batch, index)


@QUIET
def test_lightning_that_breaks_leaves_nothing_told(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(RuntimeError, match="broken"):
        fit(Breaks(model), tmp_path, accumulate_grad_batches=4)
    assert all(layer.run.accumulate == 1 for layer in layers(model))


# --- both -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [huggingface, lightning])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_norm_that_is_none(module: Any, value: float) -> None:
    with pytest.raises(UsageError, match=r"^max_grad_norm is .*; expected a number above 0, or None for no clipping$"):
        module.NormswapCallback(max_grad_norm=value)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_extra_is_only_needed_by_its_callback() -> None:
    """Of a process that has neither, each."""
    ran = python("""
import sys
sys.modules["transformers"] = sys.modules["lightning"] = None
import normswap, normswap.training
normswap.param_groups
for name in ("huggingface", "lightning"):
    try:
        getattr(normswap.training, name)
    except ImportError as error:
        print(error)
""")
    assert (ran.returncode, ran.stderr) == (0, "")
    transformers_, lightning_ = ran.stdout.splitlines()
    assert transformers_.startswith("normswap.training.huggingface needs the Trainer of transformers")
    assert lightning_.startswith("normswap.training.lightning needs Lightning")
    assert all("pip install 'normswap[" in line for line in (transformers_, lightning_))


def test_no_other_name_is_imported() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        normswap.training.nothing  # noqa: B018
