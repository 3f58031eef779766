"""A pickle runs nothing. Every attack here is a real file whose payload would leave a marker, or would do harm when the model runs."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision_shim  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils

import normswap
from fixtures.pickle_writer import archive, call, dic, legacy, module, name, new, num, ordered, tensor, text, tup
from normswap.errors import LoadError, NormswapError, UnsafePickleError
from normswap.files.load import load


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


INNOCENT = {"torch", "encodings"}  # a lazy submodule of torch, a codec


def refused(path: Path, marker: Path | None = None) -> UnsafePickleError:
    before = set(sys.modules)
    with pytest.raises(UnsafePickleError) as caught:
        load(str(path))
    assert marker is None or not marker.exists()
    assert {each for each in set(sys.modules) - before if each.partition(".")[0] not in INNOCENT} == set()
    assert caught.value.wanted
    return caught.value


# --- what is refused ----------------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda m: call("os.system", text(f"touch {m}")),
    "posix.system": lambda m: call("posix.system", text(f"touch {m}")),
    "builtins.eval": lambda m: call("builtins.eval", text(f"open({m!r}, 'w')")),
    "builtins.exec": lambda m: call("__builtin__.exec", text(f"open({m!r}, 'w')")),
    "builtins.open": lambda m: call("builtins.open", text(m), text("w")),
    "builtins.getattr": lambda m: call("builtins.getattr", name("torch.nn.modules.linear.Linear"), text("__init__")),
    "subprocess.Popen": lambda m: call("subprocess.Popen", tup(text("touch"), text(m))),
    "pathlib.Path": lambda m: call("pathlib.Path", text(m)),
    "torch.load": lambda m: call("torch.load", text(m)),
    "torch.hub.load": lambda m: call("torch.hub.load", text(m), text("model")),
    "torch.save": lambda m: call("torch.save", num(1), text(m)),
    "torch.fx.graph_module.reduce_graph_module": lambda m: call(
        "torch.fx.graph_module.reduce_graph_module", dic(_code=text(f"open({m!r}, 'w')")), text("import os")
    ),
    "torch.jit._script.RecursiveScriptModule": lambda m: new("torch.jit._script.RecursiveScriptModule"),
    "torch.fx.graph_module.GraphModule": lambda m: new("torch.fx.graph_module.GraphModule"),
    "torch.package.package_importer.PackageImporter": lambda m: call("torch.package.package_importer.PackageImporter", text(m)),
    "torch.utils.cpp_extension.load_inline": lambda m: call("torch.utils.cpp_extension.load_inline", text(m), text("")),
    "torch.ops.load_library": lambda m: call("torch.ops.load_library", text(m)),
    "transformers.AutoModel.from_pretrained": lambda m: call("transformers.AutoModel.from_pretrained", text(m)),
    "timm.models._hub.load_state_dict_from_hf": lambda m: call("timm.models._hub.load_state_dict_from_hf", text(m)),
    # a dotted name reaches from an allowed class to everything
    "torch.nn.modules.module.Module.forward.__globals__": lambda m: b"ctorch.nn.modules.module\nModule.forward.__globals__\n",
    # what a reviewed place has itself imported is not of that place
    "torch.nn.modules.module.functools": lambda m: call("torch.nn.modules.module.functools", text(m)),
    "torchvision.models._api.importlib": lambda m: name("torchvision.models._api.importlib"),
    "torch.nn.modules.module.register_module_forward_hook": lambda m: call(
        "torch.nn.modules.module.register_module_forward_hook", name("torch.nn.functional.relu")
    ),
}


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("wanted", CALLS)
def test_calls_are_refused(tmp_path: Path, marker: Path, wanted: str, write: Callable[..., Path]) -> None:
    program = dic(weight=tensor() if write is archive else num(1), trap=CALLS[wanted](str(marker)))
    error = refused(write(tmp_path / "evil.pt", program), marker)
    expected = "posix.system" if wanted == "posix.system" else wanted
    assert any(expected in item for item in error.wanted), error.wanted
    assert "evil.pt is a pickle that wants to run code that nobody vouched for" in str(error)


def test_pickled_by_reduce_as_attackers_do(tmp_path: Path, marker: Path) -> None:
    for writer in (functools.partial(torch.save), functools.partial(torch.save, _use_new_zipfile_serialization=False)):
        writer({"a": _Payload(str(marker))}, tmp_path / "evil.pt")
        assert "system" in refused(tmp_path / "evil.pt", marker).wanted[0]
    with (tmp_path / "plain.pkl").open("wb") as out:
        pickle.dump(_Payload(str(marker)), out, protocol=2)
    refused(tmp_path / "plain.pkl", marker)


class _Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused_with_what_they_wanted(tmp_path: Path, marker: Path, protocol: int) -> None:
    torch.save({"a": _Payload(str(marker))}, tmp_path / "evil.pt", pickle_protocol=protocol)
    assert any("system" in item for item in refused(tmp_path / "evil.pt", marker).wanted)


def test_an_innocent_file_of_another_protocol_is_an_error_that_says_so(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "new.pt", pickle_protocol=4)
    with pytest.raises(LoadError, match=r"protocol other than 2") as caught:
        load(str(tmp_path / "new.pt"))
    assert not isinstance(caught.value, UnsafePickleError)
    assert "without pickle_protocol" in str(caught.value.hint)


def test_old_opcodes_and_extension_codes(tmp_path: Path, marker: Path) -> None:
    command = f"S'touch {marker}'\n".encode()
    assert "posix.system" in refused(archive(tmp_path / "inst.pt", b"(" + command + b"iposix\nsystem\n"), marker).wanted
    assert "posix.system" in refused(archive(tmp_path / "obj.pt", b"(cposix\nsystem\n" + command + b"o"), marker).wanted
    assert "copyreg.extension_5" in refused(archive(tmp_path / "ext.pt", b"\x82\x05)R"), marker).wanted


RELU, LINEAR, SEQUENTIAL = "torch.nn.modules.activation.ReLU", "torch.nn.modules.linear.Linear", "torch.nn.modules.container.Sequential"
F_RELU = name("torch.nn.functional.relu")
PARTIAL = call("functools.partial", F_RELU)
GADGETS: dict[str, tuple[bytes, str]] = {
    "a constructor": (call(LINEAR, num(2), num(3)), "Linear(2, 3)"),
    "a constructor by newobj": (name(LINEAR) + tup(num(2)) + b"\x81", "Linear.__new__(2)"),
    "an instance called": (module() + tup(num(1)) + b"R", "ReLU object>(1)"),
    "a function called": (F_RELU + tup(num(1)) + b"R", "relu(1)"),
    "rebuild calls anything": (
        call("torch._tensor._rebuild_from_type_v2", name(LINEAR), name("torch.Tensor"), tup(num(2), num(3)), b"}"),
        "_rebuild_from_type_v2",
    ),
    "rebuild calls an instance": (
        call("torch._tensor._rebuild_from_type_v2", module(), name("torch.Tensor"), tup(num(2)), b"}"),
        "_rebuild_from_type_v2",
    ),
    "rebuild calls a partial": (
        call("torch._tensor._rebuild_from_type_v2", PARTIAL, name("torch.Tensor"), tup(num(2)), b"}"),
        "_rebuild_from_type_v2",
    ),
    "rebuild sets what a tensor has": (
        call(
            "torch._tensor._rebuild_from_type_v2",
            name("torch._utils._rebuild_tensor_v2"),
            name("torch.Tensor"),
            tensor()[len(name("torch._utils._rebuild_tensor_v2")) : -1],
            dic(_backward_hooks=ordered(a=F_RELU)),
        ),
        "_rebuild_from_type_v2",
    ),
    "an OrderedDict of pairs with a layer as a key": (
        call("collections.OrderedDict", b"](](" + module() + num(1) + b"ee"),
        "a dict with the key",
    ),
    "an OrderedDict of what is no pairs": (call("collections.OrderedDict", b"](](" + text("a") + b"ee"), "OrderedDict"),
    "a Counter of pairs": (call("collections.Counter", b"](](" + text("a") + num(1) + b"ee"), "Counter"),
    "an old tensor past its storage": (
        name("torch._utils._rebuild_tensor") + tensor(size=4)[len(name("torch._utils._rebuild_tensor_v2")) : -len(ordered()) - 3] + b"tR",
        "_rebuild_tensor",
    ),
    "hooks on a tensor": (tensor(hooks=ordered(a=F_RELU)), "_rebuild_tensor_v2"),
    "hooks on a tensor, filled later": (
        tensor(hooks=ordered() + b"q\x01") + b"0h\x01"[1:] + b"(" + text("a") + F_RELU + b"u" + b"\x86",
        "_rebuild_tensor_v2",
    ),
    "forward": (module(forward=F_RELU), "forward = torch.nn.functional.relu"),
    "forward, by partial": (module(forward=PARTIAL), "forward = "),
    "forward, by class": (module(forward=name(LINEAR)), "forward = torch.nn.modules.linear.Linear"),
    "forward, by module": (module(forward=module()), "forward = "),
    "another method": (module(train=F_RELU), "train = "),
    "call": (module(__call__=F_RELU), "__call__ = "),
    "class": (module(__class__=name(LINEAR)), "__class__ = "),
    "compiled call": (module(_compiled_call_impl=F_RELU), "_compiled_call_impl = "),
    "a hook": (module(_forward_hooks=ordered(a=F_RELU)), "_forward_hooks = "),
    "a hook, a plain dict": (module(_forward_pre_hooks=dic(a=PARTIAL)), "_forward_pre_hooks = "),
    "a hook on state dicts": (module(_state_dict_hooks=dic(a=F_RELU)), "_state_dict_hooks = "),
    "a hook that is a module": (module(_forward_hooks=ordered(a=module())), "_forward_hooks = "),
    "a hook, filled later": (
        b"}q\x05" + module(_forward_hooks=b"h\x05") + b"h\x05(" + text("a") + F_RELU + b"u" + b"\x87",
        "_forward_hooks = ",
    ),
    "a function among the modules": (module(_modules=dic(a=F_RELU)), "_modules = "),
    "a partial among the modules": (module(SEQUENTIAL, _modules=dic(a=PARTIAL)), "_modules = "),
    "a module among the parameters": (module(_parameters=dic(a=module())), "_parameters = "),
    "modules that are a list": (module(_modules=b"]"), "_modules = "),
    "a state that is a module": (name(RELU) + b")\x81" + module() + b"b", "with the state"),
    "a state of two parts": (name(RELU) + b")\x81" + tup(b"N", dic(forward=F_RELU)) + b"b", "with the state"),
    "a class that builds models as a value": (
        module(cls=name("torchvision.models.resnet.ResNet")),
        "'cls': torchvision.models.resnet.ResNet",
    ),
    "a rebuild function as a value": (module(f=name("torch._tensor._rebuild_from_type_v2")), "'f': torch._tensor._rebuild_from_type_v2"),
    "partial of a rebuild function": (call("functools.partial", name("torch._tensor._rebuild_from_type_v2")), "functools.partial"),
    "partial of partial": (call("functools.partial", PARTIAL), "functools.partial"),
    "partial with arguments to call with": (call("functools.partial", F_RELU, num(1)), "functools.partial"),
    "partial, its function exchanged": (
        PARTIAL + tup(name("torch._tensor._rebuild_from_type_v2"), b")", b"}", b"N") + b"b",
        "functools.partial with the state",
    ),
    "partial, with attributes": (PARTIAL + tup(F_RELU, b")", b"}", dic(func=F_RELU)) + b"b", "functools.partial with the state"),
    "partial, holding a class": (PARTIAL + tup(F_RELU, tup(name("torchvision.models.resnet.ResNet")), b"}", b"N") + b"b", "as a value"),
    "an OrderedDict that lies": (ordered() + dic(items=PARTIAL) + b"b", "attributes of a dict"),
    "an object as a key": (b"}" + module() + num(1) + b"s", "a dict with the key"),
    "an object in a set": (call("builtins.set", b"](" + module() + b"e"), "builtins.set"),
    "a tuple bomb in a set": (call("builtins.set", b"](" + b")" + b"q\x01h\x01\x86" * 60 + b"e"), "builtins.set"),
    "bytes by another codec": (call("_codecs.encode", text("x"), text("idna")), "_codecs.encode"),
    "a kernel from the hub": (
        module(config=new("torchvision.models.detection._utils.Matcher", _attn_implementation_internal=text("evil/kernel"))),
        "_attn_implementation_internal",
    ),
    "a persistent object": (num(7) + b"Q", "the persistent object 7"),
    "a persistent object of no known kind": (tup(text("file"), text("/etc/passwd")) + b"Q", "the persistent object"),
    "a storage of a kind that is a function": (
        tup(text("storage"), F_RELU, text("0"), text("cpu"), num(3)) + b"Q",
        "the persistent object",
    ),
    "a tensor past its storage": (tensor(size=4), "_rebuild_tensor_v2"),
    "a tensor with a stride past its storage": (tensor(size=3, stride=2), "_rebuild_tensor_v2"),
    "a tensor repeated to a terabyte": (tensor(size=2**30, stride=0), "_rebuild_tensor_v2"),
}


@pytest.mark.parametrize("gadget", GADGETS)
def test_gadgets_of_allowed_names_are_refused(tmp_path: Path, gadget: str) -> None:
    program, expected = GADGETS[gadget]
    error = refused(archive(tmp_path / "evil.pt", b"](" + program + b"e"))
    assert any(expected in item for item in error.wanted), error.wanted


BOMBS = {
    "tuples": (b")" + b"q\x01h\x01\x86" * 60, "values inside values, more than normswap reads"),
    "lists": (b"](" * 60 + b"]q\x01" + b"h\x01eq\x01" * 60, "values inside values, more than normswap reads"),
    "depth": (b")" + b"\x85" * 5000, "values inside values, more than normswap reads"),
    "a list in itself": (b"]q\x01h\x01a", "a value that contains itself"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_values_that_copying_would_not_end_with(tmp_path: Path, bomb: str) -> None:
    program, text = BOMBS[bomb]
    with pytest.raises(LoadError, match=f"^the file holds {text}"):
        load(str(archive(tmp_path / "bomb.pt", module(note=program))))


def test_values_inside_values_are_read(tmp_path: Path) -> None:
    shared = ("a", 1)
    model = nn.ReLU()
    model.note = [{"a": [shared, shared, [1.5] * 10_000]}, [[[[[shared]]]]]]  # type: ignore[assignment]
    assert roundtrip(model, tmp_path).note == model.note


def test_the_carrier_of_the_gadgets_is_innocent(tmp_path: Path) -> None:
    """So that what the test above sees refused is the gadget."""
    assert isinstance(load(str(archive(tmp_path / "ok.pt", module()))).model, nn.ReLU)
    ok = module(
        f=F_RELU, p=PARTIAL + tup(F_RELU, b")", dic(inplace=b"\x89"), b"N") + b"b", t=tensor(), cls=name(LINEAR), _forward_hooks=ordered()
    )
    found = load(str(archive(tmp_path / "ok.pt", ok))).model
    assert found.f is F.relu
    assert found.p.func is F.relu
    assert found.p.keywords == {"inplace": False}


def test_no_import_of_what_is_not_reviewed(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_package.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    assert refused(archive(tmp_path / "a.pt", new("evil_package.Net")), marker).wanted == ("evil_package.Net",)
    for place in (
        "torch.distributed.elastic.agent.X",
        "timm.models.__main__.X",
        "transformers.models.bert.convert_bert_to.X",
        "normswap.cli.app.X",
        "this.X",
    ):
        assert refused(archive(tmp_path / "a.pt", new(place)), marker).wanted == (place,)


def test_one_bad_name_keeps_the_good_ones_from_being_imported(tmp_path: Path) -> None:
    place = "timm.models.visformer"
    before = place in sys.modules
    refused(archive(tmp_path / "a.pt", dic(good=new(f"{place}.Visformer"), bad=name("os.system"))))
    assert (place in sys.modules) == before


def test_all_that_is_wanted_is_listed(tmp_path: Path) -> None:
    error = refused(archive(tmp_path / "a.pt", dic(**{f"k{i}": name(f"evil.f{i}") for i in range(30)})))
    assert error.wanted == tuple(f"evil.f{i}" for i in range(30))
    assert "... and 10 more" in str(error)


# --- damaged ------------------------------------------------------------------------------------------------------------------------

DAMAGED = {
    "a storage larger than the file": (dic(a=tensor(size=3, numel=2**31 - 1)), {"0": bytes(12)}),
    "a storage that is not there": (dic(a=tensor(key="7")), {"0": bytes(12)}),
    "a storage cut short": (dic(a=tensor()), {"0": bytes(11)}),
    "one storage, two sizes": (dic(a=tensor(), b=tensor(size=2, numel=2)), {"0": bytes(12)}),
    "an empty stack": (b"", {}),
    "a memo that is not there": (b"h\x07", {}),
    "a string longer than the file": (b"X" + struct.pack("<I", 2**32 - 1) + b"abc", {}),
    "not UTF-8": (b"X" + struct.pack("<I", 2) + b"\xff\xfe", {}),
    "an odd number of items": (b"}(Nu", {}),
    "a mark without end": (b"(((", {}),
    "a state for a list": (b"]}b", {}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    program, storages = DAMAGED[damage]
    with pytest.raises(LoadError, match=r"bad\.pt is damaged") as caught:
        load(str(archive(tmp_path / "bad.pt", program, storages=storages)))
    assert not isinstance(caught.value, UnsafePickleError)


def test_one_part_of_an_archive_of_several(tmp_path: Path) -> None:
    """Of which zipfile raises an error where it is asked whether it is an archive at all."""
    path = tmp_path / "part.pt"
    torch.save(nn.BatchNorm2d(3), path)
    data = bytearray(path.read_bytes())
    locator = data.rindex(b"PK\x06\x07")
    data[locator + 16 : locator + 20] = struct.pack("<I", 2)  # how many parts there are
    path.write_bytes(data)
    with pytest.raises(LoadError, match=r"^part\.pt is damaged: "):
        load(str(path))


def test_endless_program(tmp_path: Path) -> None:
    path = tmp_path / "long.pt"
    with path.open("wb") as out:
        out.write(b"\x80\x02")
        out.write(b"]" * (1 << 16))
        out.truncate(8 << 30)
    with pytest.raises(LoadError):
        load(str(path))


def test_zip_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("m/data.pkl", b"\x80\x02N.")
        out.writestr("m/data/0", bytes(50 << 20))
        out.writestr("m/version", b"3\n")
    with pytest.raises(LoadError, match=r"unpack to .* more than its own"):
        load(str(tmp_path / "bomb.pt"))


@pytest.mark.parametrize("flips", [pytest.param(120, id="some"), pytest.param(2000, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("new_form", [True, False])
def test_every_truncation_and_many_flipped_bytes_end_in_an_error_or_a_model(tmp_path: Path, new_form: bool, flips: int) -> None:
    stream = io.BytesIO()
    weights = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    torch.save(weights if new_form else weights.state_dict(), stream, _use_new_zipfile_serialization=new_form)
    whole = stream.getvalue()
    path = tmp_path / "cut.pt"
    for length in range(1, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(NormswapError):
            load(str(path), arch="torch.nn:ReLU" if not new_form else None)
    dice = random.Random(0)
    for _ in range(flips):
        broken = bytearray(whole)
        for _ in range(dice.choice((1, 1, 4))):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        path.write_bytes(broken)
        with contextlib.suppress(NormswapError):
            load(str(path), arch="torch.nn:ReLU" if not new_form else None)


# --- what is read -------------------------------------------------------------------------------------------------------------------


def roundtrip(model: nn.Module, tmp_path: Path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"))
    assert loaded.form == "module"
    assert isinstance(loaded.model, type(model))
    theirs, ours = loaded.model.state_dict(), model.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    return loaded.model


class _Keeps(nn.Identity):
    pass


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convs and norms": lambda: nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Conv3d(2, 3, 3), nn.GroupNorm(3, 3), nn.LayerNorm(4)
    ),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4, bidirectional=True), nn.RNNCell(2, 3)]),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True), 2),
    "containers": lambda: nn.ModuleDict({"a": nn.ParameterList([torch.ones(2)]), "b": nn.ParameterDict({"c": torch.ones(3)})}),
    "no affine, no statistics": lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)),
    "half": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).half(),
    "bfloat16": lambda: nn.Linear(2, 3).bfloat16(),
    "double": lambda: nn.Linear(2, 3).double(),
    "complex": lambda: nn.ParameterList([torch.ones(2, dtype=torch.complex64)]),
    "embedding": lambda: nn.EmbeddingBag(10, 3),
    "upsampling": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.AdaptiveAvgPool2d(1), nn.Unflatten(1, (1, 2))),
}


@pytest.mark.parametrize("layers", LAYERS)
def test_torch_layers_are_read(tmp_path: Path, layers: str) -> None:
    roundtrip(LAYERS[layers](), tmp_path)


def test_what_models_keep_beside_layers_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    model.note = "text"
    model.sizes = [torch.Size([1, 2]), (1, 2.5), {"a": None, 3: b"\x00\xff", (1, 2): {4}}]
    model.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    model.norm_class, model.activation, model.dtype = nn.BatchNorm2d, F.relu, torch.float16
    model.device, model.layout, model.z = torch.device("cuda:0"), torch.strided, 1 + 2j
    model.register_buffer("wide", torch.ones(1).expand(4, 5))
    model[0].weight._is_initialized = True
    found = roundtrip(model, tmp_path)
    assert found.sizes == model.sizes
    assert found.norm_layer.func is nn.LayerNorm
    assert found.norm_layer.keywords == {"eps": 1e-6}
    assert (found.norm_class, found.activation, found.dtype) == (nn.BatchNorm2d, F.relu, torch.float16)
    assert (found.device, found.layout, found.z) == (torch.device("cuda:0"), torch.strided, 1 + 2j)
    assert found.wide.stride() == (0, 0)
    assert found[0].weight._is_initialized is True


def wrapped_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trained(model: nn.Module) -> nn.Module:
    for _ in range(2):  # DistributedDataParallel lays its buckets anew after the first
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    return model


WRAPPED: dict[str, Callable[[nn.Module], object]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DistributedDataParallel, trained": lambda net: trained(nn.parallel.DistributedDataParallel(net)),
    "AveragedModel": swa_utils.AveragedModel,
    "twice": lambda net: nn.DataParallel(nn.DataParallel(net)),
    "beside other things": lambda net: {"model": nn.DataParallel(net), "epoch": 3},
}


@pytest.mark.parametrize(("new_form", "trust"), [(True, False), (True, True), (False, True)])  # the old form always takes trust
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_what_wraps_a_model_is_read_as_the_model(tmp_path: Path, process_group: None, wrapping: str, new_form: bool, trust: bool) -> None:
    """Also where no process group is."""
    net = wrapped_net()
    path = tmp_path / "wrapped.pt"
    torch.save(WRAPPED[wrapping](net), path, _use_new_zipfile_serialization=new_form)
    torch.distributed.destroy_process_group()
    found = load(str(path), trust_pickle=trust).model
    assert type(found) is nn.Sequential
    assert not found.training
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())


def test_a_part_of_a_model_that_is_wrapped(tmp_path: Path) -> None:
    """As in torch's ImageNet example, which wrapped the features of VGG and AlexNet alone."""
    net = nn.ModuleDict({"features": nn.DataParallel(wrapped_net()), "head": nn.Linear(6, 5)})
    torch.save(net, tmp_path / "part.pt")
    found = load(str(tmp_path / "part.pt")).model
    assert list(found.state_dict())[:2] == ["features.0.weight", "features.0.bias"]
    assert not any(isinstance(module, nn.DataParallel) for module in found.modules())


