"""The tree is as the linter, the formatter and the type checker want it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = {
    "lint": ["ruff", "check"],
    "format": ["ruff", "format", "--check"],
    "types": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("check", list(CHECKS))
def test_the_tree_is_clean(check):
    done = subprocess.run([sys.executable, "-m", *CHECKS[check]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
