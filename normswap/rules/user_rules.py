"""Rules that users write: functions that build their layers, import of a rule by its name, and checks of what a rule returns.

See docs/writing_rules.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from normswap.detect.sites import Rule, Site
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.copying import copy_hooks
from normswap.models.spec import SPEC, imported
from normswap.models.torch_private import HOOKS
from normswap.rules.batch_norm import Normalization, layer_with
from normswap.rules.per_sample import uncalibrated

PAGE = "docs/writing_rules.md"


# -- for those who write rules ---------------------------------------------------------------------------------------------------


def batchless_from_statistics(
    module: nn.Module,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float,
    std: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_axis: int = 1,
) -> BatchlessNorm:
    """The layer that computes the same as a `module` with fixed statistics: what the `build` of an exact rule returns.

        weight * (x - mean) / sqrt(variance + eps) + bias

    mean, variance, weight, bias: one value per channel, in any shape ((C,) or (1, C, 1, 1)). weight None: 1; bias None: 0.
    std: the argument of `build`. channel_axis: of x, negative from the end. The layer is trainable if the weight is trainable or None, and
    takes over the hooks and the training flag of `module`.
    """
    flat = [None if tensor is None else tensor.reshape(-1) for tensor in (weight, bias)]
    source = Normalization(mean.reshape(-1), variance.reshape(-1), eps, *flat)
    layer = layer_with(BatchlessNorm, source, std, channel_axis=channel_axis)
    copy_hooks(module, layer)
    return layer


def batchless_from_data(module: nn.Module, channels: int, *, std: str, channel_axis: int = 1) -> BatchlessNorm:
    """A layer with mean 0 and std 1, for calibration to set: what the `build` of an approximate rule returns.

    channel_axis: of x, negative from the end. The layer is trainable if `module` has a trainable parameter or no parameter, and takes over
    the hooks and the training flag of `module`.
    """
    return uncalibrated(module, ((channels,), (channel_axis,)), std)


# -- for the pipeline ------------------------------------------------------------------------------------------------------------


def named(spec: str, option: str = "--rule") -> Rule:
    """The rule that `spec`, package.module:NAME, names. Raises UsageError if it cannot be imported or is not a Rule."""
    found = imported(spec, option, "a normswap.Rule")
    if not isinstance(found, Rule):
        a = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise UsageError(f"{option} {spec} is {a}; expected a normswap.Rule", hint=f"{PAGE} shows how to write one")
    return dataclasses.replace(found, spec=spec)


def spec_of(rule: Rule) -> str | None:
    """The package.module:NAME from which `rule` can be imported: `rule.spec`, or its name in the module of one of its functions."""
    if rule.spec is not None:
        return rule.spec
    for function in (rule.recognises, rule.check, rule.build, rule.inexact):
        module = getattr(function, "__module__", None)
        attributes = vars(sys.modules[module]) if module in sys.modules and module != "__main__" else {}
        for name, value in attributes.items():
            if value is rule and SPEC.fullmatch(f"{module}:{name}"):
                return f"{module}:{name}"
    return None


def checked(rule: Rule) -> Rule:
    """The same rule with checks: an exception in it, or a return value of the wrong type, raises a UsageError that names the layer."""
    spec = spec_of(rule)
    name = f"the rule {rule.kind!r}" + (f" ({spec})" if spec else "")

    def ask(what: str, function: Callable[..., Any], site: Site, *more: Any) -> Any:
        try:
            return function(site, *more)
        except Exception as error:  # it is the user's code
            raise UsageError(
                f"{name} raised {type(error).__name__} in `{what}` of {_where(site)}: {error}",
                hint=f"a rule is called for every module of the model, and for calls of functions; see {PAGE}",
            ) from error

    def expect(right: bool, what: str, site: Site, expected: str, answer: object) -> None:
        if not right:
            raise UsageError(f"{name} returned {answer!r:.60} from `{what}` of {_where(site)}; expected {expected}", hint=f"see {PAGE}")

    def recognises(site: Site) -> bool:
        return bool(ask("recognises", rule.recognises, site))

    def check(site: Site) -> str | None:
        reason = ask("check", rule.check, site)
        expect(reason is None or (isinstance(reason, str) and reason != ""), "check", site, "None, or why the layer stays", reason)
        return cast("str | None", reason)

    def build(site: Site, std: str) -> nn.Module:
        layer = ask("build", cast("Callable[..., Any]", rule.build), site, std)
        expect(isinstance(layer, BatchlessNorm), "build", site, "a BatchlessNorm", layer)
        layer.own_rule = (rule.kind, spec)
        if site.module is not None:
            layer.training = site.module.training
            if not any(getattr(layer, hooks) for hooks in HOOKS):
                copy_hooks(site.module, layer)
        return cast(nn.Module, layer)

    def inexact(site: Site) -> str:
        reason = ask("inexact", cast("Callable[..., Any]", rule.inexact), site)
        expect(isinstance(reason, str) and reason != "", "inexact", site, "why the swap is not exact", reason)
        return cast(str, reason)

    return Rule(rule.kind, recognises, check, rule.build and build, rule.inexact and inexact, spec)


def all_checked(rules: Sequence[Rule], known: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules, those that are not in `known` as `checked` returns them. Raises UsageError for an element that is not a Rule."""
    for rule in rules:
        if not isinstance(rule, Rule):
            raise UsageError(f"rules holds {rule!r:.60}; expected a normswap.Rule", hint="rules=(MY_RULE, *normswap.DEFAULT_RULES)")
    return tuple(rule if rule in known else checked(rule) for rule in rules)


def _where(site: Site) -> str:
    return repr(site.name) if site.name else site.function or f"a {type(site.module).__name__}"