WRAPPERS = ["torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "state",
    [
        {"_modules": dic(module=call("os.system", text("touch marker")))},
        {"forward": name("os.system")},
        {"gather": name("os.system")},
        {"_comm_hooks": b"]" + name("os.system") + b"a"},
        {"process_group": new("subprocess.Popen")},
        {"_modules": dic(module=name("torch.nn.modules.activation.ReLU"))},
    ],
    ids=lambda state: next(iter(state)),
)
def test_a_wrapper_opens_no_door(tmp_path: Path, marker: Path, wrapper: str, state: dict[str, bytes]) -> None:
    refused(archive(tmp_path / "bad.pt", new(wrapper, **state)), marker)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("state", [{}, {"_modules": dic()}, {"_modules": dic(module=b"N")}, {"module": module()}], ids=str)
def test_a_wrapper_of_nothing(tmp_path: Path, wrapper: str, state: dict[str, bytes]) -> None:
    path = archive(tmp_path / "empty.pt", new(wrapper, **state))
    with pytest.raises(LoadError, match=r"^empty\.pt is damaged: it wraps no model"):
        load(str(path))


def test_a_wrapper_that_wraps_itself(tmp_path: Path) -> None:
    wrapper = nn.DataParallel(nn.ReLU())
    wrapper._modules["module"] = wrapper
    torch.save(wrapper, tmp_path / "round.pt")
    for trust in (False, True):
        with pytest.raises(LoadError, match=r"^round\.pt is damaged: it wraps no model"):
            load(str(tmp_path / "round.pt"), trust_pickle=trust)


