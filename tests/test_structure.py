"""The structure of the code: imports go down only, flax stays in models, and no file but a task's compares its name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # each may import those below it, and itself
    (
        "app",
        "ask",
        "ask_all",
        "completion",
        "evaluate",
        "judge",
        "motion_strip",
        "report",
        "show_config",
        "train.__main__",
    ),
    ("cli",),
    ("train",),
    ("eval",),
    ("vlm",),
    ("rl",),
    ("data",),
    ("datasets",),
    ("tasks",),
    ("models",),
    ("types", "common", "web"),
)
PUBLIC_NAMES = ("parsing", "rewards", "grpo", "data.annotations")  # thin names over what is below
FOLDERS = ("vau_jax", "data_prep", "launch", "configs")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def layer_of(module: str) -> int | None:
    """The number of a module's layer, 0 at the top."""
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return None


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT / "vau_jax").with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path) -> Iterator[str]:
    """Whole names of the modules of vau_jax, or of others, that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = [file for file in FILES if file.is_relative_to(ROOT / "vau_jax")]


def test_every_module_has_a_layer() -> None:
    named = {module_of(file) for file in MODULES} - set(PUBLIC_NAMES) - {"", "__init__"}
    assert [name for name in sorted(named) if layer_of(name) is None] == []


@pytest.mark.parametrize("file", MODULES, ids=module_of)
def test_imports_go_down_only(file: Path) -> None:
    own = layer_of(module_of(file))
    if module_of(file) in PUBLIC_NAMES or own is None:
        pytest.skip("a public name")
    imported = [name.removeprefix("vau_jax.") for name in imports_of(file) if name.startswith("vau_jax.")]
    upward = [name for name in imported if (layer := layer_of(name)) is not None and layer < own]
    assert upward == []
    assert not [name for name in imported if name.startswith(tuple(f"{public}." for public in PUBLIC_NAMES))]


def test_only_models_import_flax() -> None:
    users = {module_of(f).split(".")[0] for f in MODULES if any(n.startswith("flax") for n in imports_of(f))}
    assert users == {"models"}


TASK = re.compile(
    r"""[=!]=\s*["'](qa|grounding|classification|description)["']|
                      ["'](qa|grounding|classification|description)["']\s*[=!]=|
                      ["'](qa|grounding|classification|description)["']\s+(not\s+)?in\b""",
    re.VERBOSE,
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_but_a_tasks_own_compares_its_name(file: Path) -> None:
    if file.parent.name == "tasks":
        return
    assert [line for line in file.read_text().splitlines() if TASK.search(line)] == []


def test_tests_import_helpers_from_helper_modules_only() -> None:
    for file in (ROOT / "tests").glob("*.py"):
        assert not [name for name in imports_of(file) if name.startswith("tests.test_")], file.name
