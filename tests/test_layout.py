"""The shape of the house: floors, packages, sizes, and the name under which `solvers/` may be imported."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bilevel

ROOT = Path(__file__).resolve().parent.parent

# A file imports only from its own floor or a lower one. A row covers the modules below it too.
FLOORS = {
    "bilevel.vector": 0,
    "bilevel.errors": 0,
    "bilevel.layout": 1,
    "bilevel.modules": 1,
    "bilevel.patterns": 1,
    "bilevel.selection": 1,
    "bilevel.penalties": 2,
    "bilevel.priors": 2,
    "bilevel.relaxed": 2,
    "bilevel.weighting": 2,
    "bilevel.augment": 2,
    "bilevel.param_groups": 2,
    "bilevel.variables": 1,
    "bilevel.hyperparameters": 1,
    "bilevel.ranges": 1,
    "bilevel.operators": 1,
    "bilevel.prox": 1,
    "bilevel.certificate": 1,
    "bilevel.data": 1,
    "bilevel.batching": 1,
    "bilevel.minimize": 1,
    "bilevel.scaled": 1,
    "bilevel.table": 1,
    "bilevel.files": 1,
    "bilevel.randomness": 1,
    "bilevel.sparse": 1,
    "bilevel.twice": 1,
    "bilevel.culprit": 1,
    "bilevel.losses": 1,
    "bilevel.measure": 1,
    "bilevel.memory": 1,
    "bilevel.widening": 1,
    "bilevel.solvers": 2,
    "bilevel.inner": 3,
    "bilevel.problem": 3,
    "bilevel.response": 3,
    "bilevel.stepping": 3,
    "bilevel.kinks": 3,
    "bilevel.families": 4,
    "bilevel.evaluation": 4,
    "bilevel.choosing": 4,
    "bilevel.walk": 4,
    "bilevel.solution": 4,
    "bilevel.plotting": 4,
    "bilevel.reporting": 4,
    "bilevel.run": 4,
    "bilevel.point": 4,
    "bilevel.context": 4,
    "bilevel.listening": 4,
    "bilevel.third_split": 4,
    "bilevel.slack": 4,
    "bilevel.checkpoint": 4,
    "bilevel.descent": 4,
    "bilevel.differentiable": 4,
    "bilevel.oracle": 4,
    "bilevel.known": 4,
    "bilevel.callbacks": 5,
    "bilevel.outer": 5,
    "bilevel.handed": 4,
    "bilevel.hyper_optimizer": 5,
    "bilevel.testing": 5,
    "bilevel.bench": 5,
    "bilevel.reference": 5,
    "bilevel.method_table": 5,
    "bilevel.comparison": 6,
    "bilevel.gradient_check": 6,
    "bilevel.preflight": 6,
    "bilevel.nested": 6,
    "bilevel.logistic": 6,
    "bilevel.demo": 7,
    "bilevel.demo_plot": 7,
    "bilevel.check_command": 7,
    "bilevel.compare_command": 7,
    "bilevel.completion_command": 7,
    "bilevel.report_command": 7,
    "bilevel.tabular": 7,
    "bilevel.tune_command": 7,
    "bilevel.cli": 7,
    "bilevel.optuna": 7,
    "bilevel.lightning": 7,
    "bilevel.huggingface": 7,
    "bilevel.sklearn": 7,
}
FACADE = 7  # `import bilevel` sees the whole house: for the doors only
EXEMPT = {"bilevel", "bilevel.__main__"}

FILE_LINES = 330
FUNCTION_LINES = 60
ROOMS = ("tests", "benchmarks", "examples")  # held to the same lengths


def modules() -> dict[str, Path]:
    """Map the name of every module to its file; `solvers/` goes by its installed name."""
    found = {}
    for folder, package in ((ROOT / "bilevel", "bilevel"), (ROOT / "solvers", "bilevel.solvers")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if package == "bilevel" and inside.parts[0] == "solvers":
                continue  # some Pythons follow the link; the real folder has its own turn
            parts = inside.with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def floor_of(module: str) -> int | None:
    if module == "bilevel":
        return FACADE
    return next((floor for row, floor in FLOORS.items() if f"{module}.".startswith(f"{row}.")), None)


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Yield line and module of everything that a file imports from this project, inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            members = [f"{source}.{alias.name}" for alias in node.names]
            targets = [member if member in known else source for member in members]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "bilevel":
                yield node.lineno, target


def test_files_import_from_their_own_floor_or_a_lower_one() -> None:
    known = modules()
    faults = []
    for name in known.keys() - EXEMPT:
        floor = floor_of(name)
        if floor is None:
            faults.append(f"{name} has no floor: add it to FLOORS in tests/test_layout.py")
            continue
        for line, target in imports(name, known[name], known):
            below = floor_of(target)
            if below is None and target not in known:
                faults.append(f"{name}, line {line}: imports {target}, which does not exist")
            elif below is not None and below > floor:
                faults.append(f"{name} (floor {floor}), line {line}: imports {target} (floor {below})")
    assert not faults, "\n".join(sorted(faults))


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["packages"].split()
    found = [m.name for m in pkgutil.walk_packages(bilevel.__path__, "bilevel.") if m.ispkg]
    assert sorted(listed) == sorted(["bilevel", *found])


def test_files_and_functions_stay_short() -> None:
    faults = []
    beside = {str(path.relative_to(ROOT)): path for folder in ROOMS for path in sorted((ROOT / folder).glob("*.py"))}
    for name, path in (modules() | beside).items():
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > FILE_LINES:
            faults.append(f"{name}: {lines} lines, at most {FILE_LINES}: can it be two rooms?")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    faults.append(f"{name}.{node.name}: {length} lines, at most {FUNCTION_LINES}")
    assert not faults, "\n".join(faults)


def test_solvers_refuses_to_be_a_top_level_package() -> None:
    # A bare `solvers` would shadow every user's own solvers.py.
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
try:
    import solvers
except ImportError as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Not ModuleNotFoundError: that would be a folder that is missing, or an import that failed by accident.
    assert run.stdout.startswith("ImportError "), run.stdout or "`import solvers` went through"
    assert "bilevel.solvers" in run.stdout
