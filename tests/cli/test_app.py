"""The command line: what goes to which stream, which exit code, and that nothing half written is left behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from fixtures import hostile
from normswap.cli.app import app
from normswap.demo import WEIGHTS
from normswap.errors import LoadError, UnsafePickleError, UsageError, shown
from normswap.parity.result import Difference, Parity, ParityError

DIGITS = str(Path(__file__).parents[2] / "fixtures" / "digits_cnn.pt")
WRITTEN = ["model.onnx", "model.pt", "model.safetensors", "recipe.json", "report.html", "report.json"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "out"
    result = run("convert", DIGITS, "-o", directory)
    assert result.exit_code == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def exported(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The ONNX file that `export` wrote of the directory, and what it printed."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    result = run("export", converted, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path, result.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes less to convert than DIGITS."""
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).eval(), path)
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- results go to stdout ----------------------------------------------------------------------------------------------------


def test_convert_writes_everything_and_prints_the_table(converted: Path) -> None:
    assert names(converted) == WRITTEN
    again = run("convert", DIGITS, "-o", converted)
    assert again.exit_code == 0
    assert again.stderr == ""
    assert names(converted) == WRITTEN
    lines = again.stdout.splitlines()
    assert [line.split()[0] for line in lines if "swapped, exact" in line] == ["1", "4", "8", "13"]
    assert "converted: 4 of 4 normalization layers swapped" in lines
    assert lines[-1] == f"  written to {converted}/"


def test_convert_json_is_the_report(converted: Path, tmp_path: Path) -> None:
    result = run("convert", DIGITS, "-o", tmp_path / "out", "--no-onnx", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    assert printed["status"] == "converted"
    assert printed["onnx"] is None
    assert printed["files"] == names(tmp_path / "out") == [name for name in WRITTEN if name != "model.onnx"]


def test_report_on_disk_covers_onnx(converted: Path) -> None:
    report = json.loads((converted / "report.json").read_text())
    assert [swap["name"] for swap in report["plan"]["swaps"]] == ["1", "4", "8", "13"]
    assert next(iter(report["parities"])) == "torch"
    assert all(parity["passed"] and parity["max_rel"] <= 1e-5 for parity in report["parities"].values())
    assert "onnxruntime (all)" in report["parities"]
    assert report["files"] == WRITTEN


def test_inspect_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("inspect", DIGITS)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "would swap 4 of 4 normalization layers" in result.stdout.splitlines()
    assert names(tmp_path) == []


def test_inspect_says_why_not() -> None:
    result = run("inspect", DIGITS, "--exclude", "1*", "--json")
    report = json.loads(result.stdout)
    assert report["status"] == "planned"
    assert [swap["name"] for swap in report["plan"]["swaps"]] == ["4", "8"]
    assert [skip["name"] for skip in report["plan"]["skips"]] == ["1", "13"]
    assert all(skip["reason"] for skip in report["plan"]["skips"])


def test_arch_with_safetensors(tmp_path: Path) -> None:
    result = run("convert", WEIGHTS, "--arch", "normswap.demo:build", "-o", tmp_path / "out", "--no-onnx", "--std", "abs")
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path / "out") == ["model.safetensors", "recipe.json", "report.html", "report.json"]


def test_the_default_output_is_named_after_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", DIGITS, "--no-onnx")
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path) == ["digits_cnn.normswap"]


