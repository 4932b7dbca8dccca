"""The agreed layers, read from the sources: who may import whom, and what nobody may import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fasttune"
PLUGINS = ROOT / "plugins"

ORDER = (
    "errors",
    "explain",
    "config",
    "docstrings",
    "layouts",
    "task",
    "ops",
    "models",
    "media",
    "readers",
    "rows",
    "data",
    "features",
    "attention",
    "convolutions",
    "deformable",
    "adapt",
    "batching",
    "optim",
    "train",
    "memory",
    "checkpoint",
    "evaluate",
    "export",
    "folder",
    "signals",
    "progress",
    "report",
    "prepare",
    "inference",
    "check",
    "run",
    "listing",
    "doctor",
    "contests",
    "rehearsal",
    "bench",
    "demo",
    "cli",
    "__main__",
)
"""A module imports only what stands before it. `testing` may import all of them, and none may import it."""

FOR_PLUGINS = {"errors", "docstrings", "layouts", "task", "ops", "models"}
FOR_TESTS_OF_PLUGINS = FOR_PLUGINS | {"testing", "", "cli"}  # "": what `import fasttune` offers to everyone
SERIALIZERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LOADERS_OF_PICKLES = {("torch", "load"), ("torch", "save"), ("pd", "read_pickle"), ("pandas", "read_pickle")}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, "package.module.name") of every import of a source, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def modules_of_fasttune(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import from fasttune; "" for a name of the package itself."""
    for line, name in imported(path):
        package, *parts = name.split(".")
        if package == "fasttune":
            module = parts[0] if parts else ""
            yield line, module if module in {*ORDER, "testing"} else ""


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "build" not in path.relative_to(folder).parts)


def own_module(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_test(path: Path) -> bool:
    return "tests" in path.relative_to(ROOT).parts


def test_every_module_has_its_place_in_the_order() -> None:
    found = {own_module(path) for path in sources(PACKAGE)} - {"__init__"}
    assert found == {*ORDER, "testing"}
    assert len(ORDER) == len(set(ORDER))


def test_imports_go_only_to_the_left() -> None:
    wrong = []
    for path in sources(PACKAGE):
        module = own_module(path)
        if module in ("__init__", "testing"):
            continue
        allowed = {*ORDER[: ORDER.index(module)], "", *([module] if module in ("ops", "models") else [])}
        wrong += [
            f"{path.relative_to(ROOT)}, line {line}: {module} imports {other}"
            for line, other in modules_of_fasttune(path)
            if other not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_the_order_of_the_architecture_page_is_kept() -> None:
    """What the page lists, in the page's order; the other modules stand between."""
    page = [
        "errors",
        "config",
        "task",
        "ops",
        "data",
        "adapt",
        "batching",
        "optim",
        "train",
        "memory",
        "checkpoint",
        "evaluate",
        "export",
        "report",
        "run",
        "cli",
    ]
    assert [module for module in ORDER if module in page] == page


def test_plugins_import_only_the_contract() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}, line {line}: imports fasttune.{module}"
        for path in sources(PLUGINS)
        for line, module in modules_of_fasttune(path)
        if module not in (FOR_TESTS_OF_PLUGINS if is_test(path) else FOR_PLUGINS)
    ]
    assert not wrong, "\n".join(wrong)


def test_fasttune_imports_no_plugin() -> None:
    packages = {path.parent.name for path in PLUGINS.glob("*/*/__init__.py")}
    assert "fasttune_classification" in packages
    wrong = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in sources(PACKAGE)
        for line, name in imported(path)
        if name.split(".")[0] in packages
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_composition_root_and_its_neighbours_see_the_whole_config() -> None:
    seen = set()
    for path in sources(PACKAGE):
        if any(name == "fasttune.config.RunConfig" for _, name in imported(path)):
            seen.add(own_module(path))
    assert seen <= {"__init__", "run", "check", "prepare", "inference", "export", "folder"}


def test_the_loop_knows_no_task_path_or_run_file() -> None:
    modules = {module for _, module in modules_of_fasttune(PACKAGE / "train.py")}
    assert not modules & {"config", "readers", "rows", "data", "folder", "checkpoint", "export", "run"}


def test_no_pickle_is_written_or_read() -> None:
    wrong = []
    for path in [*sources(PACKAGE), *sources(PLUGINS)]:
        if is_test(path) or path.name == "testing.py":
            continue
        for line, name in imported(path):
            if name.split(".")[0] in SERIALIZERS:
                wrong.append(f"{path.relative_to(ROOT)}, line {line}: {name}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            if (node.value.id, node.attr) in LOADERS_OF_PICKLES:
                wrong.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {node.value.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module", ["fasttune", "fasttune.task", "fasttune.config", "fasttune.cli", "fasttune.listing"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "pandas")
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == []


def test_listing_tasks_imports_no_torch() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom fasttune.cli import main\n"
        "result = CliRunner().invoke(main, ['tasks'])\n"
        "assert 'text-classification' in result.output, result.output\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == ["False", "False"]


def test_the_check_itself_finds_what_is_wrong(tmp_path: Path) -> None:
    """An import inside a function, an alias and a TYPE_CHECKING block are all seen."""
    source = tmp_path / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fasttune.run import finetune\n"
        "def f():\n    import fasttune.cli as c\n    from fasttune import data\n    from fasttune import load\n"
    )
    assert list(modules_of_fasttune(source)) == [(3, "run"), (5, "cli"), (6, "data"), (7, "")]
