"""The documentation runs: Python blocks are executed, command lines name commands and options that exist."""

from __future__ import annotations

import ast
import builtins
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from doc_blocks import blocks
from warm import Warm

import normswap
from normswap import errors
from normswap.cli.app import app

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
SITE = REPOSITORY / "mkdocs.yml"
COMMANDS = typer.main.get_command(app)


def command_lines(page: str) -> list[str]:
    """Every `normswap ...` in a block of code, without the remark that may follow after two spaces."""
    code = re.findall(r"^```sh\n(.*?)^```$|^ {4}([^\n]*)$", page, re.MULTILINE | re.DOTALL)
    return re.findall(r"(?:^|&& (?:\.venv/bin/)?)(normswap .*?)(?: {2,}.*)?$", "\n".join(a or b for a, b in code), re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, warm: Warm) -> None:
    """All blocks of a page, as one script, where only the fixtures are at hand.

    NORMSWAP_PYTHON names the interpreter of an environment in which a wheel is installed, to run them with that and not with the checkout.
    """
    place = tmp_path / "place"
    place.mkdir()
    (place / "fixtures").symlink_to(REPOSITORY / "fixtures")
    script = "\n".join(blocks(page, "python"))
    if not (installed := os.environ.get("NORMSWAP_PYTHON")):
        ran = warm.run(script, place)
        assert ran.returncode == 0, ran.output
        return
    if re.search("torchvision|lightning", script):  # on a CPU build of torch, torchvision does not import without it
        script = f"import sys\nsys.path.append({str(REPOSITORY / 'tests/support')!r})\nimport torchvision_shim\n{script}"
    environment = os.environ | {"PYTHONPATH": ""}
    whole = subprocess.run([installed, "-c", script], cwd=place, env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr


PATHS = [
    block
    for page, language in (("training", "python"), ("training", "py"), ("private", "python"))
    for block in blocks(REPOSITORY / f"docs/{page}.md", language)
    if "normswap.verify(" in block
]


def unbound(script: str) -> set[str]:
    """The names that a script reads and never binds, anywhere."""
    nodes = list(ast.walk(ast.parse(script)))
    bound = {alias.asname or alias.name.partition(".")[0] for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names}
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {
        n.arg for n in nodes if isinstance(n, ast.arg)
    }
    bound |= {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    return {n.id for n in nodes if isinstance(n, ast.Name)} - bound - set(dir(builtins))


@pytest.mark.parametrize("block", PATHS)
def test_a_path_from_model_to_file_is_short_and_whole(block: str) -> None:
    """`test_python_runs` runs it, after the others of its page, and test_distributed.py the one of several processes; here: it needs
    nothing of them."""
    assert unbound(block) == set()
    assert sum(bool(line.strip()) for line in block.splitlines()) < 30
    for step in ("normswap.convert(", "parity.passed", "normswap.param_groups(", "normswap.export_onnx(", "normswap.verify("):
        assert step in block


def test_the_paths_are_found() -> None:
    assert len(PATHS) == 5  # a loop, transformers, Lightning, several processes, Opacus
    assert unbound("import a.b as c, d.e\ndef f(x): return c, d, f, x, y, print") == {"y"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_name_what_exists(page: Path) -> None:
    for line in command_lines(page.read_text()):
        _, name, *words = shlex.split(line)
        if name == "COMMAND":
            continue
        command = COMMANDS.commands[name]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        used = {word.strip("[]") for word in words if word.strip("[").startswith("-")}
        assert used <= known, line


def test_command_lines_are_found() -> None:
    text = "    normswap inspect SRC     what is there\n```sh\nA && .venv/bin/normswap convert x -o out/\n```\nthe `normswap x`"
    assert command_lines(text) == ["normswap inspect SRC", "normswap convert x -o out/"]


def test_every_command_and_exit_code_is_documented() -> None:
    documented = (REPOSITORY / "docs/cli.md").read_text()
    for name in COMMANDS.commands:  # type: ignore[attr-defined]
        assert f"    normswap {name} " in documented
    for code in (0, 1, 2, 3, 130):
        assert f"| {code} |" in documented


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if target.suffix != ".md":
            assert not anchor, link
            continue
        headings = {
            re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        }
        assert not anchor or anchor in headings, link


def test_every_public_name_is_in_the_reference_by_its_task() -> None:
    source = (REPOSITORY / "normswap/__init__.py").read_text()
    table = source[source.index("_HOMES = {") : source.rindex("__all__ = ")]
    tasks = {task: re.findall(r'^    "(\w+)"', names, re.M) for task, names in re.findall(r"    # (\w+)\n((?: {4}\".*\n)+)", table)}
    assert sum(map(len, tasks.values())) == len(normswap.__all__) - 1  # all but __version__
    for task, names in tasks.items():
        page = (REPOSITORY / f"docs/api/{task}.md").read_text()
        assert re.findall(r"^::: normswap\.(\w+)$", page, re.M) == names


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in {"README.md", "index.md"}], ids=lambda page: page.name)
def test_a_page_says_first_whom_it_is_for(page: Path) -> None:
    title, first = page.read_text().split("\n\n")[:2]
    assert title.startswith("# ")
    assert first.startswith("For "), first


def test_every_page_is_on_the_site_and_nothing_else() -> None:
    made = {"benchmarks/measure.md", "contributing.md", "security.md", "how/ci_example.md"}
    named = re.findall(r"[\w/]+\.md", SITE.read_text().partition("\nnav:")[2])
    assert len(named) == len(set(named))
    of_benchmarks = {name for name in named if name.startswith("benchmarks/")} | made
    assert set(named) - of_benchmarks == {page.relative_to(REPOSITORY / "docs").as_posix() for page in PAGES[1:]}


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    """What `mkdocs build --strict` says; about ten seconds. It needs the extra `docs`."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]' to build the site")
    # not --quiet: what is not logged is not counted
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site/index.html").exists()
    for page in (tmp_path / "site/api").glob("*.html"):
        assert "normswap." in page.read_text()
    loaded = [
        url
        for page in (tmp_path / "site").rglob("*.html")
        for url in re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]*)', page.read_text())
    ]
    assert loaded == []  # no page asks another host for anything


def test_the_readme_commands_use_the_tested_versions() -> None:
    convert, test = blocks(REPOSITORY / "README.md", "sh")
    for command in (convert, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ")
        assert len(command.splitlines()) == 1
    assert test.endswith("&& .venv/bin/python -m pytest -n 2\n")  # .ci/run splits it there


class Message(NamedTuple):
    """What one place in the code says: its words, with `...` for what differs, and whether it says what to do or what was expected."""

    place: str
    words: str
    advises: bool


OURS = {name for name in vars(errors) if name.endswith("Error")} | {"ParityError", "DivergedError"}


def words_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(value) for value in node.values)
    if isinstance(node, ast.IfExp):
        return f"{words_of(node.body)}...{words_of(node.orelse)}"
    return "..."


def messages(source: str, place: str) -> list[Message]:
    """Every error of normswap's own that a file makes of words."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args):
        words = words_of(call.args[0])
        if isinstance(call.func, ast.Name) and call.func.id in OURS and words.strip(". "):
            advises = any(keyword.arg == "hint" for keyword in call.keywords) or "expected" in words
            found.append(Message(f"{place}:{call.lineno}", words, advises))
    return found


def pieces(words: str) -> list[str]:
    """What stands between the parts that differ, the longest first; the page has one line for a message of several."""
    return sorted((piece.strip(" ,:;()'") for piece in re.split(r"\.\.\.|\n", words)), key=len, reverse=True)


@functools.cache
def words_of_the_package() -> str:
    nodes = (node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(words_of(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))


PACKAGE = REPOSITORY / "normswap"
MESSAGES = [m for file in sorted(PACKAGE.rglob("*.py")) for m in messages(file.read_text(), file.relative_to(REPOSITORY).as_posix())]
ROWS = re.findall(r"^\| (.+?) \| .+ \|$", (REPOSITORY / "docs/messages.md").read_text().partition("## It warned")[0], re.MULTILINE)


def test_every_error_that_does_not_say_what_to_do_has_a_remedy_on_the_page() -> None:
    said = "\n".join(ROWS)
    assert len(MESSAGES) > 200
    assert [m for m in MESSAGES if not m.advises and pieces(m.words)[0][:40] not in said] == []


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith(("it says", "---", "exit code"))])
def test_a_message_on_the_page_is_one_of_the_code(row: str) -> None:
    code = words_of_the_package()
    for piece in (piece for part in row.split("; or ") for piece in pieces(part)[:1]):
        assert piece in code, piece


def test_messages_are_found() -> None:
    source = (
        'raise UsageError(f"a {b} has no c")\nraise LoadError("d", hint="e")\nraise UsageError(f"f is {f}; expected g")\nValueError("h")'
    )
    assert [(m.words, m.advises) for m in messages(source, "")] == [("a ... has no c", False), ("d", True), ("f is ...; expected g", True)]
