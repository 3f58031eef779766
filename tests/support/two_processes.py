"""One of two gloo processes, started by test_distributed.py:  python two_processes.py RANK DIRECTORY

Each has half the batch. Runs every case of CASES and writes what it finds in DIRECTORY/RANK.pt.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import normswap

X = torch.randn(8, 2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X[5] *= 3  # one that a guard holds
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))
SECONDS = 60  # a collective operation that takes longer is stuck


# By kind of FSDP2, the layers of each unit besides that of the model: one layer; a producer and its norm; norms.
UNITS = {"fsdp": [[0], [1], [3]], "pairs": [[0, 1], [7, 8]], "norms": [[1], [4], [6], [8], [12]]}


class Case(NamedTuple):
    """wrap: None (one process), "ddp", "view" (DDP with gradient_as_bucket_view) or one of UNITS. micro: backward passes per step."""

    wrap: str | None
    aux: Any = "auto"
    stats: Any = "natural"
    micro: int = 1
    synchronised: bool = False  # every micro-batch, not the last one alone
    told: bool = True  # attach(accumulate=micro)
    steps: int = 2
    grouped: bool = True  # the optimizer is given param_groups
    frozen: bool = False  # the first convolution and the first norm's statistics
    coupling: Any = "none"
    sgd: bool = False  # the optimizer is SGD, with a learning rate at which the gradients of producers are clipped


def build(aux: Any, stats: Any, coupling: Any = "none") -> nn.Module:
    return copy.deepcopy(_built(aux, stats, coupling))


@functools.cache
def _built(aux: Any, stats: Any, coupling: Any) -> nn.Module:
    torch.manual_seed(0)
    coupled = (
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.BatchNorm2d(6, momentum=0.2),
        nn.ConvTranspose2d(6, 5, (2, 1), stride=2, bias=False),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
        nn.BatchNorm1d(3),
    )
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, momentum=0.25),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        *(coupled if coupling == "auto" else (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))),
    )
    for norm in model:
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return normswap.convert(model.double().eval(), X[:2], aux=aux, stats=stats, coupling=coupling).model.train()


def wrapped(model: nn.Module, wrap: str | None) -> nn.Module:
    if wrap in ("ddp", "view"):
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=wrap == "view")
    if wrap in UNITS:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for unit in UNITS[wrap]:
            fully_shard([model[i] for i in unit], mesh=mesh)  # type: ignore[index]
        fully_shard(model, mesh=mesh)
    return model


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def plain(name: str) -> str:
    return name.removeprefix("module.")


@contextlib.contextmanager
def unsynchronised(model: nn.Module, active: bool) -> Any:
    if active and hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    elif active and hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def trained(case: Case, x: Tensor, y: Tensor) -> dict[str, Any]:
    """A few steps on these samples: gradients of the first step, then the state, and what was warned of."""
    model = build(case.aux, case.stats, case.coupling)
    if case.frozen:
        model[0].requires_grad_(False)  # type: ignore[index]
        model[1].mean.requires_grad_(False)  # type: ignore[index,union-attr]
        model[1].log_std.requires_grad_(False)  # type: ignore[index,union-attr]
    model = wrapped(model, case.wrap)
    if case.micro > 1 and case.told and case.aux == "auto":
        normswap.attach(model, accumulate=case.micro)
    lr = 0.5 if case.sgd else 0.01
    groups = normswap.param_groups(model, lr=lr) if case.grouped else model.parameters()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    if case.sgd:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    grads: dict[str, Tensor] = {}
    states = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(case.steps):
            optimizer.zero_grad()
            parts = list(zip(x.chunk(case.micro), y.chunk(case.micro), strict=True))
            for i, (xs, ys) in enumerate(parts):
                with unsynchronised(model, i + 1 < len(parts) and not case.synchronised):
                    loss = nn.functional.cross_entropy(model(xs), ys)
                    if case.aux == "explicit":
                        loss = loss + normswap.aux_loss(model)
                    (loss / len(parts)).backward()
            if step == 0:
                grads = {plain(n): full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            states.append({plain(n): full(t) for n, t in model.state_dict().items()})
    return {"grads": grads, "states": states, "state": states[-1], "warnings": sorted({str(w.message) for w in caught})}


WRAPS = ("ddp", "view", "fsdp")
BOTH = [(aux, stats) for aux in ("auto", "explicit") for stats in ("natural", "raw")]
CASES = {f"{wrap} {aux} {stats}": Case(wrap, aux, stats) for wrap in WRAPS for aux, stats in BOTH}
CASES |= {
    f"{wrap} {aux} accumulated{' synchronised' if each else ''}": Case(wrap, aux, micro=2, synchronised=each)
    for wrap in WRAPS
    for aux in ("auto", "explicit")
    for each in (False, True)
}
CASES |= {f"{wrap} frozen": Case(wrap, frozen=True) for wrap in WRAPS}
COUPLED = {
    f"{wrap} {aux} coupled{' accumulated' if micro > 1 else ''}": Case(wrap, aux, micro=micro, steps=3, coupling="auto", sgd=True)
    for wrap in ("ddp", "view", "pairs", "norms")
    for aux in ("auto", "explicit")
    for micro in (1, 2)
}
CHECKPOINTED = (("ddp", "none"), ("fsdp", "none"), ("ddp", "auto"), ("pairs", "auto"))
NOT_ATTACHED = {
    f"{wrap} untold{' synchronised' if each else ''}": Case(wrap, micro=2, synchronised=each, told=False)
    for wrap in WRAPS
    for each in (False, True)
}


LATE = Case("fsdp", micro=2, synchronised=True, told=False, grouped=False)


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {plain(n): full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def two_forwards(wrap: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Two forward passes before one backward pass."""
    model = wrapped(build("auto", "natural"), wrap)
    normswap.attach(model, accumulate=1)
    first, second = (nn.functional.cross_entropy(model(xs), ys) for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True))
    (first + second).backward()
    return grads_of(model)


