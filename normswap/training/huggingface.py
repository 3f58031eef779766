"""The callback for the Trainer of transformers. Needs the extra normswap[trainer]: transformers and accelerate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normswap.training import callbacks

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(f"{__name__} needs the Trainer of transformers ({error}): pip install 'normswap[trainer]'") from error

ADVICE = callbacks.Advice(
    groups="Give the Trainer an optimizer: Trainer(..., optimizers=(torch.optim.AdamW(normswap.param_groups(model, lr=...)), None))",
    unclipped="TrainingArguments(max_grad_norm=0.0)",
    clipped="max_grad_norm of TrainingArguments, whose default is 1.0,",
)


class NormswapCallback(TrainerCallback):
    """Trains a converted model in the Trainer:  Trainer(model, args, callbacks=[NormswapCallback(max_grad_norm=1.0)]).

    * Calls `normswap.attach` with gradient_accumulation_steps and the GradScaler of fp16. The last step of an epoch may have fewer
      batches; it counts as a whole one, as in the loss.
    * Adds the `drift` of each layer at the last step to what is logged: normswap/LAYER/mean_z, mean_z2, dead_channels
      and limit_hits.
    * Clips the gradients of all parameters but the statistics to max_grad_norm, if that is given. The Trainer itself would clip all of
      them: turn that off with TrainingArguments(max_grad_norm=0.0). In the logs, `grad_norm` is over all parameters and
      normswap/grad_norm over those that are clipped.
    * Warns when training begins if the Trainer clips, if its optimizer holds no statistics, if stats="raw" ones are in a group with
      weights, or if weight decay reaches the weight of a layer. The Trainer keeps it from norms that it knows by class or name.

    A model that takes num_items_in_batch divides its loss by it, and the Trainer does not divide the loss again. That is right with
    aux="auto"; with aux="explicit", the model has to divide aux_loss by gradient_accumulation_steps.

    After training the loss counts as unscaled again, as at the start. The callbacks of report_to come before those that a Trainer is
    given, and see what this one adds only if they are moved behind it: trainer.add_callback(trainer.pop_callback(cls)).

    Raises UsageError when training begins if the model has no BatchlessNorm layer, and for a max_grad_norm that is not above 0.
    """

    def __init__(self, *, max_grad_norm: float | None = None) -> None:
        callbacks.check_max_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.latest: dict[str, Tensor] = {}  # what to log of the last step; copied to the host only when it is logged
        self._batches = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        callbacks.warn_about_optimizers(model, [optimizer], ADVICE, clips=bool(args.max_grad_norm))
        callbacks.warn_about_decay(model, optimizer, ADVICE)
        callbacks.attach_if_automatic(model, scaler=getattr(optimizer, "scaler", None), accumulate=args.gradient_accumulation_steps)
        self._batches, self.latest = 0, {}

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches += 1

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        share = (self._batches + 1) / args.gradient_accumulation_steps
        self._batches = 0
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer of torch
        self.latest = callbacks.before_step(model, optimizer, scaler, max_grad_norm=self.max_grad_norm, share=share)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] | None = kwargs.get("logs")
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        values = {name: value.item() for name, value in self.latest.items()}
        logs.update(values)
        if state.log_history:  # its last entry is a copy of the logs
            state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        callbacks.attach_if_automatic(kwargs["model"])
