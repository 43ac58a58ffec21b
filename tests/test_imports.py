"""The house stands on its order: imports run down the lines below, never up, also inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

LINES = (
    ("__init__", "__main__"),
    ("cli",),
    ("demonstration",),
    ("looking", "examining"),
    ("bench",),
    ("report",),
    ("evals",),
    ("world",),
    ("reduction", "steering", "probes", "diffusion", "training", "gaze"),
    ("networks",),
    ("layers",),
    ("stack", "loading"),
    ("catalog",),
    ("core",),
    ("models",),
    ("ops",),
)
FAMILIES = LINES[8]
LINE = {package: number for number, line in enumerate(LINES) for package in line}
SEAMS_MAY_IMPORT = {
    *("seams", "errors", "site", "layout", "call", "method", "card"),
    *("plan", "state", "passes", "cache", "tokens", "branch", "words"),
}
TYPES = "TYPE_CHECKING"
WRITTEN_EXCEPTIONS = {
    ("saccade.core.map", "overlay", "report"),  # a recording draws itself
    ("saccade.core.heads", "picture", "report"),
    ("saccade.core.record", "page", "report"),
    ("saccade.core.record", "plain", "report"),
    ("saccade.probes.attentionviz", "page", "report"),  # and what it shows, a page
    ("saccade.world.evaluate", "main", "evals"),  # a command of the world
}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str, str]]:
    """Line, dotted name and enclosing function of all that a module imports."""
    here = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, function: str) -> Iterator[tuple[int, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = ".".join(here[: len(here) + 1 - child.level]) if child.level else ""
                base = ".".join(filter(None, (start, child.module)))
                yield from ((child.lineno, f"{base}.{alias.name}", function) for alias in child.names)
            elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == TYPES:
                yield from walk(child, TYPES)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, child.name)
            else:
                yield from walk(child, function)

    return walk(tree, "")


def objection(module: str, name: str, function: str) -> str | None:
    """What is wrong with `module` importing `name`."""
    package, *inner = module.split(".")[1:] or ["__init__"]
    library, *rest = name.split(".")
    if library == "saccade":
        target = rest[0] if rest and rest[0] in LINE else "__init__"
        if (module, function, target) in WRITTEN_EXCEPTIONS:
            return None
        if package not in LINE:
            return f"{package} has no line in the order"
        if package != target and LINE[package] >= LINE[target]:
            return f"{package} imports {target}, which is not below it"
        if package in FAMILIES and rest[:2] == ["core", "seams"] and function != TYPES:
            return "a method knows no seam"
        if package == target == "core" and inner[:1] == ["seams"]:
            part = rest[1] if len(rest) > 1 else "core"
            known = part in SEAMS_MAY_IMPORT or function == TYPES
            return None if known else f"core.seams imports core.{part}"
        return None
    if package == "models" or (package == "core" and inner[:1] == ["seams"]):
        return None
    if library in {"diffusers", "timm"}:
        return f"{library} outside core.seams and models"
    if library == "transformers" and any(part.startswith("_") for part in rest):
        return f"private name {name} outside core.seams and models"
    return None


def check(source: str, module: str, is_package: bool = False) -> list[str]:
    found = imports(ast.parse(source), module, is_package)
    return [f"{module}:{line}: {why}" for line, name, fn in found if (why := objection(module, name, fn))]


def test_the_house_is_in_order():
    files = sorted((SRC / "saccade").rglob("*.py"))
    assert files
    wrong = []
    for file in files:
        parts = file.relative_to(SRC).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        wrong += check(file.read_text("utf-8"), module, is_package)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("saccade.ops.sparse", "import saccade.core"),
        ("saccade.ops.sparse", "from saccade import core"),
        ("saccade.ops.sparse", "from ..core import call"),
        ("saccade.ops.sparse", "def f():\n    from saccade.core.call import AttentionCall"),
        ("saccade.ops.sparse", "class A:\n    async def f(self):\n        import saccade.models.llava as m"),
        ("saccade.core.session", "import saccade"),
        ("saccade.core.session", "from saccade import attach"),
        ("saccade.core.session", "from .. import catalog"),
        ("saccade.core.method", "from saccade.steering.var import VAR"),
        ("saccade.core.record", "from saccade.report import draw"),
        ("saccade.core.record", "def save(self):\n    from saccade.report import draw"),
        ("saccade.core.record", "def page(self):\n    from saccade.bench import draw"),
        ("saccade.core.session", "def overlay(self):\n    from saccade.report import draw"),
        ("saccade.world.evaluate", "from saccade.evals import world"),
        ("saccade.world.scenes", "def main():\n    from saccade.evals import world"),
        ("saccade.core.seams.sdpa", "from saccade.core.session import Session"),
        ("saccade.core.seams.sdpa", "from ..session import Session"),
        ("saccade.core.seams.sdpa", "from saccade.core import Session"),
        ("saccade.core.seams.sdpa", "import saccade.core"),
        ("saccade.steering.var", "from saccade.reduction._parts import scores"),
        ("saccade.steering.var", "from ..probes import rollout"),
        ("saccade.steering.var", "from saccade.core.seams.projections import Matrices"),
        ("saccade.steering.var", "import diffusers"),
        ("saccade.steering.var", "from timm.layers import Attention"),
        ("saccade.steering.var", "from transformers.models._llama import Attention"),
        ("saccade.steering.var", "from transformers.masking_utils import _mask"),
        ("saccade.core.session", "import transformers._private"),
        ("saccade.report.page", "from saccade.bench import rows"),
        ("saccade.catalog", "from saccade.stack import parse"),
        ("saccade.cli", "from saccade import __version__"),
        ("saccade.helpers", "from saccade.ops import naive"),
    ],
)
def test_the_checker_objects(module, source):
    assert check(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("saccade.cli", "from saccade.report import page\nfrom saccade.stack import load"),
        ("saccade.bench.page", "from saccade.report import chart"),
        ("saccade.stack", "from . import catalog"),
        ("saccade.steering.var", "from ._parts import columns\nfrom saccade.core.method import Method"),
        ("saccade.core.record", "def page(self):\n    from saccade.report import draw"),
        (
            "saccade.steering.var",
            "if TYPE_CHECKING:\n    from saccade.core.seams.projections import Matrices",
        ),
        ("saccade.evals.world", "from saccade.world.scenes import scene"),
        ("saccade.world.evaluate", "def main():\n    from saccade.evals import world"),
        ("saccade.core.session", "from .seams import sdpa\nfrom transformers import AttentionInterface"),
        (
            "saccade.core.seams.sdpa",
            "from ..call import AttentionCall\nfrom .private import known\nimport timm",
        ),
        ("saccade.core.seams.sdpa", "from saccade.models import llava\nfrom saccade.ops import naive"),
        ("saccade.models.llava", "from transformers.masking_utils import _mask\nimport diffusers"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert check(source, module) == []


def test_relative_imports_of_a_package_start_at_itself():
    assert check("from .call import AttentionCall\nfrom .. import ops", "saccade.core", is_package=True) == []
    assert check("from .. import catalog", "saccade.core", is_package=True)
    assert check("from . import attach", "saccade", is_package=True) == []


def test_import_saccade_is_light():
    code = "import sys, saccade; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
