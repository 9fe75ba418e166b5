"""Decoding along valid answers: exactly uniform at strength 1, always valid, and the formula in between."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chisquare

import decal
from decal import DecalError, guided
from decal.eval import estimate, exact, grid
from decal.samplers.chain import notes
from decal.samplers.guided import Guide
from decal.samplers.trie import Policy
from decal.samplers.valid_set import ValidSet
from decal.serving.request import as_params

ANSWERS = ["red", "green", "greenish", "blue", "light blue", "light green", "light red", "violet"]
TOKENIZER = tiny.byte_level(ANSWERS, merges=14)


def written(chain: decal.Chain, count: int, seed: int = 0) -> list[str]:
    """Texts that a random model writes."""
    model = tiny.llama(len(TOKENIZER), dtype=torch.float32)
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    prompt = torch.tensor([TOKENIZER.encode("colour: ")]).expand(count, -1)
    torch.manual_seed(seed)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt),
        **chain.generate_kwargs(pad_token_id=TOKENIZER.pad_token_id),
    )  # fmt: skip
    return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in out[:, prompt.shape[1] :]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.05])
def test_every_answer_is_valid_and_at_strength_1_equally_probable(seed, strength):
    rng = np.random.default_rng(seed)
    trie = tiny.trie_of(tiny.random_answers(rng, range(2, 20), 4, 40), (0, 1))
    logits = tiny.random_rows(rng, trie, 30, spread=4.0)
    found = exact.evaluate(trie, tiny.blocks(logits), [guided(strength), decal.temperature(1.7) | guided(strength)])
    np.testing.assert_allclose(found.validity, 1, rtol=0, atol=1e-12)
    if strength == 1:
        np.testing.assert_allclose(found.answers, 1 / 40, rtol=1e-12)
        np.testing.assert_allclose(found.diversity, 1, rtol=1e-12)


def test_the_formula():
    """Against counting by hand, with one token that ends an answer and two that do."""
    rng = np.random.default_rng(3)
    answers = tiny.random_answers(rng, range(2, 9), 3, 25)
    for ends in ((0,), (0, 1)):
        guide = Guide(tiny.trie_of(answers, ends))
        chain = guided(0.3).for_answers(guide)
        prefixes = sorted({a[:n] for a in answers for n in range(len(a) + 1)})
        z = torch.from_numpy(rng.normal(0, 3, (len(prefixes), 12)))
        history = decal.History.of([[7, 3, *p] for p in prefixes], prompt=2)
        got = chain(z, history=history).softmax(-1).numpy()
        for row, prefix in enumerate(prefixes):
            behind = np.array([sum(a[: len(prefix) + 1] == (*prefix, t) for a in answers) for t in range(12)], dtype=float)
            if prefix in answers:
                behind[list(ends)] = 1 / len(ends)
            p = tiny.softmax(z[row].numpy())
            wanted = np.where(behind > 0, p**0.7 * behind**0.3, 0)
            np.testing.assert_allclose(got[row], wanted / wanted.sum(), atol=1e-12)


def test_in_short_floats():
    """The logarithm of 1e43 answers, about 99, would have two digits behind it rounded away."""
    chain = guided(1).for_answers(ValidSet.from_regex("a[a-z]{30}|b[a-m][a-z]{29}|c[a-m][a-z]{29}"), TOKENIZER)
    history = decal.History.of([[5]], prompt=1)
    for kind, precise in ((torch.bfloat16, 0.004), (torch.float16, 0.001)):
        got = chain(torch.zeros(1, len(TOKENIZER), dtype=kind), history=history)
        assert got.dtype == kind
        law = got.double().softmax(-1)[0]
        for letter, wanted in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
            here = sum(law[t].item() for t in range(len(TOKENIZER)) if TOKENIZER.decode([t]).startswith(letter))
            assert here == pytest.approx(wanted, abs=precise)


def test_where_no_answer_is_left_the_row_is_left_alone():
    chain = decal.top_k(1) | guided(1).for_answers(Guide(tiny.trie_of([(1,), (2, 3)], (0,))))
    assert "put that first" in "".join(notes(chain))
    z = torch.tensor([[0.0, 1.0, 2.0, 9.0]] * 3)
    history = decal.History.of([[5], [5, 2], [5, 3]], prompt=1)  # the cut spares no answer; spares one; the text is none
    assert chain.mask(z, history=history).isfinite().tolist() == [[False, False, False, True]] * 3
    free = guided(1).for_answers(chain.guide)
    kept = free.mask(z, history=history).isfinite().tolist()
    assert kept == [[False, True, True, False], [False, False, False, True], [True] * 4]


def test_uniform_through_generate():
    """50,000 texts; this fails for one seed in ten thousand where nothing is wrong."""
    chain = guided(1).for_answers(ANSWERS, TOKENIZER)
    texts = list(itertools.chain(*(written(chain, 5000, seed) for seed in range(10))))
    counts = [texts.count(answer) for answer in ANSWERS]
    assert sum(counts) == 50_000
    assert chisquare(counts).pvalue > 1e-4


def test_between_the_model_and_uniform():
    """Validity stays 1, and the answers get more even."""
    spread = []
    for strength in (0.1, 0.5, 0.9):
        texts = written(guided(strength).for_answers(ANSWERS, TOKENIZER), 2000)
        counts = np.array([texts.count(answer) for answer in ANSWERS])
        assert counts.sum() == 2000
        spread.append(counts.std())
    assert spread[0] > spread[1] > spread[2]
    assert guided(0).steps[0].is_off


def test_an_answer_that_ended_with_a_line_break_is_followed_by_the_end():
    texts = written(guided(1).for_answers(["red", "green"], TOKENIZER, ends=["\n"], leading_space=True), 20)
    assert set(texts) == {" red\n", " green\n"}


def test_sets_of_any_kind_and_seeds():
    chain = guided(1).for_answers(ValidSet.from_regex("[1-3][0-5]?"), TOKENIZER)
    model = tiny.llama(len(TOKENIZER), dtype=torch.float32)
    prompt = torch.tensor([TOKENIZER.encode("number: ")]).expand(40, -1)
    wanted = chain.generate_kwargs(seeds=list(range(40)), pad_token_id=TOKENIZER.pad_token_id)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in out[:, prompt.shape[1] :]]
    assert all(text in ValidSet.from_regex("[1-3][0-5]?") for text in texts)
    assert len(set(texts)) > 10


def test_what_goes_wrong_is_said():
    with pytest.raises(DecalError, match="for_answers"):
        guided(0.5)(torch.zeros(1, 4), history=decal.History.of([[1]]))
    with pytest.raises(DecalError, match="for_answers"):
        guided(0.5).generate_kwargs()
    with pytest.raises(DecalError, match="list of texts"):
        guided().for_answers("red", TOKENIZER)
    with pytest.raises(DecalError, match="empty"):
        guided().for_answers([], TOKENIZER)
    with pytest.raises(DecalError, match="tokenizer"):
        guided().for_answers(["red"])
    one, other = (guided().for_answers(words, TOKENIZER) for words in (["red"], ["blue"]))
    with pytest.raises(DecalError, match="different answers"):
        one | other
    with pytest.raises(DecalError, match="the valid answers, which an estimate can't give"):
        estimate.check([decal.temperature(2) | guided(0.5)])
    with pytest.raises(DecalError, match="non-empty string"):
        guided().for_answers(["red", ""], TOKENIZER)
    for answers in ({"enum": ["red"]}, type("Model", (), {"model_json_schema": None})):
        with pytest.raises(DecalError, match=r"ValidSet\.from_json_schema"):
            guided().for_answers(answers, TOKENIZER)
        with pytest.raises(DecalError, match=r"ValidSet\.from_json_schema"):
            as_params("guided(1)", answers=answers)
    for answers in (None, 7, b"red"):
        with pytest.raises(DecalError, match="answers are a list of texts"):
            guided().for_answers(answers, TOKENIZER)
    for ends in (None, [3], "<eos>"):
        with pytest.raises(DecalError, match="ends are a list of texts"):
            guided().for_answers(["red"], TOKENIZER, ends=ends)
    with pytest.raises(DecalError, match="surrogate"):
        guided().for_answers(["r\ud800"], TOKENIZER)
    with pytest.raises(DecalError, match="got the string 'abc'"):
        ValidSet.from_list("abc")
    assert guided().for_answers(ValidSet.digits(6), TOKENIZER).guide.trie.size == 10**6  # too many to list
    with pytest.raises(DecalError, match="ends are a list"):
        guided().for_answers(["red"], TOKENIZER, ends="<eos>")
    with pytest.raises(DecalError, match="put guided"):
        decal.min_p(0.1).for_answers(["red"], TOKENIZER)
    with pytest.raises(DecalError, match="another tokenizer"):
        one(torch.zeros(1, 20), history=decal.History.of([[1]]))
    with pytest.raises(DecalError, match="the longest answer takes"):
        one.generate_kwargs(max_new_tokens=1)
    again = copy.deepcopy(one)
    assert again == one
    assert again.guide.trie.size == 1


def test_answers_without_an_end_are_followed_by_the_end_of_the_text():
    texts = written(guided(1).for_answers(["red", "blue"], TOKENIZER, ends=()), 50)
    assert set(texts) == {"red", "blue"}


def test_spellings_of_all_kinds_are_no_reason_to_fail():
    """Grown spellings have nodes behind which nothing is counted."""
    trie, grow = tiny.compile_trie(TOKENIZER, ["red", "green"], Policy(tokenisation="all", threshold=1e-9))
    history = []
    for node in range(len(trie)):
        grow(trie, node, np.full(len(TOKENIZER), 0.5))
        history.append(trie.path(node))
    assert len(trie) > trie.count[0] + 4
    chain = guided(0.5).for_answers(Guide(trie))
    z = torch.zeros(len(trie), len(TOKENIZER))
    every = [[1, *trie.path(node)] for node in range(len(trie))]
    assert chain(z, history=decal.History.of(every, prompt=1)).isfinite().any(-1).all()


def test_who_knows_the_answers_is_no_contender(tmp_path):
    (tmp_path / "grid").write_text("temperature({0.7, 1.0})\nmin_p(0.1) | guided({0.5, 1.0})\n")
    families = [s.family for s in grid.load(str(tmp_path / "grid"))]
    assert families[-2:] == ["oracle: min_p | guided"] * 2
    assert not any("guided" in s.family or "ensemble" in s.family for s in grid.load("all"))


def test_nothing_is_written_behind_the_end_when_the_model_has_another():
    model = tiny.llama(len(TOKENIZER), dtype=torch.float32)
    model.generation_config.eos_token_id = 7
    prompt = torch.tensor([TOKENIZER.encode("colour: ")]).expand(30, -1)
    chain = guided(1).for_answers(ANSWERS, TOKENIZER)
    for kwargs in (chain.generate_kwargs(max_new_tokens=25), chain.generate_kwargs(eos_token_id=7, max_new_tokens=25)):
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
        texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in out[:, prompt.shape[1] :]]
        assert set(texts) <= set(ANSWERS)
        assert len(set(texts)) > 4


def test_the_longest_answer_has_room():
    for answers, ends in ((ANSWERS, ["<eos>"]), (["red", "green"], ["\n"]), (["red", "blue"], [])):
        chain = guided(1).for_answers(answers, TOKENIZER, ends=ends)
        longest = max(len(TOKENIZER.encode(a)) for a in answers)
        assert chain.guide.longest == longest + 1 + (ends == ["\n"])
        assert chain.generate_kwargs(max_new_tokens=chain.guide.longest)["eos_token_id"] == [TOKENIZER.eos_token_id]
        assert chain.generate_kwargs()["max_new_tokens"] == chain.guide.longest
    for name, value in {"max_length": 40, "stop_strings": ["e"], "min_new_tokens": 3, "min_length": 3, "max_time": 0.1}.items():
        with pytest.raises(DecalError, match=f"{name} would end an answer in the middle, or go on behind it"):
            chain.generate_kwargs(**{name: value})
