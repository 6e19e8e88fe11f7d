"""What the documents tell a reader to type is there: commands parse, names exist, links lead somewhere."""

import ast
import functools
import importlib
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parscale import cli
from parscale.law import claim as law_claim
from parscale.law import report as law_report
from parscale.train import report

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WORK = [(report, "run"), (law_report, "report_fit"), (law_report, "print_predictions"), (law_claim, "report_claim")]
"""What the verbs call that cannot be replaced whole."""
_COMMAND = re.compile(r"^(?:    )?(?:[A-Z_]+=\S+ )*(parscale [^`|]*)$")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines that are a call of `parscale`; one that ends in a backslash has more lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [found[1] for line in text.splitlines() if (found := _COMMAND.match(line)) and "…" not in line]


def snippets(page: Path) -> list[str]:
    return [body for language, body in _FENCED.findall(page.read_text(encoding="utf-8")) if language == "python"]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def does_nothing(verb: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(verb)
    def parsed(*_args: Any, **_kwargs: Any) -> None:
        pass

    return parsed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(cli.__file__).parent)  # some name a recipe by its path
    for module, work in WORK:
        monkeypatch.setattr(module, work, lambda *_args: None)
    for name, verb in cli.VERBS.items():
        monkeypatch.setitem(cli.VERBS, name, does_nothing(verb))
    for command in commands(page):
        _, *argv = shlex.split(command, comments=True)
        try:
            code = cli.main(argv)
        except SystemExit as stopped:
            code = stopped.code
        assert code == 0, f"{command}\n{capsys.readouterr()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_snippets_import_is_there(page: Path) -> None:
    for snippet in snippets(page):
        for node in ast.walk(ast.parse(textwrap.dedent(snippet))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "parscale":
                module = importlib.import_module(node.module or "")
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], snippet


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_pages_have_commands_and_snippets() -> None:
    """Else the tests above would pass on nothing."""
    assert sum(len(commands(page)) for page in PAGES) > 30
    assert sum(len(snippets(page)) for page in PAGES) > 10
