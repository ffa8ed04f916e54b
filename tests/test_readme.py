"""What the pages say of the files, the flags and each other; README.zh-CN.md says what README.md says."""

import ast
import re
import tomllib

import pytest

from arguments import Arguments
from conftest import ROOT
from helpers.pages import PAGES, blocks

FILES = ("README.md", "README.zh-CN.md")
REPORTS = [f"benchmarks/reports/{path.name}" for path in sorted((ROOT / "benchmarks" / "reports").glob("*.md"))]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page, most", [("README.md", 1800), ("benchmarks/README.md", 1500)])
def test_a_page_is_no_longer_than_it_may_be(page, most):
    assert len(read(page).split()) <= most


@pytest.mark.parametrize("page", [*PAGES, *REPORTS, "README.zh-CN.md", "tests/README.md"])
def test_links_lead_somewhere(page):
    here = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        file = (here / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8").lower(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}, target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#]+)[^)]*\)", read("README.md")))
    assert set(PAGES) - linked == {"README.md"}


def test_every_report_is_linked_from_the_benchmarks():
    linked = {f"benchmarks/{name}" for name in re.findall(r"\]\((reports/[^)]+\.md)\)", read("benchmarks/README.md"))}
    assert linked == set(REPORTS)
    for name in REPORTS:
        assert re.fullmatch(r"[a-z0-9-]+-(h100|h200|cpu)-\d{4}-\d\d-\d\d\.md", name.rpartition("/")[2]), name


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page):
    """Those in text and tables, of any script here; tests/test_docs.py parses the commands."""
    scripts = [path.read_text() for path in (*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"))]
    known = set(re.findall(r"\"--(\w+)\"", "\n".join(scripts))) | vars(Arguments()).keys()
    of_others = {"nproc_per_node", "signals-to-handle", "shutdown-timeout", "signal", "nodes", "now", "help"}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", prose(read(page))))
    assert named - known - of_others == set()


@pytest.fixture(scope="module")
def tree():
    """{name: what the README's tree says of it}"""
    block = next(block.code for block in blocks("README.md") if block.code.startswith("train.py "))
    return dict(line.split(maxsplit=1) for line in block.splitlines())


def test_the_tree_shows_every_script_and_folder(tree):
    tracked = {path.name for path in ROOT.glob("*.py")}
    tracked |= {f"{path.parent.name}/" for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert set(tree) == tracked | {"docs/"}


def test_the_map_of_run_names_each_of_its_modules_once():
    named = re.findall(r"`(\w+)`", ast.get_docstring(ast.parse(read("run/__init__.py"))))
    assert sorted(named) == sorted(path.stem for path in (ROOT / "run").glob("*.py") if path.stem != "__init__")


def test_a_folder_says_of_itself_what_the_tree_says(tree):
    for name in sorted(name for name in tree if (ROOT / name / "__init__.py").exists()):
        sentence = re.split(r"\.(?:\s|$)", ast.get_docstring(ast.parse(read(f"{name}__init__.py"))))[0]
        assert tree[name] == sentence[0].lower() + sentence[1:]


@pytest.mark.parametrize("page", ["README.md", "docs/extending.md"])
def test_files_that_a_page_names_exist(page):
    """Modules and folders in backquotes; a test's name stands for itself, wherever it lies below tests/."""
    for name in set(re.findall(r"`([\w/.]+(?:\.py|/))`", read(page))):
        found = (ROOT / name).exists() or (name.startswith("test_") and any((ROOT / "tests").rglob(name)))
        assert found, name


def test_names_of_code_on_the_page_of_extending_are_where_it_says():
    """`name` in `file.py`, or of `folder/`: the file, or one below the folder, defines it."""
    pairs = re.findall(r"`(\w+)` (?:in|of) `([\w/]+(?:\.py|/))`", read("docs/extending.md"))
    assert len(pairs) >= 5
    for name, place in pairs:
        files = [ROOT / place] if place.endswith(".py") else list((ROOT / place).glob("*.py"))
        assert any(re.search(rf"^(def |class )?{name}\b", file.read_text(), re.M) for file in files), (name, place)


def test_the_tests_that_the_table_of_faults_names_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", read("tests/README.md"))
    assert len(named) > 50
    for file, test in named:
        assert re.search(rf"^def {test}\(", files.get(file, ""), re.M) if test else file in files, f"{file}::{test}"


def test_the_demo_ends_as_the_readme_says():
    """The lines of the expected ending begin as tests/demo.py prints them."""
    ending = next(block.code for block in blocks("README.md") if block.code.startswith("Both stages took"))
    printed = read("tests/demo.py").replace("\\n", "\n")
    for line in filter(None, ending.splitlines()):
        beginning = re.split(r"[\d./]|: ", line)[0]
        assert beginning in printed, line


def test_python_and_packages_are_those_of_the_requirements():
    version = tomllib.loads(read("pyproject.toml"))["tool"]["mypy"]["python_version"]
    assert f"Python {version} or later" in read("README.md")


@pytest.fixture(scope="module")
def texts():
    return [read(name) for name in FILES]


def code_blocks(text):
    """(language, code without comments; of the tree the names alone) of each block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    comment = {"bash": r" +#.*", "python": r" +#.*", "": r" {2,}.*"}
    return [(language, re.sub(comment[language], "", code)) for language, code in found]


def tables(text):
    """(columns, rows) of each table in turn."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", prose(text), re.M)
    return [(table.splitlines()[1].count("---"), len(table.splitlines())) for table in found]


def prose(text):
    """Lines outside code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


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
    assert len(english) > 8
    assert english == chinese


def test_the_same_names_and_figures(texts):
    """Everything in backquotes, and every figure of the tables, as often in both."""
    for pattern in (r"`([^`\n]+)`", r"\b\d[\d.,]*\d\b"):
        english, chinese = (sorted(set(re.findall(pattern, prose(text)))) for text in texts)
        assert set(english) - set(chinese) == set(), pattern


def test_the_same_links(texts):
    """The same pages and addresses; an anchor is that of the English page in both."""
    english, chinese = (sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in texts)
    assert [link for link in english if "README." not in link] == [link for link in chinese if "README." not in link]


def test_the_chinese_page_is_chinese(texts):
    lines = [line for line in prose(texts[1]).splitlines() if len(line) > 60]
    assert len(lines) > 15
    assert all(re.search(r"[\u4e00-\u9fff]", line) for line in lines)