@pytest.mark.parametrize("candidate", ["", "model.pt", "model.onnx"])
def test_verify_the_same_function(converted: Path, candidate: str) -> None:
    result = run("verify", DIGITS, converted / candidate, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["passed"] is True


def test_verify_a_directory(converted: Path) -> None:
    result = run("verify", converted, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["version"], told["passed"]) == (1, True)
    assert [(c["reference"], c["candidate"], c["status"]) for c in told["comparisons"]] == [
        (DIGITS, str(converted), "same"),
        (str(converted), str(converted / "model.onnx"), "same"),
    ]


def test_verify_alone_is_for_directories(tmp_path: Path) -> None:
    for alone, told in ((DIGITS, "is a file, and is compared with nothing"), (str(tmp_path), "no converted directory is at or below")):
        result = run("verify", alone)
        assert (result.exit_code, result.stdout) == (2, "")
        assert told in result.stderr


def test_verify_another_function(converted: Path, tmp_path: Path) -> None:
    model = torch.load(DIGITS, weights_only=False)
    model[4].bias.data[3] += 0.01
    torch.save(model, tmp_path / "other.pt")
    result = run("verify", tmp_path / "other.pt", converted)
    assert result.exit_code == 3
    assert result.stderr == ""
    assert "FAILED; worst of" in result.stdout
    assert "first to differ: 4" in result.stdout
    loose = run("verify", tmp_path / "other.pt", converted, "--tolerance", "0.5")
    assert loose.exit_code == 0
    onnx = run("verify", tmp_path / "other.pt", converted / "model.onnx")
    assert onnx.exit_code == 3


def test_export_a_directory_and_a_model(converted: Path, tmp_path: Path) -> None:
    for number, source in enumerate((converted, DIGITS)):
        path = tmp_path / f"{number}.onnx"
        result = run("export", source, "-o", path, "--opset", "18", "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        facts = json.loads(result.stdout)
        assert (facts["path"], facts["opset"], facts["residue"], facts["parity"]["passed"]) == (str(path), 18, [], True)
        assert facts["target"] == "portable"
        assert (facts["cuda"]["status"], facts["cuda"]["without_kernel"], facts["notes"]) == ("not run", [], [])
    assert names(tmp_path) == ["0.onnx", "1.onnx"]


def test_export_says_what_it_knows_of_cuda(converted: Path, exported: tuple[Path, str]) -> None:
    """And as JSON: test_export_a_directory_and_a_model."""
    assert "  cuda: not run: onnxruntime has no CUDAExecutionProvider here; " in exported[1]
    report = json.loads((converted / "report.json").read_text())["onnx"]
    assert (report["target"], report["free_axes"], report["cuda"]["status"]) == ("portable", ["batch"], "not run")


def test_export_for_onnxruntime(converted: Path, tmp_path: Path) -> None:
    result = run("export", converted, "-o", tmp_path / "m.onnx", "--target", "cuda", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["target"] == "cuda"
    assert [function.name for function in onnx.load(tmp_path / "m.onnx").functions] == ["FusedConv"]


def test_export_in_float16_with_free_axes(converted: Path, tmp_path: Path) -> None:
    result = run("export", converted, "-o", tmp_path / "m.onnx", "--fp16", "--dynamic", "none", "--external-data")
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path) in (["m.onnx"], ["m.onnx", "m.onnx.data"])  # the second, if a weight is large enough to go there
    (given,) = onnx.load(tmp_path / "m.onnx").graph.input
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert [dim.dim_param for dim in given.type.tensor_type.shape.dim] == ["", "", "", ""]


def test_convert_takes_the_same_options(tmp_path: Path) -> None:
    result = run("convert", DIGITS, "-o", tmp_path / "out", "--fp16", "--target", "cuda", "--opset", "21", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)["onnx"]
    assert (facts["target"], facts["opset"]) == ("cuda", 21)
    assert facts["notes"] == ["nothing was fused: there is no two-dimensional Conv in float32 that a Relu alone reads"]


@pytest.mark.parametrize(("option", "value"), [("--target", "gpu"), ("--dynamic", "all")])
def test_a_value_that_there_is_not_is_a_usage_error(option: str, value: str, converted: Path, tmp_path: Path) -> None:
    result = run("export", converted, "-o", tmp_path / "m.onnx", option, value)
    assert (result.exit_code, names(tmp_path)) == (2, [])


def test_a_file_names_the_recipe_that_it_belongs_to(converted: Path, exported: tuple[Path, str], tmp_path: Path) -> None:
    recipe = json.loads((converted / "recipe.json").read_text())
    told = json.dumps({"rules": recipe["rules"], "sites": recipe["sites"]}, sort_keys=True, separators=(",", ":"))
    for path in (converted / "model.onnx", exported[0]):
        found = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert found["normswap_recipe"] == hashlib.sha256(told.encode()).hexdigest()
    run("convert", DIGITS, "-o", tmp_path / "other", "--std", "inv")
    other = {p.key: p.value for p in onnx.load(tmp_path / "other" / "model.onnx").metadata_props}
    assert other["normswap_recipe"] != found["normswap_recipe"]


def test_revert_is_bit_for_bit(converted: Path, tmp_path: Path) -> None:
    result = run("revert", converted, "-o", tmp_path / "back.pt")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"wrote {tmp_path / 'back.pt'}\n", "")
    before, after = (torch.load(path, weights_only=False).state_dict() for path in (DIGITS, tmp_path / "back.pt"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("num_batches_tracked"))


# -- errors go to stderr -----------------------------------------------------------------------------------------------------

WRONG = Parity((Difference("output", "example", 1.0, 0.5, 0.5, 0, 1e-7, 1e-6),))


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (UsageError("no input", hint="give --input"), 2, "error: no input\nhint: give --input\n"),
        (LoadError("model.pt is empty"), 1, "error: model.pt is empty\n"),
        (
            UnsafePickleError("it wants to run os.system", hint="--trust"),
            1,
            "error: it wants to run os.system\nhint: --trust\n",
        ),
        (ParityError("not the same function", parity=WRONG), 3, "error: not the same function\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.pt"), 1, "error: out/model.pt: No space left on device\n"),
        (OSError("the disk is on fire"), 1, "error: the disk is on fire\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "error: ZeroDivisionError: division\n"
            "hint: normswap did not expect this; run it again with --debug to see where it comes from\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_two_lines_and_a_code(
    error: BaseException, code: int, stderr: str, debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("normswap.api.convert.inspect", fail)
    result = run("inspect", DIGITS, *(["--debug"] if debug else []))
    assert (result.exit_code, result.stdout) == (code, "")
    assert ("Traceback" in result.stderr) == debug
    assert result.stderr == stderr if not debug else stderr.splitlines()[0] in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["convert"],
        ["convert", DIGITS, "--std", "square"],
        ["convert", DIGITS, "--opset", "x"],
        ["verify"],
        ["export", DIGITS],
    ],
)
def test_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(("command", "code"), [("convert", 2), ("inspect", 2), ("export", 2), ("revert", 1)])
def test_a_source_that_is_not_there(command: str, code: int, tmp_path: Path) -> None:
    output = [] if command == "inspect" else ["-o", tmp_path / "out"]
    result = run(command, tmp_path / "missing.pt", *output)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert "missing.pt" in result.stderr
    assert names(tmp_path) == []


