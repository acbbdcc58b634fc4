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


def test_the_name_of_the_folder_of_kernels_is_left_to_others() -> None:
    """`kernels` is a package that diffusers and transformers import if it is there."""
    found = "from importlib.util import find_spec as f; print(f('kernels'), f('prefetch_offload_kernels'))"
    where = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    told = subprocess.run([sys.executable, "-c", found], cwd="/", env=where, capture_output=True, text=True, check=True).stdout
    assert told.startswith("None ModuleSpec(")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    packages = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.packages.find]")[2].partition("\n[")[0]
    assert 'where = [".", "kernels"]' in packages and '"kernels"' not in packages.partition("include")[2], "in no wheel"


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


PLANNING = """
import hashlib
from prefetch_offload.figures import MODELS
from prefetch_offload.shapes import workload_of
from prefetch_offload.simulator import ComponentLoad, Link, Workload
from prefetch_offload.strategy import plan_call

def told(share):
    rows = share.script.rows if share.script else None
    return share.limit_nbytes, sorted(share.keep), share.ahead, share.head and sorted(share.head), sorted(share.late), rows

def planned(workload, budget, gbps):
    plan = plan_call(workload, budget, Link(gbps))
    return {name: told(share) for name, share in sorted(plan.shares.items())}, repr(plan.prediction.call_ms)

sdxl = MODELS["sdxl"]
sdxl = workload_of(sdxl.parts, sdxl.steps, sdxl.step_ms, sdxl.encode_ms, sdxl.decode_ms)
parts = {}
for name, sizes in (("a", (5, 3, 8)), ("b", (7, 2, 6, 4))):
    units = tuple(f"{name}{i}" for i in range(len(sizes)))
    parts[name] = ComponentLoad(units, dict(zip(units, (s * 10**6 for s in sizes))), dict(zip(units, (1.0, 2.5, 1.5, 3.0))))
small = Workload(parts, (("a", 1), ("b", 3)))
found = [planned(sdxl, 3 << 30, 25.0), planned(small, 19 * 10**6, 2.0)]
assert found[0][0] and any(rows for *_, rows in found[1][0].values()), "shares, and a script"
print(hashlib.sha256(repr(found).encode()).hexdigest())
"""


def test_another_process_finds_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets and dicts of names have an order of their own in every process."""
    found = set()
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        done = python(PLANNING)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
