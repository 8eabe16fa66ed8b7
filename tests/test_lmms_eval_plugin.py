"""A short run of `python tests/lmms_eval_plugin.py`, where lmms-eval is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="needs lmms-eval, see docs/lmms-eval.md")
@pytest.mark.slow
def test_lmms_eval_scores_what_our_own_code_scores() -> None:
    program = Path(__file__).parent / "lmms_eval_plugin.py"
    result = subprocess.run(
        [sys.executable, str(program), "--questions", "8"], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
