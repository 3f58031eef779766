r"""The loss that is built in for models whose outputs are scores of classes or of tokens: the KL divergence of their distributions.

    KL = mean over positions of  sum over c of  p_c (log p_c - log q_c)        p = softmax(t), q = softmax(y) over the last axis

y is the output of the model and t that of the original: the output named "logits", or else the first one with an axis of classes. Of
(N, T, C), positions where a batch's "attention_mask" is 0 do not count. A class that the original rules out (t = -inf) does not, either.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normswap.errors import UsageError
from normswap.healing.distance import counted, mask_in
from normswap.models.watching import tensors_in

KL = "kl"


def kl(batch: Any, output: Any, expected: Any) -> Tensor:
    """The mean KL divergence of the model's distribution from the original's, in nats. Raises UsageError without a floating output."""
    q, p = (torch.log_softmax(_logits(each), -1) for each in (output, expected))
    each = (p.exp() * (p - q)).where(p.isfinite(), 0).sum(-1)
    rows, _ = counted(each, mask_in(batch), ())
    return rows.sum() / max(rows.numel(), 1)


def _logits(output: Any) -> Tensor:
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and tensor.dim() > 1:
            return tensor
    raise UsageError("the loss kl compares scores of classes, and the model returns no floating tensor of them", hint="leave loss out")