def test_a_directory_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("five years")
    result = run("convert", DIGITS, "-o", tmp_path, "--no-onnx")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "holds files that normswap did not write" in result.stderr
    assert names(tmp_path) == ["thesis.txt"]


def test_failed_parity_leaves_the_report_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap that is off by 1 %: nothing of the model may be written."""
    from normswap.swap.apply import swap

    def bad_swap(*args: Any, **options: Any) -> Any:
        model = swap(*args, **options)
        with torch.no_grad():
            model[4].mean.mul_(1.01)
        return model

    monkeypatch.setattr("normswap.api.convert.swap", bad_swap)
    result = run("convert", DIGITS, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error: ")
    assert "hint: " in result.stderr
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["report.html", "report.json"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "parity failed"
    assert report["files"] == ["report.html", "report.json"]
    assert report["parities"]["torch"]["first_bad"] == "4"


def test_what_a_model_prints_is_not_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatty.py").write_text(
        "import torch\nprint('loaded')\nclass Net(torch.nn.BatchNorm2d):\n    pass\ndef build():\n    print('built')\n    return Net(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("inspect", "chatty:build", "--input", "2x3x4x5", "--json")
    assert json.loads(result.stdout)["source"] == "chatty:build"
    assert result.stderr.splitlines()[:2] == ["loaded", "built"]


# -- whole or not at all -----------------------------------------------------------------------------------------------------


class Saboteur:
    """Raises at the n-th time that Python opens for writing, creates, or renames something below a directory."""

    def __init__(self) -> None:
        self.below, self.countdown, self.error = "", 0, Exception()
        sys.addaudithook(self)  # for good: an audit hook cannot be taken away, so it idles when `below` is empty

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.below or not self._writes(event, args) or self.below not in str(args[0]):
            return
        self.countdown -= 1
        if self.countdown == 0:
            raise self.error

    @staticmethod
    def _writes(event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        return event in {"os.rename", "os.mkdir", "tempfile.mkdtemp"}


SABOTEUR = Saboteur()


@pytest.fixture
def sabotage() -> Iterator[Callable[[Path, int, BaseException], None]]:
    def start(below: Path, countdown: int, error: BaseException) -> None:
        SABOTEUR.below, SABOTEUR.countdown, SABOTEUR.error = str(below), countdown, error  # type: ignore[assignment]

    yield start
    SABOTEUR.below = ""


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 1)], ids=["ctrl-c", "full"]
)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_stopped_anywhere_leaves_nothing_partial(
    error: BaseException,
    code: int,
    existing: bool,
    tmp_path: Path,
    small: Path,
    converted: Path,
    sabotage: Callable[[Path, int, BaseException], None],
) -> None:
    """Stops the command at its first step that touches the disk, its second, ... until it gets through."""
    out, whole = tmp_path / "out", [name for name in WRITTEN if name != "model.onnx"]
    if existing:
        shutil.copytree(converted, out)
    for step in range(1, 30):
        sabotage(tmp_path, step, error)
        result = run("convert", small, "-o", out, "--no-onnx")
        reached, SABOTEUR.below = SABOTEUR.countdown <= 0, ""
        if not reached:
            break
        # a step that does not matter may fail unnoticed; then, or after the last rename, `out` is complete. Otherwise it is what it was.
        assert result.exit_code in (0, code)
        assert "Traceback" not in result.stderr
        assert names(tmp_path) in ([], ["out"])
        assert names(out) in (WRITTEN, whole) if out.exists() else not existing
        if result.exit_code == 0 or (out.exists() and not existing):
            shutil.rmtree(out)
            if existing:
                shutil.copytree(converted, out)
    assert step > 4
    assert result.exit_code == 0
    assert names(out) == whole


@pytest.mark.parametrize("blocks", [8, 102])
def test_a_file_that_does_not_fit(blocks: int, tmp_path: Path) -> None:
    """A limit on the size of files stops the writers that are not Python as well: 8 KiB stops the first, 102 KiB the model.pt."""
    command = f"ulimit -f {blocks} && exec {sys.executable} -B -m normswap convert {DIGITS} -o {tmp_path}/out"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == []


def default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests may run in the background of a shell, which ignores it there


def test_ctrl_c_while_it_works(tmp_path: Path) -> None:
    """A real signal, as soon as something appears on the disk."""
    with subprocess.Popen(
        [sys.executable, "-m", "normswap", "convert", DIGITS, "-o", f"{tmp_path}/out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_sigint,
    ) as process:
        deadline = time.monotonic() + 60
        while not names(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert names(tmp_path) == []


def swallows(_module: Any, _args: Any) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def turns_into_another(_module: Any, _args: Any) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("KeyboardInterrupt: <EMPTY MESSAGE>") from None


@pytest.mark.parametrize("hook", [swallows, turns_into_another])
@pytest.mark.parametrize(
    "command",
    [("convert", DIGITS, "-o", "OUT"), ("inspect", DIGITS), ("export", DIGITS, "-o", "OUT.onnx")],
    ids=["convert", "inspect", "export"],
)
def test_ctrl_c_that_somebody_swallows(hook: Any, command: tuple[str, ...], tmp_path: Path) -> None:
    """A KeyboardInterrupt is raised wherever the program is: in a destructor, under a bare `except:`, in a callback of C++."""
    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        result = run(*(word.replace("OUT", f"{tmp_path}/out") for word in command))
    finally:
        handle.remove()
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run("inspect", DIGITS).exit_code == 0  # of which nothing is left for the next one


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As of a program that a shell runs in its background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(swallows)
    try:
        assert run("inspect", DIGITS).exit_code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        handle.remove()
        signal.signal(signal.SIGINT, before)


# -- the program -------------------------------------------------------------------------------------------------------------


def test_version() -> None:
    from importlib import metadata

    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"normswap {metadata.version('normswap')}\n")


def seconds(*command: str) -> float:
    """The best of three."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return time.perf_counter() - start

    return min(once() for _ in range(3))


