"""One Request for Python and the command: a default is the same everywhere, and a word is known everywhere."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_args, get_type_hints

import pytest
import torch

import normswap
from normswap.api.landscape import Mode
from normswap.api.request import Request
from normswap.api.sensitivity import By
from normswap.cli.landscape import landscape
from normswap.cli.options import Converting, Exporting
from normswap.cli.sensitivity import sensitivity
from normswap.errors import UsageError
from normswap.export.to_onnx import Dynamic, Settings, Target
from normswap.layer.formulas import STD_FORMS
from normswap.rules import DEFAULT_RULES
from normswap.swap.calibrate import REESTIMATE
from normswap.training.couple import COUPLINGS


def test_python_takes_every_option_with_the_default_of_the_request() -> None:
    signature = inspect.signature(normswap.convert).parameters
    fields = {field.name: getattr(Request(), field.name) for field in dataclasses.fields(Request)}
    assert {name: parameter.default for name, parameter in signature.items() if name != "model"} == fields
    assert fields["rules"] is DEFAULT_RULES


def test_the_command_has_the_default_of_the_request() -> None:
    named_otherwise = {"data": "calibration"}
    for option in dataclasses.fields(Converting):
        assert option.default == getattr(Request(), named_otherwise.get(option.name, option.name)), option.name
    same = {"target": "target", "opset": "opset"}
    for option in dataclasses.fields(Exporting):
        if option.name in same:
            assert option.default == getattr(Settings(), same[option.name])
    assert Settings(dynamic=Exporting().dynamic).freedom == Settings().freedom


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        (Converting, "std", STD_FORMS),
        (Converting, "reestimate", (*REESTIMATE, type(None))),
        (Converting, "coupling", COUPLINGS),
        (Exporting, "target", get_args(Target)),
        (Exporting, "dynamic", get_args(Dynamic)),
        (sensitivity, "by", get_args(By)),
        (landscape, "mode", get_args(Mode)),
    ],
)
def test_the_command_knows_the_words_that_python_knows(options: Any, option: str, words: tuple[Any, ...]) -> None:
    literal = get_type_hints(options)[option]
    found = [word for part in get_args(literal) for word in (get_args(part) or (part,))]
    assert sorted(map(str, found)) == sorted(map(str, words))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": "ln"}, "std is 'ln'; expected one of 'log', 'abs', 'inv'"),
        ({"aux": "some"}, "aux is 'some'; expected one of 'auto', 'explicit', 'none'"),
        ({"stats": "raws"}, "stats is 'raws'; expected one of 'natural', 'raw'"),
        ({"coupling": "all"}, "coupling is 'all'; expected one of 'auto', 'none'"),
        ({"reestimate": "all"}, "reestimate is 'all'; expected one of 'exact', 'adapt'"),
        ({"max_drift": -1.0}, "max_drift is -1.0; expected a number that is 0 or more"),
        ({"max_drift": "0.1"}, "max_drift is '0.1'; expected a number that is 0 or more"),
        ({"include": None}, "include is None; expected a list or tuple of patterns"),
        ({"exclude": 3}, "exclude is 3; expected a list or tuple of patterns"),
        ({"rules": None}, "rules is None; expected a list or tuple of rules"),
        ({"max_drift": 0.1}, "an approximate swap starts from data, and none were given"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_done(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Request(**({"calibration": [torch.ones(2, 3)]} if "max_drift is" in message else {}), **options)
    assert error.value.message == message


def test_one_rule_is_no_list_of_rules() -> None:
    for verb in (normswap.convert, normswap.plan):
        with pytest.raises(UsageError, match=r"^rules is Rule\(.*; expected a list or tuple of rules"):
            verb(torch.nn.BatchNorm1d(3), torch.ones(2, 3), rules=DEFAULT_RULES[0])  # type: ignore[operator]
