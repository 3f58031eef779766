"""Example inputs: what is given is kept, what is inferred fits, what is misspelt is explained."""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401
from torch import nn

from normswap.api.convert import given_to
from normswap.cli.data import batches_of
from normswap.errors import UsageError
from normswap.files.load import load
from normswap.models.batches import arguments_of
from normswap.models.inputs import Inputs, as_inputs, infer, notes_on, parse

# --- given --------------------------------------------------------------------------------------------------------------------------


def test_as_inputs() -> None:
    x, y = torch.ones(1), torch.ones(2)
    assert as_inputs(x) == Inputs((x,))
    assert as_inputs((x, y)) == Inputs((x, y))
    assert as_inputs({"x": x}) == Inputs(kwargs={"x": x})
    assert as_inputs(([x, y],)).args == ([x, y],)
    given = Inputs((x,), origin="program")
    assert as_inputs(given) is given
    assert as_inputs(x).origin == "given"


@pytest.mark.parametrize("wrong", [[torch.ones(1)], 3, "1x3", None, {1: torch.ones(1)}])
def test_what_is_no_input(wrong: object) -> None:
    with pytest.raises(UsageError, match="a tensor, a tuple or a dict of keyword arguments, not a "):
        as_inputs(wrong)


# --- inferred -----------------------------------------------------------------------------------------------------------------------


def digits(size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * size * size, 10))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "image": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1)), (1, 3, 224, 224), torch.float32),
    **{f"flattened {size}": (lambda size=size: digits(size), (1, 1, size, size), torch.float32) for size in (8, 28, 32, 64, 11, 17)},
    "double": (lambda: digits(8).double(), (1, 1, 8, 8), torch.float64),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), (1, 5), torch.float32),
    "linear over a sequence": (lambda: nn.TransformerEncoderLayer(8, 2, 4, batch_first=True), (1, 8), torch.float32),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 2, 3), nn.BatchNorm1d(2)), (1, 4, 256), torch.float32),
    "conv1d, flattened": (lambda: nn.Sequential(nn.Conv1d(4, 2, 1), nn.Flatten(), nn.Linear(128, 3)), (1, 4, 64), torch.float32),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 2, 3), nn.BatchNorm3d(2)), (1, 2, 16, 112, 112), torch.float32),
    "tokens": (Tokens, (1, 7), torch.int64),
    "recurrent": (lambda: nn.LSTM(6, 3, batch_first=True), (1, 16, 6), torch.float32),
    "a norm alone": (lambda: nn.BatchNorm2d(5), (1, 5, 32, 32), torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_infer(case: str) -> None:
    make, shape, dtype = CASES[case]
    inputs = infer(make())
    assert inputs is not None
    assert inputs.origin == "inferred"
    assert not inputs.kwargs
    (x,) = inputs.args
    assert (tuple(x.shape), x.dtype) == (shape, dtype)


class Encoder(nn.Module):
    """As the encoders of transformers: tokens, and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 3), nn.LayerNorm(3)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: bool = False,
    ) -> torch.Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.norm(self.words(input_ids) * mask[..., None])  # type: ignore[no-any-return]


class WithoutMask(Encoder):
    """Has the argument, and refuses it."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        assert attention_mask is None
        return super().forward(input_ids)


def test_tokens_come_with_the_mask_that_tokenizers_give() -> None:
    inputs = infer(Encoder())
    assert inputs is not None
    assert not inputs.args
    assert list(inputs.kwargs) == ["input_ids", "attention_mask"]
    assert inputs.kwargs["attention_mask"].tolist() == [[1] * 6 + [0]]  # a mask of ones alone would not show that a file ignores it
    without = infer(WithoutMask())
    assert without is not None
    assert [tuple(x.shape) for x in without.args] == [(1, 7)]
    assert not without.kwargs


LACKS = (
    "the file takes input_ids and attention_mask, not position_ids, as its inputs were inferred: "
    "give all that you call the model with, --input FILE.npz with the names, to have them"
)
FIXED = "texts have 7 tokens in this file, as its inputs were inferred: --dynamic spatial frees their number"


def test_what_a_file_of_inferred_tokens_does_not_take_is_said() -> None:
    inputs = infer(Encoder())
    assert inputs is not None
    assert notes_on(inputs, Encoder(), fixed=False) == [LACKS]
    assert notes_on(inputs, Encoder(), fixed=True) == [FIXED, LACKS]
    assert notes_on(Inputs(kwargs=inputs.kwargs), Encoder(), fixed=True) == []  # given
    tokens, images = infer(Tokens()), infer(digits(8))
    assert tokens is not None
    assert images is not None
    assert (notes_on(tokens, Tokens(), fixed=False), notes_on(tokens, Tokens(), fixed=True)) == ([], [FIXED])
    assert notes_on(images, digits(8), fixed=True) == []


class Two(nn.Linear):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + y


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("a lock")


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Sequential(), Two(2, 2), Uncopied(2, 2), nn.Sequential(nn.Conv2d(3, 2, 3), nn.Linear(5, 2), nn.Conv2d(7, 1, 1))]
)
def test_nothing_to_infer(model: nn.Module) -> None:
    assert infer(model) is None


