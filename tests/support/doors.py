"""What test_doors.py compares: small nets, every way in which they are trained for one step, and the gradients by the formulas.

python doors.py RANK DIRECTORY      one of two processes: the cells of DDP, written to DIRECTORY/RANK.pt
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision_shim  # noqa: F401  before anything imports torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normswap

SAMPLES, SCALE, LR = 8, 65536.0, 0.05


class Kind(NamedTuple):
    """A net: its parts, the shape of a sample and of its target, and, for each of its norms, where it is and its eps and momentum."""

    parts: Any
    sample: tuple[int, ...]
    target: tuple[int, ...]
    norms: dict[int, tuple[float, float]]
    axis: int


NETS = {
    "conv": Kind(
        lambda: (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 3, 2),
            nn.BatchNorm2d(3, eps=2e-2, momentum=0.03),
            nn.SiLU(inplace=True),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
        (2, 7, 5),
        (5,),
        {1: (1e-3, 0.2), 4: (2e-2, 0.03)},
        1,
    ),
    "mlp": Kind(
        lambda: (
            nn.Linear(5, 7),
            nn.LayerNorm(7, eps=1e-2),
            nn.GELU(),
            nn.Linear(7, 6),
            nn.LayerNorm(6, eps=3e-2),
            nn.Tanh(),
            nn.Linear(6, 2),
        ),
        (3, 5),
        (3, 2),
        {1: (1e-5, 0.1), 4: (1e-5, 0.1)},  # BatchNorm's: a LayerNorm says nothing of statistics of a population
        -1,
    ),
}


@functools.cache
def batch(net: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    kind = NETS[net]
    x, y = (torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64) for shape in (kind.sample, kind.target))
    return x * 1.5 + 0.5, y


@functools.cache
def _built(net: str, aux: Any, stats: Any) -> nn.Sequential:
    torch.manual_seed(3)
    kind, (x, _) = NETS[net], batch(net)
    source = nn.Sequential(*kind.parts()).double().eval()
    model = normswap.convert(source, x[:2], aux=aux, stats=stats, approximate=True, calibration=[x], coupling="none").model.train()
    for index in kind.norms:  # statistics that do not fit
        norm = model[index]
        norm.set_statistics(torch.randn_like(norm.mean), torch.rand_like(norm.mean) + 0.4)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


# --- the formulas ------------------------------------------------------------------------------------------------------------------------


@functools.cache
def reference(net: str, stats: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the gradient by every parameter, mean and log_std after one step) of the whole batch in one pass, in float64.

        y = (x - sg(mean)) / sg(std) weight + bias
        L = mean_c(log std) + 1/2 mean(((sg(x) - mean) / std)^2)

    stats="raw" is the gradient of the task's loss plus each norm's L. "natural" has C std^2 and C/2 times those of L by mean and log std,
    the latter with eps in the variance, whose step is BatchNorm's running average with the momentum a:

        mean <- (1 - a) mean + a m          std^2 <- (1 - a) std^2 + a (mean((x - mean)^2) + eps)
    """
    kind, (h, target) = NETS[net], batch(net)
    p = {name: t.detach().clone().requires_grad_() for name, t in _built(net, "auto", stats).named_parameters()}
    nll, after, natural = torch.zeros((), dtype=torch.float64), {}, {}
    for i, part in enumerate(kind.parts()):
        if i in kind.norms:
            shape = [1] * h.dim()
            shape[kind.axis] = -1
            mean, log_std, weight, bias = (p[f"{i}.{name}"].view(shape) for name in ("mean", "log_std", "weight", "bias"))
            std = log_std.exp()
            nll = nll + log_std.mean() + ((h.detach() - mean) / std).square().mean() / 2
            with torch.no_grad():
                (eps, a), rest = kind.norms[i], [axis for axis, size in enumerate(shape) if size == 1]
                square = (h - mean).square().mean(rest)
                var, channels = std.square().flatten(), mean.numel()
                after[f"{i}.mean"] = (1 - a) * mean.flatten() + a * h.mean(rest)
                after[f"{i}.log_std"] = ((1 - a) * var + a * (square + eps)).log() / 2
                natural[f"{i}.mean"] = (channels * var, 0.0)
                natural[f"{i}.log_std"] = (channels / 2, -eps / var / 2)
            h = (h - mean.detach()) / std.detach() * weight + bias
        elif isinstance(part, nn.Conv2d):
            h = F.conv2d(h, p[f"{i}.weight"], p[f"{i}.bias"])
        elif isinstance(part, nn.Linear):
            h = F.linear(h, p[f"{i}.weight"], p[f"{i}.bias"])
        else:
            h = {"ReLU": F.relu, "SiLU": F.silu, "GELU": F.gelu, "Tanh": torch.tanh, "Flatten": lambda t: t.flatten(1)}[
                type(part).__name__
            ](h)
    grads = dict(zip(p, torch.autograd.grad((h - target).square().mean() + nll, list(p.values())), strict=True))
    if stats == "raw":
        return grads, {name: (p[name] - LR * grads[name]).detach() for name in after}
    return grads | {name: grads[name] * factor + more for name, (factor, more) in natural.items()}, after


# --- the doors ---------------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """door: "auto", "explicit" or a Trainer's name.   context: see CONTEXTS.   net: of NETS.   devices: 1, or 2 processes."""

    door: str
    context: str
    net: str
    stats: Any
    devices: int = 1

    def __str__(self) -> str:
        return "-".join(map(str, self))


DOORS = ("auto", "explicit", "huggingface", "lightning")
SINGLE = ("float32", "bf16")  # dtypes of the parameters
BY_HAND = ("auto", "explicit")
CONTEXTS = ("plain", "float32", "bf16", "accumulated", "scaled", "scaled accumulated", "reentrant", "checkpointed", "compiled")