def test_a_compiled_model_is_still_refused(tmp_path: Path, marker: Path) -> None:
    torch.save(torch.compile(nn.Sequential(nn.Linear(2, 3)), backend="eager"), tmp_path / "compiled.pt")
    assert "torch._dynamo.eval_frame.OptimizedModule" in refused(tmp_path / "compiled.pt", marker).wanted


def test_a_coupled_model_is_read_and_trains_as_it_did(tmp_path: Path) -> None:
    """Its convs have a hook each: the only one that a file may hold."""
    torch.manual_seed(1)
    model = normswap.convert(wrapped_net(), torch.randn(2, 3, 8, 8)).model
    torch.save(model, tmp_path / "coupled.pt")
    found = load(str(tmp_path / "coupled.pt")).model
    assert isinstance(found, nn.Sequential)
    assert found[1].producer is found[0]
    states = []
    for each in (model, found):
        step = torch.optim.SGD(normswap.param_groups(each.train(), lr=0.1), momentum=0.9)
        for seed in range(3):
            step.zero_grad()
            each(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            step.step()
        states.append({name: tensor.tolist() for name, tensor in each.state_dict().items()})
    assert states[0] == states[1]


HOOKS = "_forward_pre_hooks"


@pytest.mark.parametrize(
    "state",
    [
        {HOOKS: b"}" + num(0) + name("os.system") + b"s"},
        {HOOKS: b"}" + num(0) + new("torch.nn.modules.activation.ReLU") + b"s"},
        {HOOKS: b"}" + num(0) + new("normswap.layer.batchless_norm.Source") + b"s"},
        {"_forward_hooks": b"}" + num(0) + new("normswap.layer.hooks.Before", norm=b"N") + b"s"},
        {HOOKS: b"}" + num(0) + new("normswap.layer.hooks.After", norm=b"N") + b"s"},
        {"_forward_hooks": b"}" + num(0) + name("os.system") + b"s"},
        {"_backward_pre_hooks": b"}" + num(0) + new("normswap.layer.hooks.Before", norm=b"N") + b"s"},
        {"_forward_hooks_always_called": b"}" + num(0) + name("os.system") + b"s"},
        {"_forward_pre_hooks_with_kwargs": b"}" + num(0) + name("os.system") + b"s"},
        {"_forward_pre_hooks_with_kwargs": b"}" + num(0) + text("yes") + b"s"},
    ],
    ids=str,
)
def test_other_hooks_are_refused(tmp_path: Path, marker: Path, state: dict[str, bytes]) -> None:
    refused(archive(tmp_path / "bad.pt", module(**state)), marker)


@pytest.mark.parametrize("norm", [b"N", text("norm"), num(3), new("normswap.layer.batchless_norm.Source"), module()], ids=str)
def test_a_hook_of_something_else(tmp_path: Path, norm: bytes) -> None:
    """It does nothing, or the file cannot be read."""
    hook = {HOOKS: b"}" + num(0) + new("normswap.layer.hooks.Before", norm=norm) + b"s"}
    with contextlib.suppress(LoadError):
        load(str(archive(tmp_path / "odd.pt", module(**hook))))


def test_sharing_flags_and_memory_format_are_read(tmp_path: Path) -> None:
    conv, norm = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(3)
    conv.weight.requires_grad = False
    tied = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = tied.weight
    found = roundtrip(nn.Sequential(conv, norm, norm, tied, other).eval(), tmp_path)
    assert found[1] is found[2]
    assert found[3].weight is found[4].weight
    assert found[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not found[0].weight.requires_grad
    assert not found.training


def test_what_the_caller_had_allowed_stays_allowed(tmp_path: Path) -> None:
    mine = (nn.Linear, "torch.nn.modules.linear.Linear")
    with torch.serialization.safe_globals([mine]):
        before = set(torch.serialization.get_safe_globals())
        roundtrip(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), tmp_path)
        assert set(torch.serialization.get_safe_globals()) == before
        assert mine in before


def test_what_the_caller_allows_torch_is_not_allowed_here(tmp_path: Path, marker: Path) -> None:
    import os

    with torch.serialization.safe_globals([(os.mkdir, "evil.mkdir")]):
        refused(archive(tmp_path / "evil.pt", call("evil.mkdir", text(str(marker)))), marker)


# of classifiers those with layers of their own, an attention, an optical flow and a detector; the others are large, or made of the same
TORCHVISION = ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "swin_t", "raft_small"]
TORCHVISION += ["fasterrcnn_mobilenet_v3_large_320_fpn"]
MORE = ["densenet121", "googlenet", "regnet_y_400mf", "vit_b_16", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "r3d_18"]


