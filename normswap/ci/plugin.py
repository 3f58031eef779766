"""The pytest plugin: a fixture that compares two models, and `pytest --normswap DIR`, which checks every converted directory below DIR.

pytest loads it in every run in an environment that has normswap, so torch is imported only when a comparison is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from normswap.api.check import Check
    from normswap.parity.result import Parity

RECIPE = "recipe.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normswap", "normswap: converted models stay the same function")
    group.addoption(
        "--normswap",
        action="append",
        default=[],
        metavar="DIR",
        help="Check every converted directory at and below DIR against its source and its ONNX files. Repeatable.",
    )
    group.addoption(
        "--normswap-trust", action="store_true", help="Import what the recipes of these directories name, and let their files run code."
    )
    group.addoption(
        "--normswap-trust-package",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="Let the pickles in these directories use nn.Module classes of PACKAGE. Repeatable.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the recipe of each directory to what pytest collects."""
    for folder in _folders(config):
        recipes = sorted(folder.rglob(RECIPE))
        if not recipes:
            what = "no converted directory is there" if folder.is_dir() else "there is no such directory"
            raise pytest.UsageError(f"--normswap {folder}: {what}; `normswap convert SRC -o DIR` writes one, with a {RECIPE} in it")
        config.args += [path for path in map(str, recipes) if path not in config.args]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> ConvertedDirectory | None:
    if file_path.name == RECIPE and any(file_path.is_relative_to(folder) for folder in _folders(parent.config)):
        outside = None if file_path.is_relative_to(parent.config.rootpath) else file_path.as_posix()  # pytest would leave it without a name
        return ConvertedDirectory.from_parent(parent, path=file_path, nodeid=outside)
    return None


@pytest.hookimpl(tryfirst=True)  # before -k and the like leave some out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if isinstance(item, Comparison)]
    for item in ours:
        item.alone = all(each.check.not_run is not None for each in ours)


class ConvertedDirectory(pytest.File):
    """A converted directory, by its recipe.json: one test for its source, and one for each ONNX file."""

    def collect(self) -> Iterator[Comparison]:
        from normswap.api.check import checks_of

        trust, packages = map(self.config.getoption, ("normswap_trust", "normswap_trust_package"))
        for check in checks_of(self.path.parent, trust=trust, trust_packages=packages):
            yield Comparison.from_parent(self, name=check.name, check=check)


class Comparison(pytest.Item):
    """One comparison of a converted directory, as a test. Skipped, with the reason, where it cannot be made.

    alone: no comparison of this run of pytest can be made, and then a skip would be a check that checks nothing.
    """

    def __init__(self, *, check: Check, **known: Any) -> None:
        super().__init__(**known)
        self.check = check
        self.alone = False

    def runtest(self) -> None:
        if self.alone:
            pytest.fail(f"nothing can be compared: {self.check.not_run}", pytrace=False)
        if self.check.not_run is not None:
            pytest.skip(self.check.not_run)
        _compare(self, self.check.reference, self.check.candidate, self.check.run)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"{self.path.parent.name}: {self.name}"


@pytest.fixture
def normswap_verify(request: pytest.FixtureRequest) -> Callable[..., Parity]:
    """`normswap.verify`, which fails the test where the two are not the same function: with layer, probe, figure and cause.

    normswap_verify(reference, candidate, inputs=None, **options) takes what `normswap.verify` takes, and returns its Parity. The figures
    become properties of the test in a JUnit file.
    """

    def check(reference: Any, candidate: Any, inputs: Any = None, **options: Any) -> Parity:
        from normswap.api.verify import verify

        __tracebackhide__ = True
        return _compare(request.node, reference, candidate, lambda: verify(reference, candidate, inputs, **options))

    return check


def _compare(item: pytest.Item, reference: Any, candidate: Any, run: Callable[[], Parity]) -> Parity:
    from normswap.errors import NormswapError
    from normswap.report.parity import failure_text, properties

    __tracebackhide__ = True
    try:
        parity = run()
    except NormswapError as error:
        said = str(error).replace("--trust", "--normswap-trust") if isinstance(item, Comparison) else str(error)
        raise pytest.fail.Exception(said, pytrace=False) from None  # or pytest would print what led to it, too
    # not by the fixture record_property, which warns where JUnit files are of the family xunit2
    item.user_properties += [(f"normswap_{name}", value) for name, value in properties(parity).items()]
    if not parity.passed:
        pytest.fail(failure_text(reference, candidate, parity), pytrace=False)
    return parity


def _folders(config: pytest.Config) -> list[Path]:
    return [(config.invocation_params.dir / folder).resolve() for folder in config.getoption("normswap")]