def cells(contexts: Iterable[str], devices: int = 1) -> list[Cell]:
    """Of what takes long, Trainers and compilers, each net with one of the two gradients."""
    return [
        Cell(door, context, net, stats, devices)
        for door in DOORS
        for context in contexts
        for net, own in (("conv", "natural"), ("mlp", "raw"))
        for stats in ("natural", "raw")
        if stats == own or (door in BY_HAND and context != "compiled")
    ]


class Trained(nn.Module):
    """The converted net with its loss, as every Trainer takes it."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        aux = "explicit" if cell.door == "explicit" else "auto"
        self.body = copy.deepcopy(_built(cell.net, aux, cell.stats))
        if cell.context in SINGLE:
            self.body.float()
        self.context, self.explicit = cell.context, aux == "explicit"
        self.loss = torch.compile(self.loss_of, fullgraph=True, backend="aot_eager") if cell.context == "compiled" else self.loss_of

    def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.context in ("reentrant", "checkpointed"):
            half, reentrant = len(self.body) // 2, self.context == "reentrant"
            x = checkpoint(self.body[:half], x.requires_grad_(), use_reentrant=reentrant)
            h = checkpoint(self.body[half:], x, use_reentrant=reentrant)
        else:
            h = self.body(x)
        loss = (h.to(labels.dtype) - labels).square().mean()
        return loss + normswap.aux_loss(self.body) if self.explicit else loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(x, labels)}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(normswap.param_groups(model, lr=LR))


def seen(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, under the names of the reference."""
    return {name.rpartition("body.")[2]: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name.rpartition("body.")[2]: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("mean", "log_std"))}


def by_hand(cell: Cell, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model: nn.Module = Trained(cell)
    if cell.devices > 1:
        model = nn.parallel.DistributedDataParallel(model)
    micro = 4 if "accumulated" in cell.context else 1
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled="scaled" in cell.context)
    optimizer = optimizer_of(model)
    if cell.door == "auto" and (micro > 1 or scaler.is_enabled()):
        normswap.attach(model, scaler=scaler, accumulate=micro)
    for i, (xs, ys) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
        waits = cell.devices > 1 and i + 1 < micro
        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast("cpu", torch.bfloat16, enabled=cell.context == "bf16"):
                loss = model(xs, ys)["loss"]
            scaler.scale(loss / micro).backward()
    scaler.unscale_(optimizer)
    grads = seen(model)
    scaler.step(optimizer)
    return grads, statistics(model)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


def by_transformers(cell: Cell, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import transformers

    from normswap.training.huggingface import NormswapCallback

    grads: dict[str, Tensor] = {}

    class Looks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads.update(seen(kwargs["model"]))

    model = Trained(cell)
    micro = 4 if "accumulated" in cell.context else 1
    with tempfile.TemporaryDirectory() as directory:
        args = transformers.TrainingArguments(
            directory,
            per_device_train_batch_size=SAMPLES // micro // cell.devices,
            gradient_accumulation_steps=micro,
            max_steps=1,
            max_grad_norm=0.0,
            bf16=cell.context == "bf16",
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=Rows(x, y), optimizers=(optimizer_of(model), None), callbacks=[NormswapCallback(), Looks()]
        )
        if "scaled" in cell.context:  # accelerate makes one for fp16, which it refuses without a GPU
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        trainer.train()
    return grads, statistics(model)


def by_lightning(cell: Cell, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy

    from normswap.training.lightning import NormswapCallback

    grads: dict[str, Tensor] = {}

    class Looks(pl.Callback):  # type: ignore[misc]
        def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
            grads.update(seen(pl_module))

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Trained(cell)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    class OnlyScales(MixedPrecision):  # type: ignore[misc]
        """Without its autocast, so that the scaler alone is seen."""

        def autocast_context_manager(self) -> torch.autocast:
            return torch.autocast("cpu", enabled=False)

    options: dict[str, Any] = {"precision": "bf16-mixed"} if cell.context == "bf16" else {}
    if "scaled" in cell.context:
        options["plugins"] = [OnlyScales("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))]
    if cell.devices > 1:
        environment = TorchElasticEnvironment()
        options |= {"strategy": DDPStrategy(cluster_environment=environment, process_group_backend="gloo"), "devices": cell.devices}
    micro = 4 if "accumulated" in cell.context else 1
    module = Module()
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
            callbacks=[NormswapCallback(), Looks()],
            accumulate_grad_batches=micro,
            max_epochs=1,
            **options,
        )
        trainer.fit(module, torch.utils.data.DataLoader(Rows(x, y), batch_size=SAMPLES // micro // cell.devices))
    return grads, statistics(module)


def trained(cell: Cell, rank: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients right before the step, statistics after it) of one step with the whole batch, or this process' part of it."""
    if cell.context == "compiled":
        torch.compiler.reset()
        warnings.filterwarnings("ignore", ".*Function'> should not be instantiated", DeprecationWarning)  # torch.compile does it
    x, y = batch(cell.net)
    if cell.context in SINGLE:
        x, y = x.float(), y.float()
    if cell.door == "huggingface":
        return by_transformers(cell, x, y)
    if cell.door == "lightning":
        return by_lightning(cell, x, y)
    part = slice(rank * SAMPLES // cell.devices, (rank + 1) * SAMPLES // cell.devices)
    return by_hand(cell, x[part], y[part])


# --- two processes -----------------------------------------------------------------------------------------------------------------------

ON_TWO = cells(("plain", "accumulated", "scaled"), 2)


def main(rank: int, directory: Path) -> None:
    from two_processes import joined

    with joined(rank, directory):
        warnings.simplefilter("error")
        torch.save({str(cell): trained(cell, rank) for cell in ON_TWO}, directory / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
