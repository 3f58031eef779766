"""Scripts, each in a process of its own as with `python SCRIPT`, but forked from one that has imported torch and has exported a model.

That takes eight seconds of a processor, and most pages of the documentation do little else. What is forked finds it done, and leaves nothing
behind for the next one: rules that it registered, where it is, what it set in torch.

python warm.py      reads a job from each line of its input, and writes the exit code of each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]


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
        if self._server is None:
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)  # type: ignore[call-overload]
        assert self._server.stdin
        assert self._server.stdout
        log = cwd.with_name(f"{cwd.name}.log")
        job = {"source": source, "cwd": str(cwd), "path": str(path or ""), "log": str(log)}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return Ran(int(self._server.stdout.readline()), log.read_text())


def become(job: dict[str, str]) -> None:
    """Do what the interpreter does with a script. What it raises ends this process, as it would end that one."""
    os.chdir(job["cwd"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(opened, descriptor)
    sys.path[0], sys.argv = job["path"], ["-c"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(job["source"], "<string>", "exec"), main.__dict__)


def warm_up() -> None:
    """Import everything that an export needs, and nothing that starts threads, which a fork would lose: onnxruntime does."""
    import torch
    import tqdm
    from torch import nn

    import normswap

    __import__("torchvision_shim")  # before anything imports torchvision
    __import__("torchlib")
    tqdm.tqdm.monitor_interval = 0  # so that it starts none
    state = torch.get_rng_state()
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), torch.rand(1, 2, 5, 5)
    torch.onnx.export(normswap.convert(net, x).model.eval(), (x,), dynamo=True, verbose=False)
    torch.set_rng_state(state)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints is no answer
    warm_up()
    for line in sys.stdin:
        if not (child := os.fork()):
            answers.close()
            become(json.loads(line))
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
