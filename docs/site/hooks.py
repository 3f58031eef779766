"""Makes the pages of the site that are not files of docs/: mkdocs calls it, see mkdocs.yml.

benchmarks/NAME.md   each section of benchmarks.md, on a page of its own; benchmarks.md becomes their list
contributing.md, security.md, benchmarks/measure.md, how/ci_example.md   those of the repository
raw/...              the files of the repository that a page links to, such as the raw results, so that the site needs no other host
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OF_REPOSITORY = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/measure.md",
    "examples/ci/README.md": "how/ci_example.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)?(#[^)\s]+)?(\))")
SECTION = re.compile(r"^## (.*)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    intro, parts = sections(text)
    pages = {f"benchmarks/{name}.md": f"# {title}\n\n{who(name)}\n\n{body}" for name, title, _, body in parts}
    entries = "\n".join(f"- [{title}](benchmarks/{name}.md)" for name, title, _, _ in parts)
    pages["benchmarks.md"] = f"{intro}\n\n{entries}\n"
    for name, page in OF_REPOSITORY.items():
        pages[page] = (
            (ROOT / name)
            .read_text(encoding="utf-8")
            .replace("](docs/", "](")
            .replace("](benchmarks/", "](../benchmarks/")
            .replace("](../docs/", "](")
        )
    anchors = {anchor: f"benchmarks/{name}.md" for name, _, anchor, _ in parts}
    linked: set[str] = set()
    for file in [*files.documentation_pages()]:
        pages.setdefault(file.src_uri, file.content_string)
    for uri, page in pages.items():
        at = "" if uri.startswith("benchmarks/") else posixpath.dirname(uri)  # a section was written for docs/
        page = re.sub(r"\](?=\['\w+'\])", r"\\]", page)  # output[0]['boxes'] is no link
        rewritten = LINK.sub(lambda match, at=at, uri=uri: _relinked(match, at, uri, anchors, linked), page)  # type: ignore[misc]
        if existing := files.get_file_from_path(uri):
            files.remove(existing)
        files.append(File.generated(config, uri, content=rewritten))
    for path in sorted(linked):
        files.append(File.generated(config, f"raw/{path}", abs_src_path=str(ROOT / path)))
    return files


def sections(text: str) -> tuple[str, list[tuple[str, str, str, str]]]:
    """What stands before the first section, and (name, title, anchor, body) of each that is measured by `python -m benchmarks.NAME`."""
    starts = [*SECTION.finditer(text)]
    found = []
    for match, after in zip(starts, [*starts[1:], None], strict=True):
        heading, body = match[1], text[match.end() : after.start() if after else len(text)].strip()
        command = re.search(r"`python -m benchmarks\.(\w+)", heading + "\n" + body)
        if command is None:
            continue  # a pointer to another page
        title = re.sub(r"\s*\(`python.*\)$", "", heading)
        measured = heading.removeprefix(title).strip().removeprefix("(").removesuffix(")")
        body = f"Measured by {measured}.\n\n{body}" if measured else body
        found.append((command[1], title, _anchor(heading), f"{_plots_first(body)}\n"))
    return text[: starts[0].start()].strip(), found


def _plots_first(body: str) -> str:
    """The section with its plots before its first table."""
    paragraphs = body.split("\n\n")
    plots = [paragraph for paragraph in paragraphs if paragraph.startswith("![")]
    rest = [paragraph for paragraph in paragraphs if paragraph not in plots]
    table = next((i for i, paragraph in enumerate(rest) if paragraph.startswith("|")), len(rest))
    return "\n\n".join([*rest[:table], *plots, *rest[table:]])


def who(name: str) -> str:
    return f"For whoever wants to check a figure, or measure it again: `python -m benchmarks.{name}` in a checkout of the repository."


def _anchor(heading: str) -> str:
    """As GitHub makes it, which the pages are written for."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1(../benchmarks/results/\1)", heading)
    return re.sub(r"[^\w -]", "", words).strip().lower().replace(" ", "-")


def _relinked(match: re.Match[str], at: str, uri: str, anchors: dict[str, str], linked: set[str]) -> str:
    """A link of a page that lies in the folder `at` of docs/, as a link of the page `uri`."""
    target, anchor = match[2] or "", match[3] or ""
    if not target and uri.startswith("benchmarks/") and anchor[1:] in anchors:
        target = "benchmarks.md"  # another section of it, which is a page of its own here
    if not target or re.match(r"[a-z]+:", target):
        return match[0]
    path = posixpath.normpath(posixpath.join("docs", at, target))
    if path == "docs/benchmarks.md" and anchor[1:] in anchors:
        path, anchor = f"docs/{anchors[anchor[1:]]}", ""
    elif not path.startswith("docs/"):
        page = OF_REPOSITORY.get(path)
        if page is None and (ROOT / path).is_file():
            linked.add(path)
        path = f"docs/{page or f'raw/{path}'}"
    return f"{match[1]}{posixpath.relpath(path, posixpath.join('docs', posixpath.dirname(uri)))}{anchor}{match[4]}"
