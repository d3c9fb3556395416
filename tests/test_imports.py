"""The rooms of the source tree: who imports whom, what an import drags in, and how long a piece of code may
get.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "converters", "launch")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500

# Module or package -> what it may import of the project. The longest prefix that fits a module decides.
ARROWS: dict[str, set[str]] = {
    "engine.errors": set(),
    "engine.config": {"engine.errors", "engine.config"},
    "engine.runtime": {"engine.errors", "engine.config", "engine.runtime"},
    "engine.storage": {"engine.errors", "engine.storage"},
    "engine.model": {"engine.errors", "engine.config", "engine.runtime", "engine.model"},
    "engine.data": {"engine.errors", "engine.config", "engine.data"},
    "engine.training": {"engine"},
    "converters": {
        "engine.errors",
        "engine.config",
        "engine.runtime",
        "engine.storage",
        "engine.model",
        "converters",
    },
    "launch": {"engine", "converters", "launch"},
}
# The same for other people's packages; a room that is not named here may import any.
LIBRARIES: dict[str, set[str]] = {
    "engine.errors": set(),
    "engine.config": {"yaml"},
    "engine.runtime": {"torch", "megatron", "numpy"},
    "engine.storage": {"torch"},
}


def module_name(path: Path) -> str:
    """`engine/data/store.py` -> engine.data.store; a package's `__init__.py` has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def rule_for(module: str) -> str | None:
    """The entry of ARROWS that holds for a module; the bare `__init__` of engine has none."""
    found = [prefix for prefix in ARROWS if within(module, prefix)]
    return max(found, key=len) if found else None


def imports_of(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions and under TYPE_CHECKING too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in FILES else base


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Imports of a module that the tables do not allow."""
    rule, found = rule_for(module), []
    for line, target in imports_of(ast.parse(source), module, is_package=is_package):
        top = target.split(".")[0]
        if top in ROOMS:
            allowed = rule is not None and any(within(target, package) for package in ARROWS[rule])
        elif top in sys.stdlib_module_names:
            allowed = True
        elif rule is None:
            allowed = False
        else:
            allowed = top in LIBRARIES.get(rule, {top})
            allowed = allowed and not (rule == "engine.data" and top == "megatron")
        if not allowed:
            found.append(f"{module}:{line} imports {target}")
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_table(module: str) -> None:
    path = FILES[module]
    assert not violations(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.errors", "import yaml"),
        ("engine.config.parse", "import torch"),
        ("engine.config.parse", "from engine.model.spec import ModelSpec"),
        ("engine.runtime.mcore", "import transformers"),
        ("engine.runtime.mcore", "import engine.model.spec"),
        ("engine.model.layers", "from engine.data import store"),
        ("engine.model.layers", "from ..training import step"),
        ("engine.model.layers", "def f():\n    from converters.load import load_model_weights"),
        ("engine.data.store", "from megatron.core import parallel_state"),
        ("engine.data.store", "from engine.runtime.platform import Platform"),
        ("engine.training.loop", "import converters.load"),
        ("engine.training.loop", "if TYPE_CHECKING:\n    from launch import sft"),
        ("converters.load", "from engine.data.store import TokenStore"),
        ("converters.load", "from engine.training.resume import TrainerState"),
        ("converters.load", "import launch"),
        ("engine", "import engine.config"),
    ],
)
def test_a_forbidden_arrow_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_every_module_has_a_rule() -> None:
    assert [module for module in FILES if rule_for(module) is None] == ["engine"]
    assert {rule_for(module) for module in FILES} - {None} == set(ARROWS)


def test_parallel_state_is_named_in_one_file() -> None:
    named = [m for m, path in FILES.items() if "parallel_state" in path.read_text(encoding="utf-8")]
    assert named == ["engine.runtime.mcore"]


def loaded_after(code: str) -> set[str]:
    """Top-level names in sys.modules after `code` ran in a fresh interpreter."""
    report = "import sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def test_config_and_spec_and_the_command_import_neither_torch_nor_megatron() -> None:
    modules = [
        m
        for m in FILES
        if within(m, "engine.config") or m in ("engine.errors", "engine.model.spec", "launch.cli")
    ]
    loaded = loaded_after("\n".join(f"import {module}" for module in modules))
    assert "engine" in loaded
    assert not loaded & {"torch", "megatron", "transformers", "numpy"}


def test_data_and_mapping_import_without_megatron() -> None:
    modules = [m for m in FILES if within(m, "engine.data")] + ["converters.mapping"]
    code = "\n".join(f"import {module}" for module in modules)
    loaded = loaded_after(f"{code}\nimport torch.distributed\nassert not torch.distributed.is_initialized()")
    assert "converters" in loaded
    assert "megatron" not in loaded


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "sft --help",
        "data --help",
        "convert --help",
        "merge --help",
        "verify --help",
        "inspect --help",
        "doctor --help",
        "bench --help",
        "bench train --help",
        "bench comm --help",
        "bench sweep --help",
        "validate --help",
    ],
)
def test_help_answers_without_heavy_imports(command: str) -> None:
    loaded = loaded_after(f"from launch.cli import main\nassert main({command.split()}) == 0")
    assert "launch" in loaded
    assert not loaded & {"torch", "transformers", "megatron"}


def test_functions_are_short() -> None:
    long = []
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min(part.lineno for part in [node, *node.decorator_list])
                lines = (node.end_lineno or first) - first + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{module}.{node.name}: {lines} lines")
    assert not long


def test_files_are_short() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > MAX_FILE_LINES}