@pytest.mark.parametrize("model", [*TORCHVISION, *(pytest.param(model, marks=pytest.mark.slow) for model in MORE)])
def test_torchvision_models_are_read(tmp_path: Path, model: str) -> None:
    pytest.importorskip("torchvision")
    built = load(f"torchvision:{model}").model
    assert isinstance(built, nn.Module)
    roundtrip(built, tmp_path)


@pytest.mark.parametrize(
    "model", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0", "levit_128s"]
)
def test_timm_models_are_read(tmp_path: Path, model: str) -> None:
    pytest.importorskip("timm")
    built = load(f"timm:{model}").model
    assert isinstance(built, nn.Module)
    roundtrip(built, tmp_path)


def test_transformers_models_are_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    picture = {"image_size": 32, "patch_size": 8}
    for cls, config in (
        ("BertModel", transformers.BertConfig(**small)),
        ("GPT2LMHeadModel", transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=1)),
        ("ViTModel", transformers.ViTConfig(**(small | picture))),
        ("ResNetModel", transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    ):
        roundtrip(getattr(transformers, cls)(config), tmp_path)


@pytest.mark.slow
def test_every_torchvision_model_is_read(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    for model in torchvision.models.list_models():
        if "quantized" not in model and model not in ("regnet_y_128gf", "vit_h_14"):
            roundtrip(load(f"torchvision:{model}").model, tmp_path)


@pytest.mark.slow
def test_a_small_timm_model_of_every_family_is_read(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    families: dict[str, list[str]] = {}
    for model in timm.list_models():
        families.setdefault(timm.models._registry._model_to_module[model], []).append(model)
    bound_methods = {"fasternet"}  # keeps a bound method, which a pickle can only say with getattr
    for family, names in families.items():
        for model in sorted(names, key=lambda each: (any(w in each for w in ("large", "huge", "giant", "base", "_l", "_xl")), len(each)))[
            :1
        ]:
            with torch.device("meta"):
                small = sum(p.numel() for p in timm.create_model(model).parameters()) < 40e6
            if small and family not in bound_methods:
                roundtrip(load(f"timm:{model}").model, tmp_path)
