"""What the README files name is there: files, headings, modules and recipes."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = ("como_jax", "configs", "experiments", "tools")
READMES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(path for name in FOLDERS for path in (REPOSITORY / name).rglob("*.md")),
]
# Measurements keep the commands of their day.
WITH_COMMANDS = [path for path in READMES if path.name != "RESULTS.md"]


def anchors(text: str) -> set[str]:
    """Of the headings of a Markdown text."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), f"{path}: no {target}"
        assert not anchor or anchor in anchors(found.read_text()), f"{path}: no heading {target}"


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_and_recipes_exist(path: Path) -> None:
    text = path.read_text()
    for module in re.findall(r"(?:python3? -m|\[python, -m,) ((?:tools|experiments|como_jax)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{path}: no module {module}"
    for recipe in re.findall(r"\bconfigs/\w+\.py", text):
        assert (REPOSITORY / recipe).exists(), f"{path}: no {recipe}"
    for script in re.findall(r"\bbash (tools/\w+\.sh)", text):
        assert (REPOSITORY / script).exists(), f"{path}: no {script}"


def test_the_readme_stays_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 220
