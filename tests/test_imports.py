"""The structure of the code, read from its imports: no circle, and no import from a higher room."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("utils", "models", "window", "synthetic", "benchmarks", "tests")  # each may import from those before it
MOST_LINES, MOST_ENTRIES = 400, 16

Graph = Mapping[str, set[str]]


def find_modules() -> dict[str, Path]:
    """{dotted name: file} of all modules of the project."""
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the project that a file imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from (name for name in (whole if whole in modules else node.module,) if name in modules)


@pytest.fixture(scope="module")
def graph() -> Graph:
    modules = find_modules()
    return {name: {*imported(ast.parse(file.read_text()), modules)} - {name} for name, file in modules.items()}


def rooms_of(graph: Graph) -> Graph:
    """The graph between rooms: the folders, and the files outside of folders."""
    room = lambda name: name.rpartition(".")[0] if name.count(".") > 1 else name  # noqa: E731
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        found.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return found


def find_circle(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def find_climbs(graph: Graph) -> list[str]:
    """Imports from a room above the importing one. Scripts are above window, and below synthetic."""
    height = lambda name: ROOMS.index(name.split(".")[0]) if "." in name else 2.5  # noqa: E731
    climbs = [(a, b) for a, others in graph.items() for b in others if height(b) > height(a) and a not in ROOMS]
    return [f"{a} -> {b}" for a, b in climbs]


def test_no_circle(graph: Graph):
    assert find_circle(graph) == []
    assert (
        find_circle({name: others for name, others in rooms_of(graph).items() if not name.startswith("tests")}) == []
    )


def test_no_import_runs_back_up(graph: Graph):
    assert find_climbs(graph) == ["train_ggi -> synthetic.clips"]  # towns as a data set: the one intended exception


def test_a_circle_and_a_climb_are_found(graph: Graph):
    assert find_circle({**graph, "utils.cli": {"utils.runs"}})
    assert "utils.cli -> models.latents" in find_climbs({**graph, "utils.cli": {"models.latents"}})
    assert "models.flags -> window.draft" in find_climbs({**graph, "models.flags": {"window.draft"}})
    assert "ggi -> benchmarks.recipes" in find_climbs({**graph, "ggi": {"benchmarks.recipes"}})


def test_utils_know_no_diffusers():
    for file in (ROOT / "utils").rglob("*.py"):
        assert "diffusers" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in getattr(node, "names", ()))]
            if isinstance(node, ast.Import | ast.ImportFrom)
        }, file


def test_files_are_short_and_folders_not_crowded():
    modules = find_modules()
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules.items()}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}
    entries: dict[Path, set[str]] = {}
    for file in modules.values():
        parts = file.relative_to(ROOT).parts
        for depth in range(1, len(parts)):
            entries.setdefault(Path(*parts[:depth]), set()).add(parts[depth])
    crowded = {folder: len(names - {"__init__.py"}) for folder, names in entries.items()}
    assert {folder: count for folder, count in crowded.items() if count > MOST_ENTRIES} == {}
