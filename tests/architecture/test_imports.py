"""Imports go up the levels of docs/design.md, siblings meet only through abstract classes, none hides in a function.

The rules are checked on syntax trees, so nothing is imported here, and they are checked on made-up trees too.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEVELS = {
    "jaxsim._core": 0, "jaxsim.kernels": 0,
    "jaxsim.spec": 1,
    "jaxsim.state": 2,
    "jaxsim.cost": 3, "jaxsim.policy": 3, "jaxsim.workload": 3, "jaxsim.metrics": 3,
    "jaxsim.traces": 4, "jaxsim.profiles": 4,
    "jaxsim.engine": 5,
    "jaxsim.io": 6, "jaxsim.analytic": 6,
    "jaxsim.validate": 7, "jaxsim.study": 7,
    "jaxsim.calibrate": 8, "jaxsim.planning": 8, "jaxsim.sensitivity": 8,
    "jaxsim.reproduce": 9,
    "jaxsim.cli": 10, "jaxsim.bench": 10, "jaxsim.__main__": 10, "jaxsim": 10,
    "jaxsim.scenarios": 0,
}
"""Units of the package; the longest prefix of a module's name is its unit."""

MAY_IMPORT_INSIDE_FUNCTIONS = {
    # The command line answers --help and --version without loading JAX.
    "jaxsim.cli.commands": "*",
    "jaxsim.cli.explain": "*",
    "jaxsim.cli.imports": "*",
    "jaxsim.cli.listing": "*",
    "jaxsim.cli.process": "*",
    "jaxsim.cli.run": "*",
    "jaxsim.calibrate.command": "*",
    "jaxsim.validate.command": "*",
    "jaxsim.planning.command": "*",
    "jaxsim.planning.codesign_command": "*",
    "jaxsim.planning.place_command": "*",
    "jaxsim.planning.requirements_command": "*",
    "jaxsim.sensitivity.command": "*",
    "jaxsim.reproduce.command": "*",
    "jaxsim.sensitivity.attribute_command": "*",
    "jaxsim.sensitivity.margins_command": "*",
    "jaxsim.study.command": "*",
    "jaxsim.study.goodput_command": "*",
    "jaxsim.study.plot_command": "*",
    # Drawing is optional and matplotlib slow to load.
    "jaxsim.io.figure": "matplotlib",
    "jaxsim.io.plots": "matplotlib",
    "jaxsim.study.heat_map": "matplotlib",
    "jaxsim.study.line_plot": "matplotlib",
    "jaxsim.study.panels": "matplotlib",
    "jaxsim.study.pareto_plot": "matplotlib",
    "jaxsim.sensitivity.heat_map": "matplotlib",
    "jaxsim.sensitivity.tornado": "matplotlib",
    # Not installed with jaxsim.
    "jaxsim.planning.codesign": "optax",
    # Half a second that only Sobol designs need.
    "jaxsim.study.design": "scipy",
    # Not on every platform; the memory of a run is then left out.
    "jaxsim.bench.worker": "resource",
}


@dataclass(frozen=True)
class Import:
    """One import: who, what (a module), which names from it, and whether inside a function."""

    importer: str
    line: int
    module: str
    names: tuple[str, ...]
    is_inside: bool


def unit(module: str) -> str:
    """The unit a module belongs to."""
    while module not in LEVELS:
        module, dot, _ = module.rpartition(".")
        if not dot:
            raise KeyError(module)
    return module


def imports(importer: str, source: str, is_package: bool = False) -> list[Import]:
    """All imports of a module; relative ones made absolute."""
    found = []
    package = importer if is_package else importer.rpartition(".")[0]

    def visit(node, is_inside):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append(Import(importer, node.lineno, alias.name, (), is_inside))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")
                module = ".".join([*base[:len(base) - node.level + 1], *([module] if module else [])])
            found.append(Import(importer, node.lineno, module, tuple(a.name for a in node.names), is_inside))
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, is_inside or is_function)

    visit(ast.parse(source), False)
    return found


def targets(entry: Import) -> list[str]:
    """Modules an import reaches: `from jaxsim.state import world` reaches jaxsim.state or what lies in it."""
    if entry.module in ("jaxsim",) and entry.names:
        return [f"jaxsim.{name}" for name in entry.names]
    return [entry.module]


