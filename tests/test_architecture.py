"""The house: imports point strictly down its floors, and what may not be known is not."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "ctx_jax"

FLOORS = [
    {"arrays", "compilation", "hosts", "leaves", "memory", "packing", "sharding", "errors"},
    {"kernels"},
    {"nn", "text", "checkpoint"},
    {"models", "data"},
    {"objectives", "flops", "interop"},
    {"train", "encoder", "hlo"},
    {"experiment", "atlas", "benchmark"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What floor 0 may use of itself: the error that everything may raise.
GROUND = "errors"


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, `ctx_jax.…` as far as a room, others by their first name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {
                f"{node.module}.{alias.name}" if node.module == "ctx_jax" else node.module for alias in node.names
            }
    return {".".join(name.split(".")[: 2 if name.startswith("ctx_jax.") else 1]) for name in names}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    assert here in FLOOR, f"{here} is on no floor"
    for name in imports(path):
        if not name.startswith("ctx_jax."):
            continue
        other = name.removeprefix("ctx_jax.")
        if other in (here, GROUND) or other == "ctx_jax":
            continue
        assert other in FLOOR, f"{path} imports {name}, which is on no floor"
        assert FLOOR[other] < FLOOR[here], f"{path} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[other]})"


@pytest.mark.parametrize(
    ("rooms", "forbidden"),
    [
        ({"text"}, {"jax", "flax", "optax"}),
        ({"models", "nn", "kernels"}, {"optax", "orbax", "grain", "ctx_jax.checkpoint"}),
        ({"models", "nn"}, {"ctx_jax.sharding"}),
        (set(FLOOR) - {"checkpoint"}, {"orbax"}),
        (set(FLOOR) - {"cli"}, {"tyro"}),
        (set(FLOOR) - {"train", "experiment"}, {"optax"}),
    ],
    ids=[
        "text knows no JAX",
        "models know no loss, optimizer or file",
        "models know no mesh",
        "one file knows orbax",
        "one knows tyro",
        "who trains knows optax",
    ],
)
def test_what_may_not_be_known(rooms, forbidden):
    for path in FILES:
        if room(path) in rooms:
            assert not imports(path) & forbidden, path


def test_files_stay_small():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 450, path


def test_importing_the_package_loads_nothing_heavy():
    import subprocess
    import sys

    heavy = ("jax", "orbax", "tensorflow_datasets")
    code = f"import sys, ctx_jax, ctx_jax.text.load; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
