"""The documents: their links work, and what they quote of code, commands and figures exists."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from notifier.cli import check_role, migrate, providers
from notifier.errors import DEADLINE, OPEN, ApiError, AttemptOutcome, Fault
from notifier.models import ChannelOutcome
from notifier.store import db
from notifier.web import errors

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))]
PAGES += sorted(FOLDER.glob("*.md"))

# The service's commands. The group `providers` has commands of its own.
COMMANDS: dict[str, click.Command] = {
    "migrate": migrate.migrate,
    "rollback": migrate.rollback,
    "check-role": check_role.check_role,
    "providers": providers.providers,
}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(path: Path) -> str:
    """Return a page without its blocks of code: in these `#` and brackets mean something else."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as repository hosts make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(
            other == slug or re.fullmatch(rf"{slug}-\d+", other) is not None for other in found
        )
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield target and anchor of each relative link of a page."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            yield (path.parent / target).resolve() if target else path, anchor


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target, anchor in links(path):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target.name}#{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = {README}, [README]
    while ahead:
        found = {target for target, _ in links(ahead.pop()) if target.suffix == ".md"} - reached
        reached |= found
        ahead += found
    assert names(sorted(set(PAGES) - reached)) == []


def table_rows(page: str, *columns: str) -> list[tuple[str, ...]]:
    """Return the first cells of the rows in which they match these patterns."""
    cells = r" \| ".join(f"({column})" for column in columns)
    pattern = re.compile(rf"\| {cells} \|.*")
    lines = (FOLDER / page).read_text().splitlines()
    return [match.groups() for line in lines if (match := pattern.fullmatch(line))]


def error_codes() -> Iterator[tuple[str, str]]:
    for error in ApiError.__subclasses__():
        yield str(error.status), error.code
    for status, (code, _) in errors._HTTP_ERRORS.items():
        yield str(status), code


def test_the_api_page_lists_every_error_code_with_its_status() -> None:
    assert sorted(table_rows("api.md", r"\d+", r"E\d+")) == sorted(error_codes())


def test_the_providers_page_lists_every_outcome_and_every_fault() -> None:
    words = {word for (word,) in table_rows("providers.md", "`[a-z_]+`")}
    for known in [*AttemptOutcome, *ChannelOutcome, *Fault, OPEN, DEADLINE]:
        assert f"`{known}`" in words, known


def test_the_troubleshooting_page_lists_every_reason_of_a_database_error() -> None:
    reasons = {*db.REASONS_BY_STATE.values(), *db.REASONS_BY_TEXT.values(), "unknown"}
    page = (FOLDER / "troubleshooting.md").read_text()
    section = page.partition("## Database errors\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert sorted(set(listed) - {"reason"}) == sorted(reasons)


def logged() -> Iterator[tuple[str, str]]:
    """Yield level and message of each call of a module's `log` with a fixed message."""
    for path in (ROOT / "notifier").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "log"
            ):
                fixed = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                yield from ((node.func.attr, str(message)) for message in fixed)


def test_the_monitoring_page_lists_every_line_of_the_log() -> None:
    """Not those at DEBUG, nor those with a traceback: these are for developers."""
    listed = {message for (message,) in table_rows("monitoring.md", "`[^`]+`")}
    known = {message for level, message in logged() if level not in ("debug", "exception")}
    assert {f"`{message}`" for message in known - {"request"}} <= listed


def commands_named() -> Iterator[tuple[str, str]]:
    """Yield page and command line, without the program, of each command of the service."""
    for path in PAGES:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:flask --app notifier\.app|\./notify) ([^`\n]*)", text):
            yield path.name, line


@pytest.mark.parametrize(("page", "line"), sorted({*commands_named()}))
def test_a_command_that_a_page_names_exists_with_its_options(page: str, line: str) -> None:
    words = line.partition("#")[0].split()
    if words[0] in ("…", "COMMAND", "--help"):
        return
    command = COMMANDS[words[0]]
    if isinstance(command, click.Group) and len(words) > 1:
        command = command.commands[words[1]]
    options = {option for each in command.params for option in each.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= options, page


def test_every_target_of_make_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in {*PAGES} - {ROOT / "CHANGELOG.md"}:
        named = re.findall(r"(?:`|^    )make ([a-z]+)", path.read_text(), re.MULTILINE)
        assert set(named) <= targets, path.name


def test_the_performance_page_shows_the_figures_of_the_bench() -> None:
    bench = json.loads((FOLDER / "bench.json").read_text())
    goals = table_rows("performance.md", "[^|]+", "[≤≥] [^|]+", r"-?[\d.]+(?:[^|]*)")
    measured = [float(re.match(r"-?[\d.]+", cell)[0]) for _, _, cell in goals]  # type: ignore[index]
    assert measured == [round(goal["measured"], 2) for goal in bench["goals"]]
    rows = table_rows("performance.md", "[^|]+", r"(\d+) µs", r"([\d.]+)", r"(\d+)")
    shown = [(float(cpu), float(ratio), float(rate)) for _, _, cpu, _, ratio, _, rate in rows]
    assert shown == [
        (
            round(row["figures"]["cpu"]),
            round(row["to_bare"]["median"], 2),
            round(row["figures"]["rate"]),
        )
        for row in bench["main"].values()
    ]
