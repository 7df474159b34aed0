"""The map in the package's docstring is the truth: who may import whom, and who owns which library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import refusal_core

ROOT = Path(refusal_core.__file__).parent
OWNERS = {
    "transformer_lens": {"bridge"},
    "sklearn": {"geometry"},
    "umap": {"geometry"},
    "plotly": {"plots"},
    "gradio": {"ui"},
    "accelerate": {"placement"},
    "spaces": {"ui"},
}
ROOMS = re.findall(r"^    (\w+)/?  +\S", refusal_core.__doc__ or "", re.MULTILINE)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


MODULES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def test_every_module_has_a_room_on_the_map():
    assert {room_of(path) for path in MODULES} == set(ROOMS)


def test_imports_point_up_the_map():
    for path in MODULES:
        mine = ROOMS.index(room_of(path))
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "refusal_core" and len(parts) > 1 and parts[1] in ROOMS:
                assert ROOMS.index(parts[1]) <= mine, f"{path.name} imports {name}, which is below it"


def test_each_library_has_one_owner():
    for path in MODULES:
        for library in {name.split(".")[0] for name in imports_of(path)} & set(OWNERS):
            assert room_of(path) in OWNERS[library], f"{path.name} imports {library}"


def test_the_page_is_imported_without_what_only_a_model_or_a_map_needs():
    said = "import sys, refusal_core.ui.server; print(*sys.modules)"
    asked = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert "torch" in asked.stdout.split()
    slow = {"transformer_lens", "transformers.modeling_utils", "torch._dynamo", "sklearn", "umap"}
    assert not slow & set(asked.stdout.split())
