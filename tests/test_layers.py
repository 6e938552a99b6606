"""The house stands on its order: a file imports from its own drawer and from those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT

# Bottom up. Inference and training share a floor and do not know each other; nothing imports a command.
FLOORS = [
    *(["isonext.errors"], ["model"], ["isonext.flow"], ["isonext.models"], ["isonext.config"], ["isonext.utils"]),
    *(["isonext.data"], ["isonext.checkpoint"], ["isonext.pipeline"], ["isonext.evaluation"]),
    *(["isonext.inference", "isonext.training"], ["isonext.app", "isonext.export"]),
]
COMMANDS = {"app", "preprocess_latents", "train", "inference", "evaluate", "sample", "test_model", "demo", "export"}
LIBRARY = sorted(path for path in ROOT.glob("isonext/**/*.py") if path.parent.name != "__pycache__")


def drawer(name: str) -> str:
    """`isonext.flow.loss` -> `isonext.flow`, `isonext.config` -> itself."""
    return ".".join(name.split(".")[:2]) if name.startswith("isonext") else name.split(".")[0]


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file names, wherever in it: `from isonext.data import images` is isonext.data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "isonext" else [node.module]
            )
        ours = COMMANDS | {"isonext", "model"}
        yield from (name for name in names if name.split(".")[0] in ours and name != "isonext.__version__")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_its_own_drawer_and_those_below(path):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    own = drawer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in map(drawer, imported(path)):
        assert name not in COMMANDS, f"imports the command {name}.py"
        assert name == own or own == "isonext.__init__" or floor[name] < floor[own], f"{own} imports {name}, above it"


def test_the_root_holds_the_network_and_the_commands_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | {"model"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_parsers_namespace_ends_in_the_commands(path):
    names = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert "argparse.Namespace" not in names or path == ROOT / "isonext/utils/cli.py"  # which hands it to `main`
