"""Results of settings, kept on disk: what an interrupted run has evaluated, the next one takes up."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval.paths import atomic_write, cache_dir
from decal.samplers.chain import Chain

PACKAGE = Path(__file__).parent.parent
MOST = 2000
"""Results that are kept; the oldest go first."""


@cache
def _code(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@cache
def _own_code() -> list[str]:
    files = (file for part in ("kernels", "samplers", "eval") for file in sorted((PACKAGE / part).glob("*.py")))
    return [_code(str(file)) for file in files]


def key(chains: Iterable[Chain], **more: Any) -> str:
    """A name for results: what they are of, and the code that makes them, a plugin's too. ``more`` is JSON-able."""
    chains = list(chains)
    files = sorted({inspect.getfile(step.rule.body) for chain in chains for step in chain.steps})
    content = {**more, "chains": [str(c) for c in chains], "code": _own_code(), "rules": [_code(file) for file in files]}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def load_or_compute(name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Arrays kept under a name, or else what ``compute`` gives, which is then kept."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    file = cache_dir() / "results" / f"{name}.safetensors"
    try:
        found = load(file.read_bytes())
    except (OSError, SafetensorError):
        found = None
    if found is None:
        found = dict(compute())
        atomic_write(file, save({k: np.ascontiguousarray(v) for k, v in found.items()}))
        _forget_old(file.parent)
    else:
        file.touch()
    return found


def _forget_old(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST]:
        file.unlink(missing_ok=True)
