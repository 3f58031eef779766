"""One file per source norm. `DEFAULT_RULES` lists them in order: the first that recognises a site speaks for it."""

from __future__ import annotations

from normswap.plan import Rule
from normswap.rules import batch_norm, batch_norm_act, frozen_batch_norm, functional_batch_norm, per_sample, unknown

DEFAULT_RULES: tuple[Rule, ...] = (
    batch_norm_act.RULE,
    frozen_batch_norm.RULE,
    batch_norm.RULE,
    functional_batch_norm.RULE,
    per_sample.LAYER_NORM,
    per_sample.GROUP_NORM,
    per_sample.INSTANCE_NORM,
    per_sample.RMS_NORM,
    unknown.RULE,
)
