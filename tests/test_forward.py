"""Tree attention gives what ordinary forward passes give, and rows are computed once."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import decal
from decal.eval import forward, rows
from decal.eval.exact import evaluate
from decal.samplers.trie import Policy, TokenTrie

VOCABULARY = 40
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return tiny.seeded(GPT2LMHeadModel, config).double()


def gemma3(window: int) -> Any:
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return tiny.seeded(Gemma3ForCausalLM, config).double()


MODELS = {"llama": lambda: tiny.llama(VOCABULARY), "gpt2": gpt2, "gemma3": lambda: gemma3(64)}


@pytest.fixture
def trie() -> TokenTrie:
    rng = np.random.default_rng(0)
    return tiny.trie_of(tiny.random_answers(rng, range(1, 6), 4, 15), (0,))


def gathered(model: Any, trie: TokenTrie, **kwargs: Any) -> dict[tuple[int, ...], Tensor]:
    """Logits by path, each node exactly once."""
    found: dict[tuple[int, ...], Tensor] = {}

    def sink(nodes: list[int], logits: Tensor) -> None:
        assert logits.shape == (len(nodes), VOCABULARY)
        for node, row in zip(nodes, logits, strict=True):
            path = tuple(trie.path(node))
            assert path not in found
            assert not path or path[:-1] in found, "parents come first"
            found[path] = row.clone()

    forward.prefix_logits(model, PROMPT, trie, sink, **kwargs)
    return found


def plain(model: Any, path: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[*PROMPT, *path]])).logits[0, -1]


def assert_same(found: dict[tuple[int, ...], Tensor], expected: dict[tuple[int, ...], Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, row in found.items():
        torch.testing.assert_close(row, expected[path], rtol=0, atol=1e-9, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_equals_an_ordinary_pass_for_every_path(name: str, trie: TokenTrie) -> None:
    model = MODELS[name]()
    found = gathered(model, trie)
    assert len(found) == len(trie)
    assert_same(found, {path: plain(model, path) for path in found})
    assert max(float((found[()] - row).abs().max()) for row in found.values()) > 0.1, "rows of this model don't differ"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_block_size_does_not_matter(name: str, block: int, trie: TokenTrie) -> None:
    model = MODELS[name]()
    assert_same(gathered(model, trie, block=block), gathered(model, trie))


def test_order_of_nodes_does_not_matter(trie: TokenTrie) -> None:
    model = tiny.llama(VOCABULARY)
    answers = [trie.path(node) for node in range(len(trie)) if trie.answer[node] >= 0]
    shuffled = [answers[i] for i in np.random.default_rng(1).permutation(len(answers))]
    assert_same(gathered(model, tiny.trie_of(shuffled, (0,)), block=4), gathered(model, trie, block=4))


def test_only_nodes_that_something_depends_on_are_read() -> None:
    answers = [(1, 2), (1, 3), (4,)]
    assert set(gathered(tiny.llama(VOCABULARY), tiny.trie_of(answers))) == {(), (1,)}
    assert set(gathered(tiny.llama(VOCABULARY), tiny.trie_of(answers, (0,)))) == {(), (1,), (1, 2), (1, 3), (4,)}


def test_growing_follows_the_model() -> None:
    """Nodes added on the way are read too; what `grow` is told is the probability of path and token."""
    model = tiny.llama(VOCABULARY)
    trie = tiny.trie_of([(1, 2), (3,)], (0,))
    told: dict[tuple[int, ...], Tensor] = {}

    def grow(trie: TokenTrie, node: int, reach: Tensor) -> None:
        told[tuple(trie.path(node))] = reach.clone()
        if trie.path(node) in ([], [1], [5]):
            trie.add(node, 5)

    found = gathered(model, trie, grow=grow)
    assert set(found) == set(told) == {(), (1,), (3,), (5,), (1, 2), (1, 5), (5, 5)}
    assert_same(found, {path: plain(model, path) for path in found})
    for path, reach in told.items():
        mass = 1.0
        for i, token in enumerate(path):
            mass *= float(plain(model, path[:i]).softmax(-1)[token])
        torch.testing.assert_close(reach, mass * plain(model, path).softmax(-1), rtol=1e-9, atol=1e-15)


def test_path_by_path_gives_the_same(trie: TokenTrie) -> None:
    model = tiny.llama(VOCABULARY)
    found: dict[tuple[int, ...], Tensor] = {}

    def sink(nodes: list[int], logits: Tensor) -> None:
        for node, row in zip(nodes, logits, strict=True):
            assert tuple(trie.path(node)) not in found
            found[tuple(trie.path(node))] = row.clone()

    forward.plain_logits(model, PROMPT, trie, sink, batch=3)
    assert_same(found, gathered(model, trie))


def test_a_window_shorter_than_the_paths_is_read_path_by_path(trie: TokenTrie) -> None:
    model = gemma3(4)
    found: dict[int, Tensor] = {}

    def sink(nodes: list[int], logits: Tensor) -> None:
        found.update({node: row.clone() for node, row in zip(nodes, logits, strict=True)})

    with pytest.warns(UserWarning, match="one path at a time"):
        assert not forward.collect(model, PROMPT, trie, sink, restart=found.clear)
    assert len(found) == len(trie)
    for node, row in found.items():
        torch.testing.assert_close(row, plain(model, tuple(trie.path(node))), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_take_masks_are_read_without_a_warning(name: str, trie: TokenTrie) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forward.collect(MODELS[name](), PROMPT, trie, lambda nodes, logits: None)


class IgnoresMasks(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class IgnoresPositions(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class RefusesMasks(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("only masks of two dimensions")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("kind", [IgnoresMasks, IgnoresPositions, RefusesMasks])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_ignore_or_refuse_masks_are_caught(kind: type, dtype: torch.dtype, trie: TokenTrie) -> None:
    config = tiny.llama(VOCABULARY, spread=1.0).config
    model = tiny.seeded(kind, config).to(dtype)
    with pytest.raises(forward.TreeAttentionError):
        forward.prefix_logits(model, PROMPT, trie, lambda nodes, logits: None)
    found: dict[int, Tensor] = {}

    def sink(nodes: list[int], logits: Tensor) -> None:
        found.update({node: row.clone() for node, row in zip(nodes, logits, strict=True)})

    with pytest.warns(UserWarning, match="one path at a time"):
        assert not forward.collect(model, PROMPT, trie, sink, restart=found.clear)
    for node, row in found.items():
        torch.testing.assert_close(row, plain(model, tuple(trie.path(node))), rtol=0, atol=1e-4)
    with pytest.raises(decal.DecalError, match="tokenisation 'all' needs a model that takes tree masks"):
        forward.collect(model, PROMPT, trie, sink, grow=lambda trie, node, reach: None)


class Counting:
    """A model that counts how often it is called."""

    def __init__(self, model: Any, fail_at: int | None = None):
        self.model, self.calls, self.fail_at = model, 0, fail_at
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def forward(self, logits_to_keep: int = 0) -> None:
        """Only its signature is looked at."""

    def __call__(self, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.model(**kwargs)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DECAL_CACHE", str(tmp_path))
    monkeypatch.delenv("DECAL_ROWS_GB", raising=False)
    return tmp_path / "rows"


CHAINS = [decal.parse("temperature(4)"), decal.parse("temperature(9) | min_p(0.001)")]


def answers_of(model: Any, trie: TokenTrie, **changes: Any) -> np.ndarray:
    request = {"fingerprint": "tiny", "prompt": PROMPT, "policy": Policy(), "grow": None} | changes
    trie, stored = rows.load_or_compute(model=model, trie=trie, **request)
    answers = evaluate(trie, stored, CHAINS).answers
    assert (answers[0] > 0).all(), "with zeros everywhere, equality says nothing"
    return answers


def test_a_second_run_does_no_forward_pass(cache: Path, trie: TokenTrie) -> None:
    model = Counting(tiny.llama(VOCABULARY))
    ticks: list[int] = []
    first = answers_of(model, trie, tick=ticks.append)
    assert model.calls > 0
    assert sum(ticks) == len(trie)
    calls = model.calls
    np.testing.assert_array_equal(answers_of(model, trie), first)
    assert model.calls == calls
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": [*PROMPT, 7]},
        {"policy": Policy(threshold=0.5)},
        {"fingerprint": "another"},
        {"trie": tiny.trie_of([(1,), (2, 3)], (0,))},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_request_has_an_entry_of_its_own(other: dict[str, Any], cache: Path, trie: TokenTrie) -> None:
    model = Counting(tiny.llama(VOCABULARY))
    answers_of(model, trie)
    calls = model.calls
    answers_of(model, **{"trie": trie, **other})
    assert model.calls > calls
    assert len(list(cache.iterdir())) == 2


def test_without_the_cache_the_result_is_the_same_and_nothing_is_written(cache: Path, trie: TokenTrie) -> None:
    model = Counting(tiny.llama(VOCABULARY))
    without = answers_of(model, trie, cache=False)
    assert not cache.exists()
    np.testing.assert_array_equal(answers_of(model, trie), without)


def test_several_shards_are_read_back_in_full(cache: Path, trie: TokenTrie, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers_of(tiny.llama(VOCABULARY), trie, cache=False)
    monkeypatch.setattr(rows, "SHARD_BYTES", 1)
    np.testing.assert_array_equal(answers_of(tiny.llama(VOCABULARY), trie), expected)
    (entry,) = cache.iterdir()
    assert len(list(entry.glob("rows-*.safetensors"))) > 3


def test_a_fallback_leaves_no_rows_of_the_first_attempt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHARD_BYTES", 1)
    model, trie = gemma3(4), tiny.trie_of([(1, 2, 3, 4, 5), (1, 2, 3)], (0,))  # more levels than paths
    with pytest.warns(UserWarning, match="one path at a time"):
        kept = answers_of(model, trie)
    with pytest.warns(UserWarning, match="one path at a time"):
        np.testing.assert_array_equal(answers_of(model, trie, cache=False), kept)
    (entry,) = cache.iterdir()
    assert json.loads((entry / "about.json").read_text()) == {"tree_attention": False, "nodes": len(trie)}
    stored = [node for nodes, _ in rows.StoredRows(entry) for node in nodes]
    assert sorted(stored) == list(range(len(trie)))


@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupted_computation_leaves_nothing(call: int, cache: Path, trie: TokenTrie) -> None:
    with pytest.raises(KeyboardInterrupt):
        answers_of(Counting(tiny.llama(VOCABULARY), fail_at=call), trie)
    assert list(cache.rglob("*")) == []
    model = Counting(tiny.llama(VOCABULARY))
    answers_of(model, trie)
    assert model.calls > 0


def test_logits_that_are_not_numbers_are_an_error_and_not_kept(cache: Path, trie: TokenTrie) -> None:
    model = tiny.llama(VOCABULARY)
    model.lm_head.weight[5] = torch.nan
    for keep in (True, False):
        with pytest.raises(decal.DecalError, match="NaN"):
            answers_of(model, trie, cache=keep)
    assert list(cache.rglob("*")) == []


def test_the_limit_forgets_the_oldest_entries(cache: Path, trie: TokenTrie, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(VOCABULARY)
    names = ["first", "second", "third"]
    entry: dict[str, Path] = {}
    for age, name in enumerate(names):
        before = set(cache.iterdir()) if cache.exists() else set()
        answers_of(model, trie, fingerprint=name)
        (entry[name],) = set(cache.iterdir()) - before
        os.utime(entry[name], (1000 + age, 1000 + age))
    size = sum(f.stat().st_size for f in entry["first"].iterdir())
    answers_of(model, trie, fingerprint="first")  # used again, so no longer the oldest
    monkeypatch.setenv("DECAL_ROWS_GB", str(2.5 * size / 1e9))
    answers_of(model, trie, fingerprint="fourth")
    assert entry["first"].exists()
    assert not entry["second"].exists()
    assert not entry["third"].exists()
    assert len(list(cache.iterdir())) == 2


def test_an_entry_larger_than_the_limit_is_kept_for_its_own_run(
    cache: Path, trie: TokenTrie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECAL_ROWS_GB", "0")
    model = tiny.llama(VOCABULARY)
    assert answers_of(model, trie).sum() > 0
    assert answers_of(model, trie, fingerprint="another").sum() > 0
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("value", ["lots", "", "nan", "-1"])
def test_a_bad_limit_is_an_error(value: str, cache: Path, trie: TokenTrie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECAL_ROWS_GB", value)
    with pytest.raises(decal.DecalError, match=r"DECAL_ROWS_GB must be .*, got ") as caught:
        answers_of(tiny.llama(VOCABULARY), trie)
    assert repr(value) in str(caught.value)


def test_a_grown_trie_is_stored_with_its_rows(cache: Path) -> None:
    model = Counting(tiny.llama(VOCABULARY))

    def grow(trie: TokenTrie, node: int, reach: Tensor) -> None:
        if node == 0:
            trie.answer[trie.add(0, 6)] = 1
            trie.strays[0] = (9,)

    def computed() -> tuple[TokenTrie, np.ndarray]:
        trie, stored = rows.load_or_compute(model, "tiny", PROMPT, tiny.trie_of([(1,), (2, 3)], (0,)), Policy(), grow)
        return trie, evaluate(trie, stored, CHAINS).answers

    trie, first = computed()
    calls = model.calls
    again, second = computed()
    assert model.calls == calls
    assert again == trie
    assert trie.strays[0] == (9,)
    assert trie.children[0].keys() == {1, 2, 6}
    np.testing.assert_array_equal(first, second)
