"""Checks that the files stand as they should (`make lint` runs it): imports point one way, and names are not shared.

python tests/house.py prints a line for each thing that is wrong, and exits with status 1 if there is one.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"arguments", "data", "model_utils", "trainer", "utils"}  # files in the root that are no scripts
GROUND = {"models", "utils"}  # import nothing of the project but their own
DRAWN = ("run.saving", "plot_metrics")  # the one script that is also called: a run draws its losses at its end
ROOT_FILES = 14
LINES = 400


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the project but tests and benchmarks, by its dotted name; a package by its folder's."""
    listed = subprocess.check_output(["git", "ls-files", "*.py"], cwd=root, text=True).split()
    files = [
        Path(name) for name in listed if not name.startswith(("tests/", "benchmarks/")) and (root / name).exists()
    ]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): root / file for file in files}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a module imports anywhere in it, within functions too."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {other for other in found if other in known and other != name}


def circles(edges: dict[str, set[str]]) -> Iterator[str]:
    """Each circle of imports, as the way round it."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> Iterator[str]:
        if name in way:
            yield " -> ".join([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(edges[name]):
                yield from visit(other, [*way, name])
            done.add(name)

    for name in sorted(edges):
        yield from visit(name, [])


def wrong_arrows(edges: dict[str, set[str]]) -> Iterator[str]:
    """Imports against the order: scripts -> run -> everything else -> models and utils; flags for the first two."""
    for name, others in sorted(edges.items()):
        room = name.split(".")[0]
        script = "." not in name and room not in ROOMS and (ROOT / f"{room}.py").exists()
        for other in sorted(others):
            target = other.split(".")[0]
            if room in GROUND and target != room:
                yield f"{name} imports {other}: {room} imports nothing of the project"
            if target in ("run", "arguments") and room not in ("run", target) and not script:
                yield f"{name} imports {other}: scripts and run/ alone do"
            if target == "flags" and room not in ("run", "arguments", target) and not script:
                yield f"{name} imports {other}: arguments, scripts and run/ alone do"
            if room == "flags" and target not in (room, "utils"):
                yield f"{name} imports {other}: flags imports utils alone"
            if (
                "." not in other
                and target not in ROOMS
                and (name, other) != DRAWN
                and (ROOT / f"{target}.py").exists()
            ):
                yield f"{name} imports {other}, a script"


def shared_names(known: dict[str, Path]) -> Iterator[str]:
    """Public functions and classes of one name in two modules; scripts have their own."""
    places = defaultdict(list)
    for name, file in known.items():
        if "." not in name and name not in ROOMS:
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                places[node.name].append(name)
    for name, found in sorted(places.items()):
        if len(found) > 1:
            yield f"{name} is defined in {' and '.join(found)}"


def complaints() -> Iterator[str]:
    """Everything that is wrong, a line each."""
    known = modules()
    edges = {name: imports(name, file, known) for name, file in known.items()}
    yield from (f"a circle of imports: {circle}" for circle in circles(edges))
    yield from wrong_arrows(edges)
    yield from shared_names(known)
    in_root = [name for name, file in known.items() if file.parent == ROOT]
    if len(in_root) > ROOT_FILES:
        yield f"{len(in_root)} Python files in the root, at most {ROOT_FILES}"
    for file in known.values():
        lines = len(file.read_text().splitlines())
        if lines > LINES:
            yield f"{file.relative_to(ROOT)} has {lines} lines, at most {LINES}"


if __name__ == "__main__":
    found = list(complaints())
    print("\n".join(found) or "every file stands where it should")
    sys.exit(bool(found))
