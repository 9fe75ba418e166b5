"""Answers too many to list, followed in tokens: the graph of a set is its trie, and what is written is exactly uniform."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import pytest
import tiny
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

import decal
from decal import DecalError, ValidSet
from decal.samplers import guided, token_graph
from decal.samplers.guided import Guide
from decal.samplers.token_graph import TokenGraph
from decal.samplers.trie import MOST_ANSWERS, Policy, TokenTrie
from decal.samplers.vocabulary import Vocabulary

TEXTS = [
    "red green greenish blue light blue",
    "1234 12 512 [1, 12, 123]",
    '{"a": "red", "b": [true, false]}',
    "ab abc bca cab aab",
]
TOKENIZER = tiny.byte_level(TEXTS, merges=60)
FLAG = {"type": "boolean"}
SETS = {
    "words": ValidSet.from_list(["red", "green", "greenish", "blue", "light blue", "light green", "r", "1 2"]),
    "letters": ValidSet.from_regex("[abc]{1,6}"),
    "spaces": ValidSet.from_regex("[ab ]{1,5}c"),
    "numbers": ValidSet.from_regex("[1-5]{4}"),
    "bounded": ValidSet.from_regex("(ab|abc|ca)+b?", max_length=11),
    "digits": ValidSet.digits(3),
    "brackets": ValidSet.dyck(5),
    "json": ValidSet.from_json_schema(
        {
            "properties": {"a": {"enum": ["red", "green", "blue"]}, "b": {"type": "array", "items": FLAG, "maxItems": 3}},
            "required": ["a"],
        }
    ),
}  # fmt: skip


PLACES = ["Alabama", "Ohio", "Jersey", "York", "Dakota", "Texas", "Maine", "Utah", "Iowa", "Idaho"]
LARGE = {
    "properties": {
        "state": {"enum": [f"{a} {b}" for a in ("New", "North", "South", "West", "Old") for b in PLACES]},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 60, "maximum": 99}, "minItems": 2, "maxItems": 2},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["state", "zip", "ages", "tags"],
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    from decal.eval import models

    return models.load("smollm2", progress=False).tokenizer


def written(chain: decal.Chain, count: int) -> list[str]:
    """Texts that a random model writes."""
    model = tiny.llama(len(TOKENIZER), dtype=torch.float32)
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    prompt = torch.tensor([TOKENIZER.encode("red: ")]).expand(count, -1)
    torch.manual_seed(1)
    kwargs = chain.generate_kwargs(pad_token_id=TOKENIZER.pad_token_id)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
    return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in out[:, prompt.shape[1] :]]


def graph_of(
    valid: ValidSet, tokenizer: PreTrainedTokenizerFast = TOKENIZER, ends: tuple[int, ...] | None = None, space: bool = False
):
    return TokenGraph.of(
        valid, Vocabulary.of(tokenizer), guided._encode(tokenizer), (tokenizer.eos_token_id,) if ends is None else ends, space
    )


def assert_same(graph: TokenGraph, trie: TokenTrie) -> None:
    """Node by node: the same tokens, counts and ends."""
    assert graph.size == trie.size
    assert graph.ends == trie.ends
    assert max(graph.depth) == max(trie.depth)
    stack = [(0, 0)]
    seen = 0
    while stack:
        one, other = stack.pop()
        seen += 1
        assert graph.children[one].keys() == trie.children[other].keys()
        assert graph.count[one] == trie.count[other]
        assert (graph.answer[one] == 0) == (trie.answer[other] >= 0)
        stack += [(child, trie.children[other][token]) for token, child in graph.children[one].items()]
    assert seen == len(trie)


@pytest.mark.parametrize("space", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_the_graph_is_the_trie(name: str, space: bool) -> None:
    trie, _ = tiny.compile_trie(TOKENIZER, SETS[name], Policy(ends=("<eos>",), leading_space=space))
    assert_same(graph_of(SETS[name], space=space), trie)


@pytest.mark.parametrize("seed", range(8))
def test_the_graph_of_random_answers_in_random_tokens(seed: int) -> None:
    chance = random.Random(seed)
    texts = ["".join(chance.choices("abc 1é", k=chance.randrange(1, 9))) for _ in range(60)]
    tokenizer = tiny.byte_level(texts, merges=chance.choice([5, 30, 80]))
    valid = ValidSet.from_list(sorted(set(texts)))
    trie, _ = tiny.compile_trie(tokenizer, valid, Policy(ends=("<eos>",)))
    found = [tokenizer.encode(text) for text in valid]
    if any("\ufffd" in tokenizer.decode([t]) for tokens in found for t in tokens):
        with pytest.raises(DecalError, match="neighbours don't decide"):
            graph_of(valid, tokenizer)
    else:
        assert_same(graph_of(valid, tokenizer), trie)


@pytest.mark.model
@pytest.mark.parametrize("name", ["words", "spaces", "json"])
def test_the_graph_is_the_trie_in_tokens_of_a_real_model(name: str, smollm2: PreTrainedTokenizerFast) -> None:
    trie, _ = tiny.compile_trie(smollm2, SETS[name], Policy(ends=("<eos>",)))
    assert_same(graph_of(SETS[name], smollm2), trie)


@pytest.mark.model
def test_texts_of_a_large_set_are_the_tokenizer_s_own(smollm2: PreTrainedTokenizerFast) -> None:
    valid = ValidSet.from_json_schema(LARGE)
    graph = graph_of(valid, smollm2)
    assert graph.count[0] == valid.size == 50 * 10**5 * 40**2 * 15
    chance = random.Random(3)
    for _ in range(300):
        node, tokens = 0, []
        while graph.children[node]:
            children = graph.children[node]
            weights = [graph.count[child] for child in children.values()]
            tokens.append(chance.choices(list(children), weights)[0])
            node = children[tokens[-1]]
        text = smollm2.decode(tokens)
        assert text in valid
        assert smollm2.encode(text, add_special_tokens=False) == tokens


def test_uniform_through_generate_where_nobody_can_list() -> None:
    """Every member of 320,000 records is uniform, and so are pairs of them, whatever the model."""
    sizes = {"a": 4, "n": 200, "m": 200, "b": 2}
    numbers = {"type": "integer", "minimum": 1, "maximum": 200}
    members = {"a": {"enum": ["red", "green", "greenish", "blue"]}, "n": numbers, "m": numbers, "b": {"type": "boolean"}}
    valid = ValidSet.from_json_schema({"properties": members, "required": list(members)}, separators=(",", ":"))
    assert valid.size == 320_000 > MOST_ANSWERS
    texts = written(decal.guided(1.0).for_answers(valid, TOKENIZER), 4000)
    assert all(text in valid for text in texts)
    records = [json.loads(text) for text in texts]
    for keys in (("a",), ("n",), ("m",), ("b",), ("a", "b"), ("b", "n")):
        counts = Counter(tuple(record[key] for key in keys) for record in records).values()
        cells = math.prod(sizes[key] for key in keys)
        assert chisquare([*counts, *[0] * (cells - len(counts))]).pvalue > 1e-4, keys
    assert len(set(texts)) > 3930  # 25 pairs are the same by chance


def test_below_1_the_model_has_a_say_and_every_text_is_valid() -> None:
    valid = ValidSet.from_regex("[abc]{1,14}")
    chain = decal.temperature(1.5) | decal.guided(0.3).for_answers(valid, TOKENIZER)
    assert all(text in valid for text in written(chain, 300))


def test_a_set_is_listed_up_to_a_size_and_counted_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = ValidSet.from_regex("[abc]{1,4}")
    assert isinstance(Guide.of(valid, TOKENIZER).trie, TokenTrie)
    monkeypatch.setattr(guided, "MOST_ANSWERS", valid.size - 1)
    graph = Guide.of(valid, TOKENIZER)
    monkeypatch.undo()
    trie = Guide.of(valid, TOKENIZER)
    assert isinstance(graph.trie, TokenGraph)
    assert (graph.largest, graph.longest, graph.stop) == (trie.largest, trie.longest, trie.stop)
    texts = [TOKENIZER.encode(text)[:size] for text in list(valid)[:40] for size in range(3)]
    logits = torch.randn(len(texts), len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    history = decal.History.of([[5, *text] for text in texts], prompt=1)
    for strength in (0.4, 1.0):
        one, other = (decal.guided(strength).for_answers(guide)(logits, history=history) for guide in (graph, trie))
        assert torch.equal(one, other)


def test_settings_of_the_tokenizer_don_t_matter() -> None:
    """A tokenizer keeps the padding and truncation of its last call."""
    tokenizer = tiny.byte_level(TEXTS, merges=60)
    tokenizer(["a", "abc abc abc"], padding="max_length", max_length=30)
    tokenizer(["a", "abc abc abc"], truncation=True, max_length=1)
    assert_same(graph_of(SETS["letters"], tokenizer), tiny.compile_trie(tokenizer, SETS["letters"], Policy(ends=("<eos>",)))[0])


def test_what_goes_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_graph, "MOST_LOOKS", 100)
    with pytest.raises(
        DecalError, match=r"letters: too many tokens may follow each other in its answers \(100 were looked at\), as in free"
    ):
        graph_of(ValidSet.from_regex("[abc]{1,6}", "letters"))
    monkeypatch.undo()
    with pytest.raises(DecalError, match="more than 1e300 answers"):
        graph_of(ValidSet.from_regex("[ab]{999}"))
    with pytest.raises(DecalError, match="'r' ends an answer, but an answer contains it"):
        graph_of(SETS["words"], ends=(TOKENIZER.encode("r")[0],))
    with pytest.raises(DecalError, match="without an end, an answer that another begins with"):
        graph_of(SETS["words"], ends=())
    with pytest.raises(DecalError, match="without an end, an answer that another begins with"):
        graph_of(ValidSet.from_list(["a", "ab"]), ends=())  # whose tokens aren't the beginning of each other's
    assert graph_of(SETS["numbers"], ends=()).ends == ()
    monkeypatch.setattr(guided, "MOST_ANSWERS", 1)
    with pytest.raises(DecalError, match=r"an answer has '<\|end\|>' in it, which is a special token"):
        Guide.of(["a", "x<|end|>"], TOKENIZER)
