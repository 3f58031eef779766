"""The options of a conversion, for `normswap.convert` and the command, with their defaults and checks.

Imports no torch, so that `normswap convert --help` can show the defaults at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from normswap.errors import UsageError, one_of

if TYPE_CHECKING:
    from normswap.detect.sites import Rule
    from normswap.layer.batchless_norm import Aux
    from normswap.layer.formulas import Stats, StdForm
    from normswap.swap.calibrate import Reestimate, Repair
    from normswap.training.couple import Coupling


To = Literal["batchless", "weight-norm", "rmsnorm"]


def _default_rules() -> Sequence[Rule]:
    from normswap.rules import DEFAULT_RULES

    return DEFAULT_RULES


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """The norms to consider: globs on qualified names and kinds, of which exclude wins, and the rules."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    rules: Sequence[Rule] = field(default_factory=_default_rules)

    def __post_init__(self) -> None:
        for name, what in (("include", "patterns"), ("exclude", "patterns"), ("rules", "rules")):
            if not isinstance(value := getattr(self, name), Iterable):
                raise UsageError(f"{name} is {value!r:.60}; expected a list or tuple of {what}", hint=f"{name}=[...]; [] for none")


@dataclass(frozen=True, eq=False, kw_only=True)
class Request(Selection):
    """Every option of `normswap.convert`, whose docstring explains them. Raises UsageError for an invalid value or combination."""

    example_inputs: Any = None
    to: To = "batchless"
    calibration: Iterable[Any] | None = None
    approximate: bool = False
    max_drift: float | None = None
    std: StdForm = "log"
    reestimate: Reestimate | None = None
    repair: Repair = "auto"
    aux: Aux = "auto"
    stats: Stats = "natural"
    coupling: Coupling = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        from normswap.layer.batchless_norm import AUXES
        from normswap.layer.formulas import STATS, STD_FORMS
        from normswap.swap.calibrate import REESTIMATE, REPAIRS
        from normswap.training.couple import COUPLINGS

        words = {"std": STD_FORMS, "aux": AUXES, "stats": STATS, "coupling": COUPLINGS, "repair": REPAIRS}
        one_of("to", self.to, get_args(To))
        for name, known in words.items():
            one_of(name, getattr(self, name), known)
        if self.to != "batchless":
            self._check_of_batchless()
        if self.reestimate is not None:
            one_of("reestimate", self.reestimate, REESTIMATE)
        if self.max_drift is not None and not (isinstance(self.max_drift, (int, float)) and self.max_drift >= 0):
            raise UsageError(f"max_drift is {self.max_drift!r}; expected a number that is 0 or more")
        if self.calibration is None and (self.may_differ or self.reestimate is not None):
            what = "statistics are re-estimated" if self.reestimate is not None else "an approximate swap starts"
            raise UsageError(f"{what} from data, and none were given", hint="give calibration=..., or --data on the command line")
        if self.reestimate == "adapt" and not self.may_differ:
            raise UsageError(
                "layers that adapt to the data compute something else than the original",
                hint="ask for it with --approximate or --max-drift, approximate=True or max_drift=...; or 'exact' keeps the function",
            )

    def _check_of_batchless(self) -> None:
        """Raise UsageError if an option is set that only a conversion to BatchlessNorm has."""
        for name in ("approximate", "max_drift", "std", "reestimate", "repair", "aux", "stats", "coupling"):
            if getattr(self, name) != getattr(Request, name):
                raise UsageError(
                    f"to={self.to!r} is exact and makes no BatchlessNorm, so it has no {name}",
                    hint=f"leave {name} (--{name.replace('_', '-')}) out",
                )

    @property
    def may_differ(self) -> bool:
        """Whether the converted model may be approximate, and so differ from the original."""
        return self.approximate or self.max_drift is not None
