"""timm, one model of each family: the smallest, by its number of parameters.

A family is a module of timm.models and the first part of a model's name: "vision_transformer/vit", "vision_transformer_relpos/vit",
"resnet/resnet", "resnet/seresnext". timm has 289 such first parts; as some are used in several modules, there are 314 families.
timm_families.json has the choice (`--choose` makes it again, by building every model on the meta device).
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.libraries import BATCH, Case

CHOSEN = Path(__file__).with_suffix(".json")
# More than 300 million parameters: four blocks stand for the twenty-four or forty, which are all alike.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    name: {"depth": 4} for name in ("aimv2_large_patch14_224", "deepseek_vit_412m", "eva_giant_patch14_224", "eva_large_patch14_196")
}
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)


def cases() -> list[Case]:
    chosen = json.loads(CHOSEN.read_text())["families"]
    return [Case(family, name, functools.partial(build, name), parameters) for family, (name, parameters) in chosen.items()]


def build(name: str) -> tuple[nn.Module, Any]:
    """The model, and a batch of the smallest square images that it takes: of 64, 96 ... up to what it was made for."""
    config = timm.get_pretrained_cfg(name)
    channels, *own = config.input_size if config else (3, 224, 224)
    options = OPTIONS.get(name, {})
    tried: Exception | None = None
    plain: nn.Module | None = None
    for size in (*(s for s in SIZES if s < own[-1]), own[-1]):
        torch.manual_seed(0)
        x = torch.randn(BATCH, channels, size, size)
        try:
            model = plain or timm.create_model(name, img_size=size, **options)
        except TypeError:  # takes no img_size: then its layers take any, or one only
            model = plain = timm.create_model(name, **options)
        except Exception as error:
            tried = error
            continue
        try:
            with torch.no_grad():
                model.eval()(x)
        except Exception as error:
            tried = error
            continue
        return model, (x,)
    raise RuntimeError(f"{name} takes no square image of any size: {type(tried).__name__}: {tried}")


def choose(say: Callable[[str], None]) -> None:
    from timm.models._registry import _model_to_module

    smallest: dict[str, tuple[str, int]] = {}
    for name in timm.list_models():
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parameters = sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception as error:
            say(f"{name} cannot be built on the meta device: {type(error).__name__}: {error}")
            continue
        family = f"{_model_to_module[name]}/{name.partition('_')[0]}"
        if family not in smallest or parameters < smallest[family][1]:
            smallest[family] = (name, parameters)
    lines = ",\n".join(f"{json.dumps(family)}: {json.dumps(chosen)}" for family, chosen in sorted(smallest.items()))
    CHOSEN.write_text(f'{{"timm": "{timm.__version__}",\n"families": {{\n{lines}\n}}}}\n')