@pytest.mark.slow  # it measures time; test_help.py says of every run that torch is not imported
def test_help_takes_less_than_half_of_what_torch_takes_to_import() -> None:
    assert seconds("-m", "normswap", "--help") <= 0.5 * seconds("-c", "import torch")


def test_colour_is_asked_for() -> None:
    """And it is not there where nobody asks: test_terminal.py, test_elsewhere_nothing_is_shown."""
    command = [sys.executable, "-m", "normswap", "inspect", DIGITS]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    forced = subprocess.run(command, capture_output=True, text=True, env={**environment, "FORCE_COLOR": "1", "TERM": "xterm"}, check=True)
    assert "\x1b[" in forced.stdout


# -- text of others ------------------------------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    text = "a\x1b[2J\r\x9b31m\u202eb\ud800\u2028\tc\nd"
    assert shown(text) == "a\\x1b[2J\\r\\x9b31m\\u202eb\\ud800\\u2028\\tc\nd"
    assert shown(text, line=True).endswith("c\\nd")
    for plain in ("layer1.conv-2 (also x), called 3 times", "Größe 层 é", "1e-5 ≤ x … “y”", "[red]a[/red]"):
        assert shown(plain) == plain


def test_names_of_an_onnx_file_reach_the_terminal_escaped(tmp_path: Path) -> None:
    case = next(case for case in hostile.cases(transformers=False) if (case.kind, case.name) == ("onnx: names", "escapes"))
    case.write(tmp_path)
    for command in (["fold", tmp_path / "a.onnx", "-o", tmp_path / "b.onnx"], ["verify", tmp_path / "a.onnx", tmp_path / "a.onnx"]):
        result = run(*command)
        assert "\x1b" not in result.stdout + result.stderr
        assert "\r" not in result.stdout + result.stderr


