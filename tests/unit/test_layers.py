"""The order of the wings. Risks: a module that imports upwards, a circle, a new wing that nobody has put in its place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import turbo_gguf

PACKAGE = Path(turbo_gguf.__file__).parent
FLOORS = (
    ("errors",),
    ("assets", "files", "failures", "tools"),
    ("fetch",),
    ("codec",),
    ("inputs", "cache"),
    ("patchset",),
    ("make",),
    ("measure",),
    ("cluster",),
    ("plan",),
    ("fuse",),
    ("tune",),
    ("judge",),
    ("cli", "ppl-gate", "__main__"),
)
"""From the ground up. A wing imports from its own and from lower floors; of two wings on one floor, the right one may use the left one."""

ORDER = {wing: number for number, wing in enumerate(wing for floor in FLOORS for wing in floor)}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "data" not in path.parts:
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


NAMES = dict(modules())


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, those in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "turbo_gguf":
            base = node.module.removeprefix("turbo_gguf").lstrip(".")
            for name in (f"{base}.{alias.name}".lstrip(".") for alias in node.names):
                found.add(name if name in NAMES else base)
    return found - {""}


def test_every_module_is_on_a_floor():
    assert {name.split(".")[0] for name in NAMES} - {"__init__"} <= set(ORDER)


def test_no_module_imports_from_a_higher_floor():
    wrong = [
        f"{name} imports {other}"
        for name, path in NAMES.items()
        if name != "__init__"
        for other in sorted(imported(path))
        if ORDER[other.split(".")[0]] > ORDER[name.split(".")[0]]
    ]
    assert not wrong


def test_no_circle():
    graph = {name: imported(path) - {name} for name, path in NAMES.items()}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert not graph, "modules in circles, or above one"


def test_no_two_test_files_share_a_name():
    """They would be modules of one name: pytest then collects neither."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))
