"""Logits of every prefix, kept on disk: a second run of the same model, prompt and policy does no forward pass."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.eval import forward
from decal.eval.exact import Rows
from decal.eval.paths import atomic_dir, cache_dir
from decal.samplers.context import History
from decal.samplers.errors import DecalError
from decal.samplers.trie import Policy, TokenTrie

FORMAT = 1
SHARD_BYTES = 256_000_000
DEFAULT_LIMIT_GB = 8.0


@dataclass(frozen=True)
class StoredRows:
    """Blocks of (nodes, logits) in a folder, read anew at each iteration."""

    folder: Path

    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        from safetensors.torch import load_file

        for shard in sorted(self.folder.glob("rows-*.safetensors")):
            tensors = load_file(shard)
            yield tensors["nodes"].tolist(), tensors["logits"]


class StoredViews:
    """What stands behind other prompts at the nodes of a trie; see `decal.samplers.views.Views`.

    Args:
        trie: of the prompt at hand; the others have the same.
        prompts: by kind, the rows of every other prompt.
    """

    def __init__(self, trie: TokenTrie, prompts: Mapping[str, Sequence[Rows]]):
        self._trie = trie
        self._at = {
            kind: [{node: logits[i] for nodes, logits in one for i, node in enumerate(nodes)} for one in several]
            for kind, several in prompts.items()
        }

    def logits(self, kind: str, history: History) -> Tensor:
        """(B, K, V)"""
        nodes = [self._node(text) for _, text in history.split()]
        return torch.stack([torch.stack([one[node] for one in self._at[kind]]) for node in nodes])

    def _node(self, text: Sequence[int]) -> int:
        node = 0
        for token in text:
            node = self._trie.children[node][token]
        return node


def key(fingerprint: str, device: str, prompt: Sequence[int], trie: TokenTrie, policy: Policy) -> str:
    """Name of the cache entry: everything the logits depend on."""
    import transformers

    content = {
        "format": FORMAT,
        "model": fingerprint,
        "prompt": list(prompt),
        "policy": asdict(policy),
        "trie": asdict(trie),
        "device": device,
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def load_or_compute(
    model: Any,
    fingerprint: str,
    prompt: Sequence[int],
    trie: TokenTrie,
    policy: Policy,
    grow: Callable[[TokenTrie, int, Any], None] | None,
    *,
    cache: bool = True,
    tick: Callable[[int], None] = lambda amount: None,
) -> tuple[TokenTrie, Rows]:
    """The trie, grown where the policy asks for it, and the logits of its nodes.

    Args:
        model, fingerprint: the model and what tells it from every other.
        cache: whether to keep the logits on disk; without it they stay in memory.
        tick: called with the number of nodes just computed.
    """
    if not cache:
        blocks: list[tuple[list[int], Tensor]] = []

        def sink(nodes: list[int], logits: Tensor) -> None:
            _check(logits)
            blocks.append((list(nodes), logits.cpu()))
            tick(len(nodes))

        forward.collect(model, prompt, trie, sink, grow, restart=blocks.clear)
        return trie, blocks
    folder = cache_dir() / "rows" / key(fingerprint, model.device.type, prompt, trie, policy)
    if folder.is_dir():
        os.utime(folder)
    else:
        with atomic_dir(folder) as fresh:
            compute(fresh, model, prompt, trie, grow, tick)
            (fresh / "trie.json").write_text(json.dumps(asdict(trie)))
        _forget_old(folder.parent, keep=folder)
    return _read_trie(folder / "trie.json"), StoredRows(folder)


def compute(folder: Path, model: Any, prompt: Sequence[int], trie: TokenTrie, grow: Any, tick: Any) -> None:
    """Logits of the nodes of a trie, which ``grow`` may extend, into a folder for `StoredRows`."""
    writer = _ShardWriter(folder)

    def sink(nodes: list[int], logits: Tensor) -> None:
        writer.add(nodes, logits)
        tick(len(nodes))

    by_tree = forward.collect(model, prompt, trie, sink, grow, restart=writer.restart)
    writer.flush()
    (folder / "about.json").write_text(json.dumps({"tree_attention": by_tree, "nodes": len(trie)}))


class _ShardWriter:
    def __init__(self, folder: Path):
        self.folder, self.shards = folder, 0
        self.nodes: list[int] = []
        self.logits: list[Tensor] = []

    def restart(self) -> None:
        for shard in self.folder.glob("rows-*.safetensors"):
            shard.unlink()
        self.shards, self.nodes, self.logits = 0, [], []

    def add(self, nodes: list[int], logits: Tensor) -> None:
        _check(logits)
        self.nodes += nodes
        self.logits.append(logits.cpu())
        if sum(part.nbytes for part in self.logits) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        from safetensors.torch import save_file

        if self.nodes:
            tensors = {"nodes": torch.tensor(self.nodes), "logits": torch.cat(self.logits)}
            save_file(tensors, self.folder / f"rows-{self.shards:05d}.safetensors")
            self.shards, self.nodes, self.logits = self.shards + 1, [], []


def _check(logits: Tensor) -> None:
    if not bool(logits.isfinite().any(-1).all()) or bool(logits.isnan().any()):
        raise DecalError("the model gives NaN, or nothing finite, as logits; try another dtype")


def _read_trie(path: Path) -> TokenTrie:
    fields = json.loads(path.read_text())
    fields["ends"] = tuple(fields["ends"])
    fields["children"] = [{int(token): node for token, node in c.items()} for c in fields["children"]]
    fields["strays"] = [tuple(s) for s in fields["strays"]]
    return TokenTrie(**fields)


def _forget_old(folder: Path, keep: Path) -> None:
    """Drop the least recently used entries beyond DECAL_ROWS_GB gigabytes (8 unless set)."""
    text = os.environ.get("DECAL_ROWS_GB", str(DEFAULT_LIMIT_GB))
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise DecalError(f"DECAL_ROWS_GB must be a number of gigabytes, at least 0, got {text!r}")
    entries = sorted((e for e in folder.iterdir() if e != keep and not e.name.startswith(".")), key=lambda e: e.stat().st_mtime)
    sizes = {entry: sum(f.stat().st_size for f in entry.iterdir()) for entry in entries}
    total = sum(sizes.values()) + sum(f.stat().st_size for f in keep.iterdir())
    for entry in entries:
        if total <= limit:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= sizes[entry]
