"""The kernels run in Triton's interpreter here, which has to be asked for before triton is imported: in a process of its own.

    pytest tests/gpu -m triton

Without ``-m triton`` these files aren't even imported.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    if config.getoption("markexpr") != "triton":
        return True
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))  # for executor.py and rows_for_gpu.py
    reason = why_not()
    if reason:
        pytest.exit(f"tests/gpu: {reason}", returncode=1)
    os.environ["TRITON_INTERPRET"] = "1"
    return None


def why_not() -> str:
    """Why these tests can't run, if they can't."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton is imported already, without its interpreter: give them a process of their own"
    return ""


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.triton)


@pytest.fixture(autouse=True)
def _quiet():
    """The interpreter computes on numpy, which reports what a GPU doesn't."""
    with np.errstate(all="ignore"):
        yield
