"""The rooms of the house, and which way its arrows run: every import goes further down, and none in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SAP_FAST = Path(__file__).parents[1] / "sap_fast"
# From the ground up. Rooms on one level do not know of each other, nor of those above them.
LEVELS = (
    ("errors", "config", "report", "atomic", "tensors", "_version"),
    ("dual",),
    ("_C",),
    ("ops",),
    ("batch",),
    ("model",),
    ("method",),
    ("graph",),
    ("step",),
    ("environment",),
    ("data",),
    ("evaluation",),
    ("profiling",),
    ("hf",),
    ("cli",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = {
    ".".join(("sap_fast", *path.relative_to(SAP_FAST).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in SAP_FAST.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """List the modules of the library that a module imports, wherever in it: at the top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name in MODULES} - {module}


def room_of(module: str) -> str:
    """Name a module's room; ``sap_fast`` itself for the package's own ``__init__`` and ``__main__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_every_room_has_its_level() -> None:
    rooms = {room_of(module) for module in MODULES} - {"sap_fast", "__main__"}
    assert rooms == LEVEL_OF.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_run_downwards(module: str) -> None:
    room, known = room_of(module), imports(module)
    if room == "__main__":  # the command, whichever way it is called
        assert known == {"sap_fast.cli.main"}
        return
    if room == "sap_fast":  # what users import; the rest is imported by those who ask for it
        assert all(LEVEL_OF[room_of(other)] < LEVEL_OF["hf"] for other in known)
        return
    for other in known:
        assert other != "sap_fast", f"{module} imports the package, which imports it"
        assert room_of(other) == room or LEVEL_OF[room_of(other)] < LEVEL_OF[room], f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