def problems(found: list[Import]) -> list[str]:
    """What is against the rules, a line each."""
    wrong = []
    for entry in found:
        where = f"{entry.importer}:{entry.line}"
        allowed = MAY_IMPORT_INSIDE_FUNCTIONS.get(entry.importer)
        if entry.is_inside and allowed != "*" and entry.module.split(".")[0] != allowed:
            wrong.append(f"{where} imports {entry.module} inside a function")
        for target in targets(entry):
            if target.split(".")[0] in ("kernels", "scenarios", "tests", "benchmarks"):
                wrong.append(f"{where} imports {target}, which is not part of the package")
            if target.split(".")[0] != "jaxsim":
                continue
            ours, theirs = unit(entry.importer), unit(target)
            if ours == theirs:
                continue
            if LEVELS[theirs] > LEVELS[ours]:
                wrong.append(f"{where} imports {target}: level {LEVELS[theirs]} from level {LEVELS[ours]}")
            is_abstract = bool(entry.names) and all(name.startswith("Abstract") for name in entry.names)
            if LEVELS[theirs] == LEVELS[ours] and not is_abstract and LEVELS[ours] not in (0, 10):
                wrong.append(f"{where} imports its sibling {target}")
            if ours == "jaxsim._core" and LEVELS[theirs] == 0:
                wrong.append(f"{where} imports {target}: _core knows nobody")
    return wrong


def modules() -> list[tuple[str, Path]]:
    """Every module of the package by its import name."""
    found = []
    for folder, name in ((ROOT / "jaxsim", "jaxsim"), (ROOT / "kernels", "jaxsim.kernels"),
                         (ROOT / "scenarios", "jaxsim.scenarios")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append((".".join([name, *parts]), path))
    return found


def all_imports() -> list[Import]:
    return [entry for name, path in modules()
            for entry in imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")]


def test_imports_keep_to_the_rules():
    found = all_imports()
    assert len(found) > 100
    assert problems(found) == []


def test_data_has_no_logic():
    for name, path in modules():
        if unit(name) == "jaxsim.scenarios":
            body = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
                    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
            assert body == [], f"{path} has statements"


def test_levels_are_those_of_the_design_page():
    """The table in docs/design.md and the one here say the same."""
    rows = [line.split("|")[1:3] for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| `")]
    documented = {}
    for names, level in rows:
        for part in names.replace(",", " ").split():
            word = part.strip("`()")
            key = "jaxsim." + word.removeprefix("jaxsim").strip("./").removesuffix(".py").replace("/", ".")
            if level.strip().isdigit() and key.removesuffix(".") in LEVELS:
                documented[key] = int(level)
    assert len(documented) >= 10
    assert documented == {name: LEVELS[name] for name in documented}
    assert set(LEVELS) - set(documented) <= {"jaxsim", "jaxsim.__main__", "jaxsim.scenarios", "jaxsim.kernels"}


@pytest.mark.parametrize("importer, source, says", [
    ("jaxsim.spec.plan", "from jaxsim.engine import loop", "level 5 from level 1"),
    ("jaxsim.kernels.clock", "import jaxsim.spec.dims", "level 1 from level 0"),
    ("jaxsim.kernels.clock", "from jaxsim import spec", "level 1 from level 0"),
    ("jaxsim.cost.base", "from jaxsim.policy.routing import View", "its sibling"),
    ("jaxsim.cost.base", "from ..policy.routing import View", "its sibling"),
    ("jaxsim.state.world", "def f():\n    from jaxsim.spec import dims", "inside a function"),
    ("jaxsim.io.plots", "def f():\n    import pandas", "inside a function"),
    ("jaxsim.state.world", "class A:\n    def f(self):\n        import numpy", "inside a function"),
    ("jaxsim.engine.loop", "import kernels.clock", "not part of the package"),
    ("jaxsim.engine.loop", "from tests.engine import cases", "not part of the package"),
    ("jaxsim._core.errors", "from jaxsim.kernels import clock", "knows nobody"),
    ("jaxsim._core.errors", "from jaxsim import metrics", "level 3 from level 0"),
])
def test_a_broken_rule_is_found(importer, source, says):
    found = problems(imports(importer, source))
    assert len(found) == 1 and says in found[0]


@pytest.mark.parametrize("importer, source", [
    ("jaxsim.engine.loop", "from jaxsim.kernels import clock\nfrom jaxsim.policy.routing import RoundRobin"),
    ("jaxsim.cost.base", "from jaxsim.policy.routing import AbstractRouting"),
    ("jaxsim.cost.roofline", "from .base import BatchStats"),
    ("jaxsim.cli.commands", "def main():\n    from jaxsim.engine import loop\n    import jax"),
    ("jaxsim.io.plots", "def draw():\n    from matplotlib.figure import Figure"),
])
def test_what_is_allowed_passes(importer, source):
    assert problems(imports(importer, source)) == []


def test_every_kernel_has_a_property_test():
    kernels = {p.stem for p in (ROOT / "kernels").glob("*.py")} - {"__init__"}
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert kernels - tested == set()
