"""Answers as tokens: what tokens write, which paths count, and how much is missed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import decal
from decal import DecalError
from decal.eval.exact import Outcome, evaluate
from decal.eval.forward import prefix_logits
from decal.samplers.trie import Policy, TokenTrie
from decal.samplers.valid_set import ValidSet
from decal.samplers.vocabulary import Vocabulary, token_bytes

MONTHS = ["May", "March", "Mars", "April", "Mayday"]
SENTENCES = [" May March", " May", "Mars Mayday", "April Mayday\n\n", " April\n", "\n\n\n"]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Some answers are one token, some several, with other ways to spell them."""
    return tiny.byte_level(SENTENCES, merges=14)


def written(tokenizer: Any, text: str) -> bytes:
    table = token_bytes(tokenizer)
    return b"".join(table[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "text", ["plain", " a b  c", "naïve café", "日本 ☃", "tab\tand\nbreaks\n\n", "\x00\x7f\x80ÿ", "▁<0x0A>"]
)
def test_tokens_write_the_bytes_of_the_text(text: str) -> None:
    assert written(tiny.byte_level([text, "café ☃"], merges=8), text) == text.encode()
    if "▁" not in text:  # which SentencePiece can't tell from a space
        assert written(tiny.sentencepiece([text, "abc"]), text) == text.encode()
        assert written(tiny.sentencepiece(["abc "]), text) == text.encode(), "by bytes"


def test_byte_level_tokens() -> None:
    tokenizer = tiny.byte_level(SENTENCES, merges=14)
    tokenizer.add_tokens(["ÿĠ", AddedToken("\n\n\n\n", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    table, vocabulary = token_bytes(tokenizer), tokenizer.get_vocab()
    assert {table[vocabulary[c]] for c in pre_tokenizers.ByteLevel.alphabet()} == {bytes([b]) for b in range(256)}
    assert table[vocabulary["ĠMay"]] == b" May"
    assert table[vocabulary["Ċ"]] == b"\n"
    assert table[vocabulary["ÿĠ"]] == "ÿĠ".encode(), "an added token is text, not the alphabet of bytes"
    assert table[vocabulary["\n\n\n\n"]] == b"\n\n\n\n"
    assert vocabulary[tiny.EOS] not in table
    assert vocabulary["<|pad|>"] not in table
    assert len(table) == len(vocabulary) - 2


def test_sentencepiece_tokens() -> None:
    tokenizer = tiny.sentencepiece(["an é ÿ日 "], newlines=3)
    table, vocabulary = token_bytes(tokenizer), tokenizer.get_vocab()
    assert table[vocabulary["<0x0A>"]] == b"\n"
    assert table[vocabulary["<0xFF>"]] == b"\xff"
    assert table[vocabulary["ÿ"]] == "ÿ".encode(), "a piece is text, though it is in the alphabet of bytes too"
    assert table[vocabulary["▁"]] == b" "
    assert table[vocabulary["\n\n\n"]] == b"\n\n\n"
    for special in ("<unk>", tiny.EOS):
        assert vocabulary[special] not in table
    breaks = {vocabulary["<0x0A>"], *(vocabulary["\n" * n] for n in (1, 2, 3))}
    assert set(Vocabulary(table).starting_with("\n")) == breaks


def test_a_metaspace_pre_tokenizer() -> None:
    pieces = {"<unk>": 0, "▁May": 1, "▁": 2, "M": 3, "a": 4, "y": 5, "é": 6}
    backend = Tokenizer(tokenizer_models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_bytes(tokenizer) == {1: b" May", 2: b" ", 3: b"M", 4: b"a", 5: b"y", 6: "é".encode()}


def test_tokenizers_that_do_not_say_what_they_write() -> None:
    backend = Tokenizer(tokenizer_models.WordLevel({"May": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DecalError, match="reads byte-level BPE and SentencePiece tokenizers, this is neither"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))

    class Slow:
        pass

    with pytest.raises(DecalError, match="needs a fast tokenizer, got Slow"):
        token_bytes(Slow())


def assert_completions(trie: TokenTrie, paths: dict[tuple[int, ...], int]) -> None:
    """The trie holds exactly these paths, and counts what goes through each node."""
    nodes = {tuple(trie.path(n)): n for n in range(len(trie))}
    assert set(nodes) == {path[:i] for path in paths for i in range(len(path) + 1)}
    for path, node in nodes.items():
        assert trie.answer[node] == paths.get(path, -1)
        assert trie.count[node] == sum(p[: len(path)] == path for p in paths), path
        assert trie.depth[node] == len(path)
        if node:
            assert trie.parent[node] < node
            assert trie.children[trie.parent[node]][trie.token[node]] == node


@pytest.mark.parametrize("space", [False, True])
def test_canonical_paths_and_counts(bpe: PreTrainedTokenizerFast, space: bool) -> None:
    trie, grow = tiny.compile_trie(bpe, MONTHS, Policy(leading_space=space))
    assert grow is None
    encoded = {a: tuple(bpe((" " if space else "") + a)["input_ids"]) for a in MONTHS}
    assert {len(path) for path in encoded.values()} > {1}
    # Answers are numbered as the valid set lists them.
    assert_completions(trie, {encoded[a]: i for i, a in enumerate(ValidSet.from_list(MONTHS))})
    assert trie.size == len(MONTHS)


@pytest.mark.parametrize(
    "valid",
    [ValidSet.digits(3, sum_le=13), ValidSet.from_regex("[1-9][0-9]?|100"), ValidSet.from_list(MONTHS), ValidSet.digits(2)],
    ids=repr,
)
def test_counts_equal_those_of_the_automaton(valid: ValidSet) -> None:
    tokenizer = tiny.byte_level()  # a token for each byte
    table = token_bytes(tokenizer)
    trie, _ = tiny.compile_trie(tokenizer, valid)
    for node in range(len(trie)):
        state = valid.start
        for character in b"".join(table[t] for t in trie.path(node)).decode():
            state = valid.edges(state)[character]
        assert trie.count[node] == valid.count(state)


@pytest.mark.parametrize("policy", [Policy(), Policy(leading_space=True), Policy(case="any")], ids=["exact", "space", "case"])
def test_strays_are_the_tokens_that_still_spell_an_answer(bpe: PreTrainedTokenizerFast, policy: Policy) -> None:
    trie, _ = tiny.compile_trie(bpe, MONTHS, policy)
    table = token_bytes(bpe)
    variants = {v for a in MONTHS for v in ((a, a.lower(), a.upper(), a.capitalize()) if policy.case == "any" else (a,))}
    texts = [((" " if policy.leading_space else "") + v).encode() for v in variants]
    some = 0
    for node in range(len(trie)):
        here = b"".join(table[t] for t in trie.path(node))
        spelling = {t for t, b in table.items() if any(text.startswith(here + b) for text in texts)}
        assert set(trie.strays[node]) == spelling - set(trie.children[node])
        some += len(trie.strays[node])
    assert some > 3


PROMPT = [40, 50, 60]


def outcome_of(model: Any, tokenizer: Any, answers: Sequence[str], policy: Policy, chains: Sequence[str]) -> Outcome:
    trie, grow = tiny.compile_trie(tokenizer, answers, policy)
    rows: list[tuple[list[int], torch.Tensor]] = []
    prefix_logits(model, PROMPT, trie, lambda nodes, logits: rows.append((list(nodes), logits.clone())), grow)
    return evaluate(trie, rows, [decal.parse(chain) for chain in chains])


def spellings(table: dict[int, bytes], text: bytes) -> list[tuple[int, ...]]:
    """Every token sequence that writes ``text``."""
    if not text:
        return [()]
    return [(t, *rest) for t, b in table.items() if text.startswith(b) for rest in spellings(table, text[len(b) :])]


CHAINS = ["temperature(1.0)", "temperature(2.0)", "temperature(3) | min_p(0.01)", "top_p(0.97) | temperature(4)"]
STEPS = [
    [("temperature", 1)],
    [("temperature", 2)],
    [("temperature", 3), ("min_p", 0.01)],
    [("top_p", 0.97), ("temperature", 4)],
]


def test_all_tokenisations_add_up_to_every_spelling(bpe: PreTrainedTokenizerFast) -> None:
    answers = ["May", "Mars", "Mayday"]
    model, table = tiny.llama(len(bpe), spread=0.25), token_bytes(bpe)
    policy = Policy(tokenisation="all", leading_space=True, threshold=0.0)
    result = outcome_of(model, bpe, answers, policy, CHAINS)
    ends = [t for t, b in table.items() if b.startswith(b"\n")] + [bpe.eos_token_id]
    assert len(ends) > 2
    laws: dict[tuple[int, ...], list[np.ndarray]] = {}

    def law(path: tuple[int, ...]) -> list[np.ndarray]:
        if path not in laws:
            with torch.inference_mode():
                row = model(input_ids=torch.tensor([[*PROMPT, *path]])).logits[0, -1].numpy()
            laws[path] = [tiny.sample_law(row, steps) for steps in STEPS]
        return laws[path]

    expected = np.zeros((len(CHAINS), len(answers)))
    for number, answer in enumerate(ValidSet.from_list(answers)):
        ways = spellings(table, b" " + answer.encode())
        assert len(ways) > 3
        for way, chain in ((w, c) for w in ways for c in range(len(CHAINS))):
            mass = law(way)[chain][ends].sum()
            for i, token in enumerate(way):
                mass *= law(way[:i])[chain][token]
            expected[chain, number] += mass
    np.testing.assert_allclose(result.answers, expected, rtol=1e-9, atol=0)
    assert (expected > 0).all()
    np.testing.assert_array_equal(result.slack, 0)
    canonical = outcome_of(model, bpe, answers, Policy(leading_space=True), CHAINS)
    assert (canonical.validity < 0.999 * result.validity).all(), "other spellings matter here"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["exact", "any"])
def test_slack_bounds_what_is_missed(bpe: PreTrainedTokenizerFast, seed: int, case: str) -> None:
    model = tiny.llama(len(bpe), seed=seed, spread=0.3)
    policies = [Policy(case=case)] + [Policy("all", case=case, threshold=threshold) for threshold in (0.02, 1e-4, 1e-9, 0.0)]
    results = [outcome_of(model, bpe, MONTHS, policy, CHAINS) for policy in policies]
    everything = results[-1].validity
    np.testing.assert_array_equal(results[-1].slack, 0)
    for narrower, wider in itertools.pairwise(results):
        assert (narrower.validity <= wider.validity + 1e-12).all()
        assert (narrower.slack >= wider.slack - 1e-12).all()
    for result in results:
        assert (result.validity + result.slack >= everything - 1e-12).all()
    assert (results[0].slack > 0).all()
    assert (results[0].validity < everything).all()


def test_growing_stops_at_the_threshold(bpe: PreTrainedTokenizerFast) -> None:
    trie, grow = tiny.compile_trie(bpe, MONTHS, Policy("all", threshold=0.1))
    assert grow is not None
    strays = trie.strays[0]
    reach = np.zeros(len(bpe))
    reach[strays[0]], reach[strays[1]] = 0.1, 0.0999
    size = len(trie)
    grow(trie, 0, reach)
    assert len(trie) == size + 1
    assert strays[0] in trie.children[0]
    assert trie.strays[0] == strays[1:]
    assert trie.count[-1] == 0, "other spellings don't count in N"


def test_case_variants_count_for_their_answer(bpe: PreTrainedTokenizerFast) -> None:
    answers = ["May", "ab", "CD"]
    trie, _ = tiny.compile_trie(bpe, answers, Policy(case="any"))
    table = token_bytes(bpe)
    found = {b"".join(table[t] for t in trie.path(n)).decode(): trie.answer[n] for n in range(len(trie)) if trie.answer[n] >= 0}
    assert found == {"May": 0, "may": 0, "MAY": 0, "ab": 1, "AB": 1, "Ab": 1, "CD": 2, "cd": 2, "Cd": 2}
    assert trie.count[0] == 3, "N counts each answer once"


def test_which_policies_have_one_path_for_each_answer() -> None:
    assert Policy().one_path_each
    assert not Policy(case="any").one_path_each
    assert not Policy(tokenisation="all").one_path_each


def test_tokens_that_finish_an_answer_and_end_it_in_one_are_strays() -> None:
    tokenizer = tiny.byte_level()
    texts = ["y\n", "ay\n\n", "\nM", "M\n", "day\n", "June\n", "Ju\n", "y\n!"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    table = token_bytes(tokenizer)
    for tokenisation in ("canonical", "all"):
        trie, grow = tiny.compile_trie(tokenizer, ["May", "Mayday", "June"], Policy(tokenisation))
        found = {b"".join(table[t] for t in trie.path(n)): {table[t] for t in trie.strays[n]} for n in range(len(trie))}
        expected = {b"": {b"June\n"}, b"M": {b"ay\n\n"}, b"Ma": {b"y\n", b"y\n!"}}
        expected |= {b"May": {b"day\n"}, b"Mayd": {b"ay\n\n"}, b"Mayda": {b"y\n", b"y\n!"}}
        assert {path: strays for path, strays in found.items() if strays} == expected
        if grow is not None:  # such a token isn't followed, so it stays missing from validity and part of the slack
            size = len(trie)
            grow(trie, 0, np.ones(len(tokenizer)))
            assert len(trie) == size
            assert {table[t] for t in trie.strays[0]} == {b"June\n"}


def test_case_variants_of_two_answers() -> None:
    with pytest.raises(DecalError, match="is a case variant of"):
        tiny.compile_trie(tiny.byte_level(), ["Polish", "polish"], Policy(case="any"))


def test_ends_are_the_tokens_that_begin_with_them(bpe: PreTrainedTokenizerFast) -> None:
    table = token_bytes(bpe)
    breaks = {t for t, b in table.items() if b.startswith(b"\n")}
    assert len(breaks) > 1
    assert set(tiny.compile_trie(bpe, MONTHS)[0].ends) == breaks | {bpe.eos_token_id}
    assert tiny.compile_trie(bpe, MONTHS, Policy(ends=("<eos>",)))[0].ends == (bpe.eos_token_id,)
    assert set(tiny.compile_trie(bpe, MONTHS, Policy(ends=("\n", ".")))[0].ends) == breaks | {bpe.get_vocab()["."]}
    assert list(tiny.compile_trie(bpe, MONTHS)[0].ends) == sorted(tiny.compile_trie(bpe, MONTHS)[0].ends)


def test_an_end_no_token_begins_with(bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DecalError, match=r"no token of this model ends an answer with '\\n---'"):
        tiny.compile_trie(bpe, MONTHS, Policy(ends=("\n---",)))


def test_without_ends_no_answer_may_begin_with_another(bpe: PreTrainedTokenizerFast) -> None:
    trie, _ = tiny.compile_trie(bpe, ["May", "June", "Mab"], Policy(ends=()))
    assert trie.ends == ()
    for answers in (MONTHS, ["x", "a b", "a", "ab"]):
        with pytest.raises(DecalError, match=r"without an end, '.*' counts as soon as it is written"):
            tiny.compile_trie(bpe, answers, Policy(ends=()))


@pytest.mark.parametrize(("answer", "end"), [("one\ntwo", "\n"), ("a.b", "."), ("x\n", "\n")])
def test_an_answer_that_contains_an_end(answer: str, end: str) -> None:
    with pytest.raises(DecalError, match="ends an answer, but an answer contains it") as caught:
        tiny.compile_trie(tiny.byte_level(), ["fine", answer], Policy(ends=(end,)))
    assert "\n" not in str(caught.value)


def test_an_answer_the_tokenizer_can_not_write() -> None:
    lower = tiny.byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DecalError, match=r"the tokenizer can't write 'May'; its tokens give 'may'"):
        tiny.compile_trie(lower, ["may", "May"])
    pieces = {"<unk>": 0, "▁": 1, "a": 2}
    backend = Tokenizer(tokenizer_models.BPE(pieces, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    unknown = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    with pytest.raises(DecalError, match="the tokenizer can't write 'ab'"):
        tiny.compile_trie(unknown, ["a", "ab"], Policy(ends=("<eos>",)))


def test_too_many_answers() -> None:
    with pytest.raises(DecalError, match=r"digits: 1000000 answers; exact evaluation .* stops at 200000"):
        tiny.compile_trie(tiny.byte_level(), ValidSet.digits(6))


def test_two_answers_with_the_same_tokens() -> None:
    trie = TokenTrie(2)
    trie.insert([1, 2], 0)
    trie.insert([1, 2], 0)
    assert trie.count == [1, 1, 1]
    with pytest.raises(DecalError, match=re.escape("answers 0 and 1 have the same tokens")):
        trie.insert([1, 2], 1)


def test_levels_and_paths() -> None:
    trie = tiny.trie_of([(1, 2, 3), (1, 4), (5,)])
    assert [[trie.path(n) for n in level] for level in trie.levels()] == [
        [[]],
        [[1], [5]],
        [[1, 2], [1, 4]],
        [[1, 2, 3]],
    ]
