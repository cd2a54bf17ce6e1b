"""The house: rooms import downwards, import is free, public names exist and are documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import errata

SOURCE = Path(errata.__file__).parent

# design: docs/architecture.md. `atlas` stands beside the house: any room may look into it.
FLOORS = {
    "errors": 0,
    "edit": 1, "progress": 1, "paths": 1, "threads": 1,
    "datasets": 2, "model": 2, "routing": 2,
    "adapters": 3, "unlearning": 3,
    "editors": 4,
    "testing": 5, "evaluation": 5,
    "benchmarks": 6, "studies": 6,
    "cli": 7,
}  # fmt: skip
BESIDE = {"atlas", "__init__", "__main__"}
MODULES = sorted(path for path in SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms of errata that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "errata" else [f"errata.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("errata.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_from_below(path: Path) -> None:
    room = room_of(path)
    if room in BESIDE:
        return
    for other in imports_of(path) - BESIDE - {room}:
        assert FLOORS[other] < FLOORS[room], f"{room} imports {other}"


def test_every_room_is_on_the_plan() -> None:
    assert {room_of(path) for path in MODULES} <= FLOORS.keys() | BESIDE


def public_modules() -> list[str]:
    return [m.name for m in pkgutil.walk_packages(errata.__path__, "errata.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", public_modules())
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say what it knows"
    for public in getattr(module, "__all__", []):
        found = getattr(module, public)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert inspect.getdoc(found), f"{name}.{public} has no docstring"


def test_the_package_offers_its_main_things() -> None:
    for name in errata.__all__:
        assert getattr(errata, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        errata.nothing  # noqa: B018


def test_importing_is_free(tmp_path: Path) -> None:
    """No torch, no random state, no environment, no folder: only names."""
    code = (
        "import os, sys; before = dict(os.environ); import errata; assert dict(os.environ) == before;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    home = {**os.environ, "HOME": str(tmp_path), "ERRATA_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=home, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_file_is_opened_with_pickle() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in text or "no pickle" in text.lower(), path
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path
