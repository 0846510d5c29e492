"""The file format needs no torch and nothing else of lib; no module imports itself by a detour."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("lib", "models")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The modules of lib and models that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


def test_every_module_of_the_format_imports_without_torch():
    names = sorted(name for name in MODULES if name.startswith("lib.nnz."))
    assert names == [
        f"lib.nnz.{name}"
        for name in ("coder", "description", "frame", "order", "v1", "v2", "v3", "vectors")
    ]
    code = (
        "import importlib, sys; sys.modules['torch'] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in ('lib', 'models')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(run.stdout.split()) == {"lib", "lib.nnz", *names, "models", "models.layers"}


def test_no_import_circle():
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert graph["lib.checkpoint"] >= {"lib.compressed", "lib.quantizers"}  # the test sees imports
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_reference_decoder_shares_no_code():
    assert not imports(ROOT / "tests/reference_decoder.py")


def test_models_import_nothing_of_lib():
    for name, path in MODULES.items():
        if name.startswith("models."):
            assert not any(other.startswith("lib.") for other in imports(path)), name
