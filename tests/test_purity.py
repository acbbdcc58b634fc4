"""The core is pure: it is imported without torch, so that it stays small, quick to test and usable by a simulator."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Adding a module here is a promise that it never needs torch, not even later inside a function.
PURE_MODULES = (
    "bound",
    "calls",
    "config",
    "errors",
    "figures",
    "hazards",
    "memory",
    "planner",
    "residency",
    "schedule",
    "refine",
    "search",
    "shapes",
    "simulator",
    "strategy",
    "trace",
    "trial",
    "units",
    "window",
)
FORBIDDEN = ("torch", "diffusers", "transformers", "accelerate", "numpy")

ROOT = Path(__file__).parents[1]

# Forbidden modules cannot be found, not even by code that hides a failed import behind `except ImportError`.
BLOCKER = f"""
import sys
class Blocker:
    tried = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            self.tried.append(name)
            raise ModuleNotFoundError(f"{{name}} is forbidden here", name=name)
sys.meta_path.insert(0, Blocker())
"""
CHECK = f"""
assert not Blocker.tried, f"tried to import {{Blocker.tried}}"
found = [name for name in {FORBIDDEN!r} if name in sys.modules]
assert not found, f"{{found}} imported"
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that finds this checkout and nothing set up by the test session."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def assert_pure(statements: str) -> None:
    done = python(BLOCKER + statements + CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_module_is_imported_without_torch(module: str) -> None:
    assert_pure(f"import prefetch_offload.{module} as module\nassert module.__doc__, 'says what it is'\n")


def test_the_package_and_its_settings_and_errors_need_no_torch() -> None:
    assert_pure(
        "import prefetch_offload as p\n"
        "assert p.Settings.make('1GiB').budget == 2**30\n"
        "assert issubclass(p.SettingError, p.OffloadError)\n"
        "assert p.BudgetError and p.OffloadWarning and p.UnsupportedError\n"
    )


def test_a_misspelt_attribute_of_the_package_is_an_attribute_error() -> None:
    assert_pure(
        "import prefetch_offload as p\n"
        "try: p.enabel\n"
        "except AttributeError as error: assert 'enabel' in str(error)\n"
        "else: raise AssertionError('no AttributeError')\n"
    )


def test_every_public_name_has_a_home() -> None:
    assert_pure("import prefetch_offload as p\nassert set(p._HOME) == set(p.__all__), set(p._HOME) ^ set(p.__all__)\n")


@pytest.mark.parametrize("module", PURE_MODULES)
def test_no_import_of_torch_hides_inside_a_function(module: str) -> None:
    tree = ast.parse((ROOT / "prefetch_offload" / f"{module}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    siblings = {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.level}
    assert not {name.partition(".")[0] for name in names} & set(FORBIDDEN)
    assert siblings <= set(PURE_MODULES)


@pytest.mark.parametrize(
    "statement", ["import torch", "import torch.nn", "try: import torch\nexcept ImportError: pass"]
)
def test_the_check_itself_objects(statement: str) -> None:
    done = python(BLOCKER + statement + "\n" + CHECK)
    assert done.returncode != 0
    assert "torch" in done.stderr


def test_the_check_objects_to_a_missing_module() -> None:
    with pytest.raises(AssertionError, match="no_such_module"):
        assert_pure("import prefetch_offload.no_such_module\n")
