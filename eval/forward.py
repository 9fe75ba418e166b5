"""Next-token logits at every prefix of a trie: the prompt is read once, then each node costs one token.

Nodes of a block are read together in one sequence; a mask lets each see the prompt, its ancestors and itself (tree attention).
Blocks are visited depth first and the key-value cache is cut back after each, so it never holds more than one branch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from decal.samplers.errors import DecalError
from decal.samplers.trie import TokenTrie

Sink = Callable[[list[int], Tensor], None]
BLOCK = 256


def needed(trie: TokenTrie, node: int) -> bool:
    """Whether anything depends on the distribution after ``node``."""
    return bool(trie.children[node] or trie.strays[node] or (trie.ends and trie.answer[node] >= 0))


@torch.inference_mode()
def prefix_logits(
    model: Any,
    prompt: Sequence[int],
    trie: TokenTrie,
    sink: Sink,
    grow: Callable[[TokenTrie, int, Tensor], None] | None = None,
    block: int = BLOCK,
) -> None:
    """Give ``sink`` the nodes of ``trie`` and their next-token logits, (nodes, V), block by block, parents first.

    Args:
        model: a causal language model of transformers.
        prompt: token ids before the answer; at least one.
        grow: called on each node with the probability of its path times each next token, (V,), at temperature 1; it may add
            children, which are then visited.
        block: most nodes read in one forward pass.
    """
    reader = _TreeReader(model, prompt)
    deepest: tuple[int, Tensor] = (0, reader.root)
    reach: dict[int, Tensor] = {0: torch.zeros(())}

    def deliver(nodes: list[int], logits: Tensor) -> None:
        nonlocal deepest
        sink(nodes, logits)
        if trie.depth[nodes[-1]] > trie.depth[deepest[0]]:
            deepest = nodes[-1], logits[-1].clone()
        if grow is not None:
            for node, row in zip(nodes, logits, strict=True):
                log_reach = reach[node] + row.double().log_softmax(-1)
                grow(trie, node, log_reach.exp())
                reach.update({child: log_reach[token] for token, child in trie.children[node].items()})

    def visit(frontier: list[int]) -> None:
        for start in range(0, len(frontier), block):
            nodes = frontier[start : start + block]
            with reader.branch():
                deliver(nodes, reader.read(trie, nodes))
                visit([c for node in nodes for c in trie.children[node].values() if needed(trie, c) or grow])

    deliver([0], reader.root[None])
    visit([child for child in trie.children[0].values() if needed(trie, child) or grow])
    _check_against_plain(model, prompt, trie, *deepest)


class TreeAttentionError(RuntimeError):
    """The model doesn't honour the mask that tree attention needs."""


def _check_against_plain(model: Any, prompt: Sequence[int], trie: TokenTrie, node: int, row: Tensor) -> None:
    """One ordinary forward pass along the deepest path: an architecture that ignores the mask is caught here."""
    ids = torch.tensor([[*prompt, *trie.path(node)]], device=model.device)
    plain = model(input_ids=ids).logits[0, -1]
    tolerance = 0.5 if plain.dtype in (torch.float16, torch.bfloat16) else 1e-2
    difference = float((plain.float() - row.float()).abs().max())
    if not difference <= tolerance:
        raise TreeAttentionError(f"logits along one path differ by {difference:.3g} from those of an ordinary pass")


@torch.inference_mode()
def plain_logits(model: Any, prompt: Sequence[int], trie: TokenTrie, sink: Sink, batch: int = 16) -> None:
    """What `prefix_logits` gives, by ordinary forward passes over whole paths: for models it doesn't fit."""
    leaves = [n for n in range(len(trie)) if not trie.children[n]]
    seen: set[int] = set()
    for start in range(0, len(leaves), batch):
        paths = [trie.path(leaf) for leaf in leaves[start : start + batch]]
        width = max(map(len, paths))
        ids = torch.tensor([[*prompt, *p, *[0] * (width - len(p))] for p in paths], device=model.device)
        logits = model(input_ids=ids).logits[:, len(prompt) - 1 :]
        for row, leaf in enumerate(leaves[start : start + batch]):
            node = leaf
            fresh = []
            while node not in seen:
                seen.add(node)
                fresh.append(node)
                if node == 0:
                    break
                node = trie.parent[node]
            fresh.reverse()
            if fresh:
                sink(fresh, logits[row, [trie.depth[n] for n in fresh]])


def collect(
    model: Any,
    prompt: Sequence[int],
    trie: TokenTrie,
    sink: Sink,
    grow: Callable[[TokenTrie, int, Tensor], None] | None = None,
    restart: Callable[[], None] = lambda: None,
) -> bool:
    """Logits of every node, by tree attention if the model can, else path by path. Returns whether it could.

    ``restart`` is called if what ``sink`` was given so far is to be forgotten.

    Raises:
        DecalError: the model can't, and ``grow`` needs it to.
    """
    try:
        prefix_logits(model, prompt, trie, sink, grow)
    except TreeAttentionError as error:
        if grow is not None:
            raise DecalError(f"tokenisation 'all' needs a model that takes tree masks: {error}") from error
        warnings.warn(f"reading prefixes one path at a time, which is slower: {error}", stacklevel=2)
        restart()
        plain_logits(model, prompt, trie, sink)
        return False
    return True


class _TreeReader:
    def __init__(self, model: Any, prompt: Sequence[int]):
        from transformers import DynamicCache

        self.model = model
        # Without the model's config the cache keeps every position, also where the model attends to a window.
        self.cache = DynamicCache()
        self.prompt_length = self.length = len(prompt)
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        ids = torch.tensor([list(prompt)], device=model.device)
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, **last_only)
        self.root: Tensor = out.logits[0, -1]
        self.slots: dict[int, list[int]] = {0: []}
        layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
        self.kinds = sorted(set(layers)) if len(set(layers)) > 1 or "sliding_attention" in layers else []

    def branch(self) -> _Branch:
        return _Branch(self)

    def read(self, trie: TokenTrie, nodes: list[int]) -> Tensor:
        device, dtype = self.model.device, self.model.dtype
        mask = torch.full((len(nodes), self.length + len(nodes)), torch.finfo(dtype).min, dtype=dtype)
        mask[:, : self.prompt_length] = 0
        for row, node in enumerate(nodes):
            self.slots[node] = [*self.slots[trie.parent[node]], self.length + row]
            mask[row, self.slots[node]] = 0
        mask = mask[None, None].to(device)
        positions = torch.tensor([[self.prompt_length + trie.depth[n] - 1 for n in nodes]], device=device)
        ids = torch.tensor([[trie.token[n] for n in nodes]], device=device)
        try:
            out = self.model(
                input_ids=ids,
                attention_mask=dict.fromkeys(self.kinds, mask) if self.kinds else mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture raises that doesn't know such masks
            raise TreeAttentionError(f"{type(self.model).__name__} takes no tree mask ({type(error).__name__})") from error
        self.length += len(nodes)
        return out.logits[0]


class _Branch:
    """On leaving, the cache holds what it held on entering."""

    def __init__(self, reader: _TreeReader):
        self.reader, self.length = reader, reader.length

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        # Every release takes a number of positions to drop as a negative one; 5.x takes nothing else.
        if self.reader.length > self.length:
            self.reader.cache.crop(self.length - self.reader.length)
        self.reader.length = self.length
