"""The rules: each kind of norm is swapped exactly, swapped approximately, or kept with a reason. May import `detect`, `models` and `layer`.

There is a file for each formula. Its docstring compares the formula of the source with that of BatchlessNorm, and it ends in a `Rule` with
`recognises`, `check` and `build`. To add a rule, start from a copy of `instance_norm.py` if the source has running statistics, or add a
line to the table of `per_sample.py` if it computes its statistics from its input; then name the rule here. `plain.py` and `recognise.py`
are used by the rules; `user_rules.py` is for rules that are not in this package (docs/writing_rules.md).

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
