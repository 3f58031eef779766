"""The callback for the Trainer of Lightning. Needs the extra normswap[lightning]."""

from __future__ import annotations

from typing import Any

import torch

from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training import callbacks

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(f"{__name__} needs Lightning ({error}): pip install 'normswap[lightning]'") from error

ADVICE = callbacks.Advice(
    groups="Return an optimizer of all of them from configure_optimizers: torch.optim.AdamW(normswap.param_groups(self, lr=...))",
    unclipped="Trainer(gradient_clip_val=None)",
    clipped="gradient_clip_val of the Trainer",
)


class NormswapCallback(Callback):
    """Trains a converted model in Lightning:  Trainer(callbacks=[NormswapCallback(max_grad_norm=1.0)]).

    The LightningModule holds the converted model, under any name.

    * Calls `normswap.attach` with accumulate_grad_batches, also where that is scheduled, and the GradScaler of 16-mixed. The last step of
      an epoch may have fewer batches; it counts as less than a whole one, as in the loss.
    * Logs the `drift` of each layer with `log_dict`: normswap/LAYER/mean_z, mean_z2, dead_channels and limit_hits.
    * Clips the gradients of all parameters but the statistics to max_grad_norm, if that is given. Lightning's own gradient_clip_val would
      clip all of them. normswap/grad_norm is the norm before clipping.
    * Warns when training begins if Lightning clips and the module has no configure_gradient_clipping of its own, if no optimizer holds the
      statistics, or if stats="raw" ones are in a group with weights.

    After training the loss counts as unscaled again, as at the start. With manual optimization the module scales the loss itself: attach
    the model by hand after this callback, for example in its on_train_start.

    Raises UsageError when training begins if the module has no BatchlessNorm layer, and for a max_grad_norm that is not above 0.
    """

    def __init__(self, *, max_grad_norm: float | None = None) -> None:
        callbacks.check_max_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self._accumulate = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clips = bool(trainer.gradient_clip_val) and not is_overridden("configure_gradient_clipping", pl_module)
        callbacks.warn_about_optimizers(pl_module, trainer.optimizers, ADVICE, clips=clips)
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.accumulate_grad_batches != self._accumulate:
            self._attach(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        values = callbacks.before_step(pl_module, optimizer, scaler, max_grad_norm=self.max_grad_norm)
        pl_module.log_dict(values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks.attach_if_automatic(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if any(isinstance(module, BatchlessNorm) for module in pl_module.modules()):
            callbacks.attach_if_automatic(pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._accumulate = trainer.accumulate_grad_batches
        callbacks.attach_if_automatic(pl_module, scaler=getattr(trainer.precision_plugin, "scaler", None), accumulate=self._accumulate)
