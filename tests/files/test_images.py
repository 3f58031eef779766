"""Directories of images, read as the model says that it takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401
from PIL import Image
from torch import Tensor, nn

from normswap.errors import LoadError, UsageError
from normswap.files.images import Images, image_files, preparation


def write(path: Path, value: int, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(path)


def level(image: Image.Image) -> Tensor:
    """The value of an image of one colour, as (3, 1, 1)."""
    return torch.from_numpy(np.asarray(image)[:1, :1].copy()).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(75):
        write(tmp_path / f"{'cats' if number % 2 else 'dogs/more'}/{number:02}.{'png' if number % 3 else 'bmp'}", number)
    (tmp_path / "README.md").write_text("what these are")
    (tmp_path / "dogs" / "labels.csv").write_text("00.png,1")
    return tmp_path


def values(batches: list[Tensor]) -> list[int]:
    return [int(v) for batch in batches for v in batch[:, 0, 0, 0]]


def test_every_image_is_found_and_nothing_else(folder: Path) -> None:
    write(folder / "UPPER.PNG", 99)
    files = image_files(folder)
    assert len(files) == 76
    assert files == sorted(files)
    assert image_files(folder / "UPPER.PNG") == [folder / "UPPER.PNG"]
    assert image_files(folder / "README.md") == []


def test_each_image_comes_once_in_an_epoch_in_another_order(folder: Path) -> None:
    images = Images(image_files(folder), level, torch.float64)
    first, again = list(images), list(images)
    assert [len(batch) for batch in first] == [32, 32, 4]
    assert [tuple(batch.shape[1:]) for batch in first] == [(3, 1, 1)] * 3
    assert {batch.dtype for batch in first} == {torch.float64}
    assert values(first) == values(again)
    images.set_epoch(1)
    other = list(images)
    assert values(other) != values(first)
    assert sorted(values(other)) == sorted(values(first))
    held_out = values(images.held_out)
    assert len(held_out) == 7
    assert sorted(values(first) + held_out) == list(range(75))


def test_grey_images_have_three_channels(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"{number}.png", number, mode="L")
    (batch,) = Images(image_files(tmp_path), level, torch.float32)
    assert batch.shape == (9, 3, 1, 1)
    assert bool((batch[:, 0] == batch[:, 2]).all())


def test_too_few_images_and_a_broken_one_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the data have 9 images; expected at least 10"):
        Images(image_files(folder)[:9], level, torch.float32)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 9)
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:900])
    for name in ("broken.png", "half.png"):
        images = Images([folder / name, *image_files(folder / "cats")], level, torch.float32)
        with pytest.raises(LoadError, match=rf"{name} cannot be read as an image: ") as error:
            list(images), images.held_out
        assert error.value.hint == "mend it, or leave it out"


# --- how a model takes them -----------------------------------------------------------------------------------------------------------


def test_a_model_of_timm_says_it_itself() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    prepare, words = preparation(model, [])
    x = prepare(Image.new("RGB", (300, 260), (255, 0, 51)))
    assert x.shape == (3, 224, 224)
    torch.testing.assert_close(x[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    assert words.startswith("as timm prepares them: input_size (3, 224, 224), mean (0.5, 0.5, 0.5)")
    prepare, words = preparation(model, ["hf:gone"], (1, 3, 32, 32))
    assert prepare(Image.new("RGB", (300, 260))).shape == (3, 32, 32)
    assert "input_size (3, 32, 32)" in words


@pytest.mark.parametrize(("spec", "size"), [("torchvision:resnet18", 224), ("torchvision:swin_v2_t@IMAGENET1K_V1", 256)])
def test_a_model_of_torchvision_is_described_by_its_weights(spec: str, size: int) -> None:
    prepare, words = preparation(nn.Identity(), ["model.pt", spec])
    assert prepare(Image.new("RGB", (300, 270))).shape == (3, size, size)
    assert words.endswith(".IMAGENET1K_V1 of torchvision take them")


def test_a_model_of_transformers_by_its_processor(tmp_path: Path) -> None:
    import transformers

    transformers.ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    prepare, words = preparation(nn.Identity(), [f"hf:{tmp_path}"])
    x = prepare(Image.new("RGB", (30, 27), (255, 255, 255)))
    torch.testing.assert_close(x, torch.full((3, 24, 24), 2.0))
    assert words.startswith("as ViTImageProcessor")
    with pytest.raises(LoadError, match="gone has no image processor that transformers can read"):
        preparation(nn.Identity(), [f"hf:{tmp_path / 'gone'}"])


def test_without_a_word_from_anybody_nothing_is_guessed() -> None:
    with pytest.raises(UsageError, match="how Sequential takes images is not known: their size, and how pixels are scaled") as error:
        preparation(nn.Sequential(), ["model.pt"])
    assert "--data package.module:factory" in str(error.value.hint)
