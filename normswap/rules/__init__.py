"""What becomes of each source norm: swapped exactly, approximately, or kept, and why. May import `detect`, `models` and `layer`.

A file for each formula, whose docstring has that of the source and that of BatchlessNorm, symbol by symbol, and which ends in a `Rule`:
`recognises`, `check`, `build`. To add one, start from a copy of `instance_norm.py` if the source has statistics of its own, or add a line
to the table of `per_sample.py` if it takes them from the data; then name the rule here. `plain.py` and `recognise.py` answer what rules
ask; `user_rules.py` is for rules that are not in this package (docs/writing_rules.md).

`DEFAULT_RULES` lists the rules in order: the first that recognises a site speaks for it.
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