def unused(wrap: str, coupling: str, x: Tensor) -> str:
    """The error of the second pass, when a norm in eval mode has statistics that are not frozen. Empty: none."""
    model = wrapped(build("auto", "natural", coupling), wrap)
    next(m for n, m in model.named_modules() if plain(n) == "1").eval()
    try:
        for _ in range(2):
            model(x).square().mean().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def apart(x: Tensor) -> str:
    """The error of a model whose producers are other units of FSDP than their norms."""
    model = wrapped(build("auto", "natural", "auto"), "fsdp")
    try:
        model(x)
    except normswap.NormswapError as error:
        return str(error)
    return ""


def in_micro_batches(wrap: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model = wrapped(build("auto", "natural"), wrap)
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
    normswap.backward_in_micro_batches(model, lambda xs, ys: nn.functional.cross_entropy(model(xs), ys), x, y, size=3)
    grads = grads_of(model)
    optimizer.step()  # warns if it takes these for several passes
    return grads


def clipped(wrap: str, x: Tensor, everything: bool) -> list[str]:
    """What is warned of when all gradients are clipped, or those that are not statistics."""
    model = wrapped(build("auto", "natural"), wrap)
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
    task = [p for group in optimizer.param_groups if "normswap" not in group for p in group["params"]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters() if everything else task, 0.1)
            optimizer.step()
    return sorted({str(w.message) for w in caught})


def thrown_away(wrap: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The state after a step, before which a pass was thrown away; its zeros are written into the gradients."""
    model = wrapped(build("auto", "natural"), wrap)
    optimizer = torch.optim.AdamW(normswap.param_groups(model, lr=0.01), lr=0.01)
    for inputs in (3 * x, x):
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(inputs), y).backward()
    optimizer.step()  # warns if it takes these for two passes
    return {plain(n): full(t) for n, t in model.state_dict().items()}


def checkpointed(wrap: str, coupling: str, x: Tensor, y: Tensor, directory: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, two more: by the model that was saved, and by one that was loaded."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    saved, fresh = (wrapped(build("auto", "natural", coupling), wrap) for _ in range(2))
    optimizers = [torch.optim.AdamW(normswap.param_groups(m, lr=0.01), lr=0.01) for m in (saved, fresh)]
    for _ in range(2):
        step(saved, optimizers[0])
    path = directory / f"{wrap} {coupling}.checkpoint"
    with quiet():
        model, optimizer = get_state_dict(saved, optimizers[0])
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        at = {plain(n): full(t) for n, t in saved.state_dict().items()}
        model, optimizer = get_state_dict(fresh, optimizers[1])
        untouched = {plain(n): full(t) for n, t in fresh.state_dict().items()}
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        set_state_dict(fresh, optimizers[1], model_state_dict=model, optim_state_dict=optimizer)
    loaded = {plain(n): full(t) for n, t in fresh.state_dict().items()}
    for _ in range(2):
        for m, o in zip((saved, fresh), optimizers, strict=True):
            step(m, o)
    after = [{plain(n): full(t) for n, t in m.state_dict().items()} for m in (saved, fresh)]
    return {"untouched": untouched, "saved": at, "loaded": loaded, "after": after}


@contextlib.contextmanager
def quiet() -> Any:
    """torch.distributed.checkpoint warns of its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mixed(x: Tensor, alone: bool) -> tuple[list[torch.dtype], list[str]]:
    """FSDP with bfloat16 parameters: dtypes of the first norm's statistics in forward, of its gradient, of the output; the
    warnings of two steps.

    alone: its norms are units of their own, with no policy.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = build("auto", "natural").float()
    seen: list[torch.dtype] = []
    model[1].register_forward_pre_hook(lambda layer, args: seen.append(layer.mean.dtype))  # type: ignore[index]
    for layer in (model[1], model[4]) if alone else ():  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.01))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            out = model(x.float())
            out.float().square().mean().backward()
            optimizer.step()
    return [seen[0], model[1].mean.grad.dtype, out.dtype], [str(w.message) for w in caught]  # type: ignore[index,union-attr]


@contextlib.contextmanager
def joined(rank: int, directory: Path) -> Any:
    """While it lasts, this is process `rank` of two. The variables are those by which Trainers see that they run under torchrun."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for and not used: there is a group already
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=SECONDS))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(rank: int, directory: Path) -> None:
    with joined(rank, directory):
        torch.save(everything(rank, directory), directory / f"{rank}.pt")


def everything(rank: int, directory: Path) -> dict[str, Any]:
    x, y = X[4 * rank : 4 * rank + 4], Y[4 * rank : 4 * rank + 4]
    warnings.simplefilter("error")
    found: dict[str, Any] = {name: trained(case, x, y) for name, case in (CASES | NOT_ATTACHED | COUPLED).items()}
    for wrap in WRAPS:
        found[f"{wrap} two forwards"] = two_forwards(wrap, x, y)
        found[f"{wrap} micro-batches"] = in_micro_batches(wrap, x, y)
    for wrap in WRAPS:
        found[f"{wrap} clipped"] = {everything: clipped(wrap, x, everything) for everything in (True, False)}
    for wrap in ("ddp", "view"):
        found[f"{wrap} thrown away"] = thrown_away(wrap, x, y)
    for wrap, coupling in CHECKPOINTED:
        found[f"{wrap} {coupling} checkpoint"] = checkpointed(wrap, coupling, x, y, directory)
        found[f"{wrap} {coupling} unused"] = unused(wrap, coupling, x)
    found["apart"] = apart(x)
    found["late"] = trained(LATE, x, y)
    found["mixed"] = {alone: mixed(x, alone) for alone in (True, False)}
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
