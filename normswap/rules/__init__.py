"""One file per source norm. `DEFAULT_RULES` lists them in order: the first that recognises a site speaks for it."""

from __future__ import annotations

from normswap.detect.sites import Rule
from normswap.rules import (
    batch_norm,
    batch_norm_act,
    batch_norm_untracked,
    call,
    frozen_batch_norm,
    group_norm,
    hand_written,
    instance_norm,
    kept,
    layer_norm,
    library_norms,
    rms_norm,
    unknown,
)

DEFAULT_RULES: tuple[Rule, ...] = (
    batch_norm_act.RULE,
    frozen_batch_norm.RULE,
    batch_norm_untracked.RULE,
    batch_norm.RULE,
    *call.RULES,
    layer_norm.RULE,
    group_norm.RULE,
    instance_norm.TRACKED,
    instance_norm.RULE,
    rms_norm.RULE,
    hand_written.RULE,
    library_norms.RULE,
    *kept.RULES,
    unknown.RULE,
)
