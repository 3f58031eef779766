"""Batches of images from a directory, prepared as the model says that it takes them: in another order in each epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import LoadError, UsageError, first_line
from normswap.files.texts import HELD_OUT, files_below
from normswap.models.inputs import SAMPLES

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
TORCHVISION = "torchvision:"


def image_files(path: Path) -> list[Path]:
    """The image, or those in a directory and below it, by name."""
    return files_below(path, ENDINGS)


def preparation(model: nn.Module, specs: Iterable[str], shape: Sequence[int] | None = None) -> tuple[Callable[[Any], Tensor], str]:
    """(image of PIL -> what `model` takes of it, in words), as timm, torchvision or transformers say.

    specs: those that built the model: torchvision:NAME[@WEIGHTS], hf:DIRECTORY. A model of timm has its own record. shape: (1, C, H, W) of
    another size than in that record. Raises UsageError if nobody says it: a model does not show how pixels were scaled, and with another
    scale another function would be healed.
    """
    config = getattr(model, "pretrained_cfg", None)
    if config and type(model).__module__.startswith("timm."):
        import timm.data

        tools: Any = timm.data
        known = tools.resolve_model_data_config(model)
        known |= {} if shape is None else {"input_size": tuple(shape[1:])}
        words = ", ".join(f"{name} {known[name]}" for name in ("input_size", "mean", "std", "crop_pct", "interpolation"))
        return tools.create_transform(**known, is_training=False), f"as timm prepares them: {words}"
    for spec in specs:
        if spec.startswith(TORCHVISION):
            from torchvision.models import get_model_weights

            name, _, weights = spec.removeprefix(TORCHVISION).partition("@")
            chosen = get_model_weights(name)[weights or "DEFAULT"]
            return chosen.transforms(), f"as the weights {chosen} of torchvision take them"
        if spec.startswith("hf:"):
            return _processor(spec.removeprefix("hf:"))
    raise UsageError(
        f"how {type(model).__name__} takes images is not known: their size, and how pixels are scaled",
        hint="--data package.module:factory, which returns batches of prepared images; or --arch torchvision:NAME, if it is one",
    )


def _processor(directory: str) -> tuple[Callable[[Any], Tensor], str]:
    import transformers

    tools: Any = transformers
    try:
        processor = tools.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises anything
        raise LoadError(
            f"{directory} has no image processor that transformers can read: {first_line(error)}",
            hint="processor.save_pretrained(DIRECTORY) writes one; or --data package.module:factory",
        ) from error
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0], f"as {type(processor).__name__} of {directory} does"


class Images:
    """The images of some files, again and again. `held_out` has some that `__iter__` does not.

    prepare: PIL image -> tensor. dtype: of the batches, which have SAMPLES images each. held_out: images; at most a tenth of all.
    """

    def __init__(self, files: Sequence[Path], prepare: Callable[[Any], Tensor], dtype: torch.dtype, *, held_out: int = HELD_OUT) -> None:
        if len(files) < 10:
            raise UsageError(f"the data have {len(files)} images; expected at least 10", hint="give more images")
        self.prepare, self.dtype, self.epoch = prepare, dtype, 0
        shuffled = random.Random(0).sample(files, len(files))
        aside = min(held_out, len(files) // 10)
        self._held_out, self._files = shuffled[:aside], shuffled[aside:]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next `__iter__`, as PyTorch's samplers have it."""
        self.epoch = epoch

    @property
    def held_out(self) -> list[Tensor]:
        return list(self._batches(self._held_out))

    def __iter__(self) -> Iterator[Tensor]:
        return self._batches(random.Random(self.epoch).sample(self._files, len(self._files)))

    def _batches(self, files: Sequence[Path]) -> Iterator[Tensor]:
        for start in range(0, len(files), SAMPLES):
            yield torch.stack([self._read(file) for file in files[start : start + SAMPLES]]).to(self.dtype)

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(file) as image:
                return self.prepare(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises of a file that is broken
            raise LoadError(f"{file} cannot be read as an image: {first_line(error)}", hint="mend it, or leave it out") from error
