"""The rules: each kind of norm is swapped exactly, swapped approximately, or kept with a reason. May import `detect`, `models` and `layer`.

A file for each formula, whose docstring has that of the source and that of BatchlessNorm, symbol by symbol, and which ends in a `Rule`:
`recognises`, `check`, `build`. CONTRIBUTING.md says how to add one. It is `detect/match.py` that asks the rules.
`plain.py` and `recognise.py` answer what rules ask; `user_rules.py` has what a rule outside this package builds with, or one here for a
layer whose tensors are not called like BatchNorm's (docs/writing_rules.md).

`DEFAULT_RULES` lists the rules in order: the first that recognises a site decides about it.
"""

from __future__ import annotations

from normswap.detect.sites import Rule
from normswap.rules import batch_norm, batch_norm_act, frozen_batch_norm, instance_norm, kept, library_norms, per_sample

DEFAULT_RULES: tuple[Rule, ...] = (
    batch_norm_act.RULE,
    frozen_batch_norm.RULE,
    per_sample.BATCH_NORM,
    batch_norm.RULE,
    *kept.CALLS,
    per_sample.LAYER_NORM,
    per_sample.GROUP_NORM,
    instance_norm.RULE,
    per_sample.INSTANCE_NORM,
    per_sample.RMS_NORM,
    library_norms.HAND_WRITTEN,
    library_norms.RULE,
    *kept.RULES,
    kept.UNKNOWN,
)
