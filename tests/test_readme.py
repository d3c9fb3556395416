"""The two READMEs say the same, and lead somewhere."""

import re

import pytest

from tests.launch.runs import ROOT

NAMES = ("README.md", "README.zh.md")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> set[str]:
    """Lines of code blocks, without comments."""
    lines = (line for line in text(name).splitlines() if line.startswith("    ") and line.strip())
    return {re.sub(r"\s+#.*", "", line.strip()) for line in lines}


def test_commands_of_the_chinese_readme_are_those_of_the_english_one() -> None:
    assert commands("README.zh.md")
    assert commands("README.zh.md") <= commands("README.md")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", text(name))
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    named = re.findall(r"\b((?:configs|launch|tests)/[\w./-]+\.(?:yaml|sh|sbatch|py))\b", text(name))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
