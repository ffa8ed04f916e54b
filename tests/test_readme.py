"""README.zh-CN.md says what README.md says: sections, commands, tables and flags; each links to the other."""

import re

import pytest

from arguments import parse_arguments
from conftest import ROOT

FILES = ("README.md", "README.zh-CN.md")


@pytest.fixture(scope="module")
def texts():
    return [(ROOT / name).read_text(encoding="utf-8") for name in FILES]


def code_blocks(text):
    """(language, code without comments; of the tree the names alone) of each block."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    comment = {"bash": r" +#.*", "python": r" +#.*", "": r" {2,}.*"}
    return [(language, re.sub(comment[language], "", code)) for language, code in blocks]


def tables(text):
    """(columns, rows) of each table in turn."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return [(table.splitlines()[1].count("---"), len(table.splitlines())) for table in found]


def prose(text):
    """Lines outside code blocks, without the flags."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"<!-- flags.*?<!-- /flags -->", "", text, flags=re.S)


def test_each_links_to_the_other(texts):
    english, chinese = texts
    assert "(README.zh-CN.md)" in english[:200] and "(README.md)" in chinese[:200]


def test_the_same_sections_lists_and_tables(texts):
    for pattern in (r"^#+ ", r"^- ", r"^\d+\. ", r"^\*\*"):
        english, chinese = (len(re.findall(pattern, prose(text), re.M)) for text in texts)
        assert english == chinese, pattern
    assert tables(texts[0]) == tables(texts[1])


def test_the_same_commands_and_code(texts):
    english, chinese = map(code_blocks, texts)
    assert len(english) > 10
    assert english == chinese


def test_the_same_names_files_and_links(texts):
    """Everything in backquotes, and every link to another page, as often in both."""
    names, links = [], []
    for text in texts:
        names.append(sorted(set(re.findall(r"`([^`\n]+)`", prose(text))) - {"--student_model <checkpoint>"}))
        links.append(sorted(set(re.findall(r"\]\((https?:[^)]+|benchmarks/[^)]+)\)", text))))
    assert set(names[0]) - set(names[1]) == set()
    assert links[0] == links[1]


def test_the_same_flags_with_the_same_defaults(texts):
    rows = [re.findall(r"^\| `--(\w+)` \|(.*?)\| (.+) \|$", text, re.M) for text in texts]
    flags = [[(name, default.replace("关", "off")) for name, default, _ in found] for found in rows]
    assert flags[0] == flags[1]
    assert {name for name, _ in flags[0]} == set(vars(parse_arguments([])))
    assert all(re.search(r"[\u4e00-\u9fff]", meaning) for _, _, meaning in rows[1])


def test_anchors_lead_to_headings(texts):
    for text in texts:
        headings = {re.sub(r"[ ]", "-", heading.lower()) for heading in re.findall(r"^#+ (.+)$", text, re.M)}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