def test_lazy_layers_say_nothing_yet() -> None:
    lazy = nn.LazyLinear(3)
    infer(lazy)
    assert isinstance(lazy, nn.LazyLinear)
    assert lazy.has_uninitialized_params()


class Nosy(nn.Module):
    """Changes everything that a forward can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.register_buffer("count", torch.zeros(1))
        self.seen: list[int] = []
        self.plain = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.plain += 1
        self.seen.append(1)
        self.train(not self.training)
        random.random(), np.random.rand(), torch.rand(1)
        return nn.functional.dropout(self.conv(x), training=True)


def test_inferring_changes_nothing() -> None:
    model = nn.Sequential(Nosy(), nn.BatchNorm2d(2)).train()
    called: list[int] = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    assert infer(model) is not None
    assert model.training
    assert model[0].training
    assert model[0].seen == called == []
    assert model[0].plain.item() == 0
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_inferring_copies_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda *_: pytest.fail("copied"))
    assert infer(digits(8)) is not None


def test_the_same_every_time() -> None:
    first, second = infer(digits(8)), infer(digits(8))
    assert first is not None
    assert second is not None
    assert torch.equal(first.args[0], second.args[0])


@pytest.mark.parametrize("name", ["resnet18", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_infer_torchvision(name: str) -> None:
    pytest.importorskip("torchvision")
    inputs = infer(load(f"torchvision:{name}").model)  # type: ignore[arg-type]
    assert inputs is not None
    assert tuple(inputs.args[0].shape) == (1, 3, 224, 224)


# --- from the command line ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        ("1x3x224x224", (1, 3, 224, 224), torch.float32),
        ("2", (2,), torch.float32),
        ("1x16:int64", (1, 16), torch.int64),
        ("4x2:bool", (4, 2), torch.bool),
        ("3x5:float16", (3, 5), torch.float16),
        ("3x5:torch.bfloat16", (3, 5), torch.bfloat16),
        ("3x5:double", (3, 5), torch.float64),
        ("3x5:uint8", (3, 5), torch.uint8),
        ("3x5:complex64", (3, 5), torch.complex64),
    ],
)
def test_parse(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = parse([spec])
    assert inputs.origin == "given"
    (x,) = inputs.args
    assert (tuple(x.shape), x.dtype) == (shape, dtype)
    assert torch.equal(x, parse([spec]).args[0])


def test_parse_many() -> None:
    x, ids, mask = parse(["64x5", "40x50:int64", "300:bool"]).args
    assert abs(x.mean()) < 0.3
    assert 0.8 < x.std() < 1.2
    assert (ids.min(), ids.max()) == (0, 9)
    assert 0 < mask.sum() < 300
    first, second = parse(["8", "8"]).args
    assert not torch.equal(first, second)
    assert parse([]) == Inputs()


@pytest.mark.parametrize("spec", ["1x3x", "0x3", "", "x", "1X3", "1x-3", "1 x 3", "axb", "1x3:", "1,3", "01x3"])
def test_misspelt_shapes(spec: str) -> None:
    with pytest.raises(UsageError, match=r"--input .*is not a shape") as caught:
        parse([spec])
    assert "1x3x224x224" in str(caught.value.hint)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no dtype flot") as caught:
        parse(["1x3:flot"])
    assert "float16" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"has \d+ elements"):
        parse(["100000x100000"])
    with pytest.raises(UsageError, match=r"there is no such file"):
        parse([str(tmp_path / "x.pt")])
    with pytest.raises(UsageError, match=r"is a file, which holds all inputs, but there are 2 --input"):
        parse([str(tmp_path / "x.pt"), "1x3"])


def test_parse_torch_files(tmp_path: Path) -> None:
    x, y = torch.rand(2, 3), torch.rand(4)
    path = tmp_path / "in.pt"
    for content, args, kwargs in [(x, (x,), {}), ((x, y), (x, y), {}), ([x, y], (x, y), {}), ({"a": x, "b": y}, (), {"a": x, "b": y})]:
        torch.save(content, path)
        inputs = parse([str(path)])
        assert all(torch.equal(found, given) for found, given in zip(inputs.args, args, strict=True))
        assert list(inputs.kwargs) == list(kwargs)


def test_parse_numpy_files(tmp_path: Path) -> None:
    x, y = np.ones((2, 3), np.float32), np.arange(4)
    np.savez(tmp_path / "a.npz", x, y)
    inputs = parse([str(tmp_path / "a.npz")])
    assert [tuple(each.shape) for each in inputs.args] == [(2, 3), (4,)]
    np.savez(tmp_path / "b.npz", ids=y, mask=x)
    inputs = parse([str(tmp_path / "b.npz")])
    assert not inputs.args
    assert inputs.kwargs["ids"].dtype == torch.int64
    np.savez(tmp_path / "c.npz", **{"not a name": x})
    assert len(parse([str(tmp_path / "c.npz")]).args) == 1
    np.save(tmp_path / "d.npy", x)
    assert tuple(parse([str(tmp_path / "d.npy")]).args[0].shape) == (2, 3)


class _Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", ["x.pt", "x.npz", "x.npy"])
def test_files_of_inputs_run_nothing(tmp_path: Path, name: str) -> None:
    path, marker = tmp_path / name, tmp_path / "marker"
    payload = _Payload(str(marker))
    if name == "x.pt":
        torch.save(payload, path)
    elif name == "x.npz":
        np.savez(path, np.array([payload], dtype=object))
    else:
        np.save(path, np.array([payload], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"cannot be read"):
        parse([str(path)])
    assert not marker.exists()
    path.write_bytes(b"garbage")
    with pytest.raises(UsageError, match=r"cannot be read"):
        parse([str(path)])


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA], ids=["deflate", "lzma"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, name: str, method: int) -> None:
    """What the archive says that it holds is what would be unpacked: nothing reads on beyond that."""
    with zipfile.ZipFile(tmp_path / name, "w", method) as out, out.open("a.npy", "w") as part:
        for _ in range(5):
            part.write(bytes(1 << 24))
    data = bytearray((tmp_path / name).read_bytes())
    for at in (data.index(b"PK\x01\x02") + 24,):  # the size in the directory at the end
        data[at : at + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{re.escape(name)} is not read: it unpacks to 4,294,967,280 bytes, [\d,]+ times its own size"):
        parse([str(tmp_path / name)])


@pytest.mark.parametrize("zeros", [True, False])
def test_arrays_that_are_compressed_are_read(tmp_path: Path, zeros: bool) -> None:
    made = np.zeros((2, 3, 700, 600), np.float32) if zeros else np.random.default_rng(3).standard_normal((2, 3, 7, 6)).astype(np.float32)
    np.savez_compressed(tmp_path / "x.npz", made)
    (found,) = parse([str(tmp_path / "x.npz")]).args
    assert np.array_equal(found.numpy(), made)


# --- lists of batches -----------------------------------------------------------------------------------------------------------------


class One(nn.Linear):
    pass


class MayTakeTwo(nn.Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x if mask is None else x * mask)


class TakesAny(nn.Linear):
    def forward(self, *xs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(sum(xs[1:], xs[0]))


def rows(count: int, width: int = 5) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


LABELS = torch.arange(4)

# what a file holds, the model that it is for, and the batches that it is read as
LISTS: dict[str, tuple[object, type[nn.Module], list[object]]] = {
    "tensors": ([rows(4), rows(4), rows(3)], One, [rows(4), rows(4), rows(3)]),
    "one tensor": ([rows(4)], MayTakeTwo, [rows(4)]),
    "more tensors than arguments": ([rows(4), rows(4), rows(3)], MayTakeTwo, [rows(4), rows(4), rows(3)]),
    "pairs": ([(rows(4), LABELS), (rows(3), LABELS[:3])], One, [(rows(4), LABELS), (rows(3), LABELS[:3])]),
    "what a DataLoader yields": ([[rows(4), LABELS], [rows(3), LABELS[:3]]], One, [[rows(4), LABELS], [rows(3), LABELS[:3]]]),
    "dicts": ([{"input": rows(4)}, {"input": rows(3)}], One, [{"input": rows(4)}, {"input": rows(3)}]),
    "samples": ([(rows(1)[0], 3), (rows(2)[1], 7)], One, [[torch.stack([rows(1)[0], rows(2)[1]]), torch.tensor([3, 7])]]),
    "samples, labels as tensors": ([(rows(2)[i], LABELS[i]) for i in (0, 1)], One, [[rows(2), LABELS[:2]]]),
    "the arguments of one": ([rows(4), rows(4)], Two, [(rows(4), rows(4))]),
    "a tensor and its labels": ([rows(4), LABELS], One, [(rows(4), LABELS)]),
    "a tensor and a mask": ([rows(4), rows(4) > 0], MayTakeTwo, [(rows(4), rows(4) > 0)]),
    "a tuple": ((rows(4), rows(4)), MayTakeTwo, [(rows(4), rows(4))]),
    "a dict": ({"x": rows(4), "mask": rows(4)}, MayTakeTwo, [{"x": rows(4), "mask": rows(4)}]),
    "stacked": (rows(9), One, [(rows(9),)]),
}


def same(found: object, expected: object) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)
    assert isinstance(expected, (list, tuple))
    return isinstance(found, (list, tuple)) and len(found) == len(expected) and all(map(same, found, expected))


@pytest.mark.parametrize("what", LISTS)
def test_what_a_file_of_batches_holds(what: str, tmp_path: Path) -> None:
    content, make, expected = LISTS[what]
    path = tmp_path / "data.pt"
    torch.save(content, path)
    batches = batches_of(str(path), make(5, 5))
    assert same(batches, expected)
    for batch in batches:
        args, kwargs = arguments_of(batch, model := make(5, 5))
        model(*args, **kwargs)
    inputs = given_to(make(5, 5), parse([str(path)]))  # of --input the first batch
    make(5, 5)(*inputs.args, **inputs.kwargs)
    assert same(inputs.kwargs or inputs.args, (lambda args, kwargs: dict(kwargs) or args)(*arguments_of(batches[0], make(5, 5))))


def test_a_list_of_samples_makes_batches_of_32(tmp_path: Path) -> None:
    torch.save([{"x": row, "y": 1} for row in rows(70)], tmp_path / "data.pt")
    batches = batches_of(str(tmp_path / "data.pt"), One(5, 5))
    assert [len(batch["x"]) for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), rows(70))


@pytest.mark.parametrize("make", [MayTakeTwo, TakesAny])
def test_what_may_be_either_is_refused(make: type[nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "data.pt"
    torch.save([rows(4), rows(4)], path)
    for ask, option in (
        (lambda: batches_of(str(path), make(5, 5)), "--data "),
        (lambda: given_to(make(5, 5), parse([str(path)])), "--input"),
    ):
        with pytest.raises(UsageError) as raised:
            ask()
        assert raised.value.message.startswith(option)
        assert f"holds a list of 2 tensors of one kind, which {make.__name__} may take as 2 batches or as the 2 arguments of one" in str(
            raised.value
        )
        assert "save a list of tuples" in str(raised.value.hint)


def test_files_that_hold_no_batch(tmp_path: Path) -> None:
    torch.save([], tmp_path / "data.pt")
    with pytest.raises(UsageError, match=r"--data .*data.pt holds an empty list"):
        batches_of(str(tmp_path / "data.pt"), One(5, 5))
    (tmp_path / "data.pt").write_bytes(b"garbage")
    with pytest.raises(UsageError, match=r"--data .*data.pt cannot be read"):
        batches_of(str(tmp_path / "data.pt"), One(5, 5))


def test_a_directory_of_lists_and_of_single_batches(tmp_path: Path) -> None:
    torch.save([rows(4), rows(3)], tmp_path / "a.pt")
    torch.save(rows(2), tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", rows(6).numpy())
    found = [arguments_of(batch, One(5, 5))[0][0] for batch in batches_of(str(tmp_path), One(5, 5))]
    assert same(found, [rows(4), rows(3), rows(2), rows(6)])