def test_keys_of_a_state_dict_reach_the_terminal_escaped(tmp_path: Path) -> None:
    torch.save({"a\n error: all is well\x1b[2J": torch.ones(2)}, tmp_path / "a.pt")
    result = run("inspect", tmp_path / "a.pt", "--arch", "torch.nn:Flatten")
    assert result.exit_code == 1
    assert "unexpected: a\\n error: all is well\\x1b[2J" in result.stderr


def test_the_name_of_a_file_reaches_the_terminal_escaped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\x1b[2J\xff.pt")
    result = run("inspect", path)
    assert result.exit_code == 2
    assert "a\\x1b[2J\\udcff.pt" in result.stderr
    torch.save(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), path)
    converted = run("convert", path, "-o", tmp_path / "out", "--no-onnx", "--input", "2x3x5x4")
    assert converted.exit_code == 0, converted.stderr
    assert "a\\x1b[2J\\udcff.pt" not in (tmp_path / "out" / "recipe.json").read_text()  # JSON has escapes of its own
    assert "udcff.pt" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("word", ["--trust", "--trust-pickle"])
def test_the_word_of_the_user_and_its_old_name(word: str, tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5)).eval(), (torch.randn(2, 3, 5, 4),))
    torch.export.save(program, tmp_path / "a.pt2")
    result = run("inspect", tmp_path / "a.pt2", word)
    assert result.exit_code == 0, result.stderr
    refused = run("inspect", tmp_path / "a.pt2")
    assert refused.exit_code == 1
    assert refused.stderr.startswith(
        "error: a.pt2 is a torch.export program (.pt2), and torch runs text from such a file to read it\nhint: --trust"
    )
