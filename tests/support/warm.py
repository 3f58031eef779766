"""Scripts, each in a process of its own as with `python SCRIPT`, but forked from one that has imported torch and has exported a model.

That takes eight seconds of a processor, and most pages of the documentation do little else. What is forked finds it done, and leaves
nothing behind for the next one: rules that it registered, where it is, what it set in torch.

python warm.py      reads jobs to do at a time from each line of its input, and writes their exit codes
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[2]


TIMEOUT = 240  # seconds, for the scripts that run at a time


class Ran(NamedTuple):
    returncode: int
    output: str  # of both kinds


class Warm:
    """The process that scripts are forked from. It is started by the first of them, and ends with the `with` block."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.communicate()  # which closes its input

    def run(self, source: str, cwd: Path, path: Path | None = None) -> Ran:
        """`python -c SOURCE` in `cwd`, or `python FILE`, if `path` is the folder that modules next to the file are in."""
        return self._run([{"source": source, "cwd": str(cwd), "path": str(path or ""), "log": f"{cwd}.log"}])[0]

    def together(self, file: Path, cwd: Path, arguments: list[list[str]], environments: list[dict[str, str]] | None = None) -> None:
        """`python FILE ARGUMENTS`, once for each list of arguments, all at the same time. None is left behind, whatever happens."""
        common = {"source": file.read_text(), "cwd": str(cwd), "path": str(file.parent), "file": str(file)}
        environments = environments or [{} for _ in arguments]
        rows = enumerate(zip(arguments, environments, strict=True))
        ran = self._run([common | {"arguments": a, "environment": e, "log": f"{cwd}.{i}.log"} for i, (a, e) in rows])
        assert [one.returncode for one in ran] == [0 for _ in ran], "\n".join(one.output for one in ran)

    def _run(self, jobs: list[dict[str, Any]]) -> list[Ran]:
        if self._server is None:
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)  # type: ignore[call-overload]
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(jobs), file=self._server.stdin, flush=True)
        codes = json.loads(self._server.stdout.readline())
        return [Ran(code, Path(job["log"]).read_text()) for code, job in zip(codes, jobs, strict=True)]


# --- the other side ----------------------------------------------------------------------------------------------------------------------


def become(job: dict[str, Any]) -> None:
    """Do what the interpreter does with a script. What it raises ends this process, as it would end that one."""
    signal.alarm(TIMEOUT)
    os.chdir(job["cwd"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(opened, descriptor)
    os.environ.update(job.get("environment", {}))
    file = job.get("file", "-c")
    sys.path[0], sys.argv = job["path"], [file, *job.get("arguments", [])]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if "file" in job:
        main.__file__ = file
    exec(compile(job["source"], file, "exec"), main.__dict__)


def finished(children: list[int]) -> list[int]:
    """The exit codes. A process that fails takes the others with it: they may wait for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in children:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def warm_up() -> None:
    """Import everything that an export needs, and nothing that starts threads, which a fork would lose: onnxruntime does."""
    import torch
    import tqdm
    from torch import nn

    import normswap

    __import__("torchvision_shim")  # before anything imports torchvision
    __import__("one_registry")
    __import__("sklearn.datasets")  # which most of them take digits from
    tqdm.tqdm.monitor_interval = 0  # so that it starts none
    state = torch.get_rng_state()
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), torch.rand(1, 2, 5, 5)
    torch.onnx.export(normswap.convert(net, x).model.eval(), (x,), dynamo=True, verbose=False)
    torch.set_rng_state(state)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints is no answer
    warm_up()
    for line in sys.stdin:
        children: list[int] = []
        for job in json.loads(line):
            if not (child := os.fork()):
                answers.close()
                become(job)
                return
            children.append(child)
        print(json.dumps(finished(children)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
