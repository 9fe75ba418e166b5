"""Kept sets against the warpers of transformers, and where decal differs from them on purpose: ties, modes, padding, bans.

In float64 the kept sets are the same. In float32 transformers compares rounded probabilities and sums of up to V of them,
decal float64 ones, so tokens at the very threshold may differ: transformers' kept set must lie between those of the rule with
its parameter moved by 1e-4 of itself either way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from against import alive, check_between, fresh_rows, fresh_texts
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import decal

Warper = Callable[[float], LogitsProcessor]

WARPERS: dict[str, tuple[Warper, tuple[float, ...]]] = {
    "top_k": (TopKLogitsWarper, (1, 3, 50, 400)),
    "top_p": (TopPLogitsWarper, (0.05, 0.5, 0.9, 0.99)),
    "min_p": (MinPLogitsWarper, (0.001, 0.1, 0.5, 0.9)),
    "typical": (TypicalLogitsWarper, (0.05, 0.5, 0.9, 0.99)),
    "epsilon": (EpsilonLogitsWarper, (1e-5, 3e-4, 0.02, 0.6)),
    "eta": (lambda eps: DoubleEta(epsilon=eps), (1e-5, 3e-4, 0.02, 0.6)),
    "top_h": (TopHLogitsWarper, (0.01, 0.2, 0.4, 0.8, 0.99)),
}
RULES = {**decal.RULES, "top_h": lambda alpha: decal.top_h(alpha, variant="cumulative")}
CASES = [(name, value) for name, (_, chosen) in WARPERS.items() for value in chosen]
NO_IDS = torch.zeros(1, 0, dtype=torch.long)


class DoubleEta(EtaLogitsWarper):
    """transformers holds epsilon in float32; here it is compared with probabilities in float64."""

    def __init__(self, epsilon: float):
        super().__init__(epsilon=epsilon)
        self.epsilon = torch.tensor(epsilon, dtype=torch.float64)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_kept_sets_are_the_same_in_float64(name: str, value: float) -> None:
    z = fresh_rows(seed=11)
    ours = RULES[name](value).mask(z)
    theirs = WARPERS[name][0](value)(NO_IDS, z)
    assert torch.equal(alive(ours), alive(theirs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_kept_sets_differ_only_by_rounding_in_float32(name: str, value: float) -> None:
    z = fresh_rows(seed=12).float()
    theirs = alive(WARPERS[name][0](value)(NO_IDS, z))
    ours = alive(RULES[name](value).mask(z))
    if name == "top_k":
        assert torch.equal(ours, theirs)
        return
    one, other = (alive(RULES[name](value * factor).mask(z)) for factor in (1 - 1e-4, 1 + 1e-4))
    check_between(ours, theirs, one, other)


@pytest.mark.parametrize("t", [0.3, 0.7, 1.4, 10.0])
def test_temperature_is_the_same(t: float) -> None:
    z = fresh_rows(seed=13)
    theirs = TemperatureLogitsWarper(t)(NO_IDS, z)
    torch.testing.assert_close(decal.RULES["temperature"](t)(z), theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(decal.RULES["temperature"](t)(z.float()), theirs.float(), rtol=1e-6, atol=0)


def test_a_usual_pipeline_is_the_same() -> None:
    z = fresh_rows(seed=14)
    theirs = z
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(100), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        theirs = warper(NO_IDS, theirs)
    ours = decal.parse("temperature(0.8) | top_k(100) | top_p(0.9) | min_p(0.05)")(z)
    assert torch.equal(alive(ours), alive(theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


# ---- ties


def test_top_p_keeps_ties_that_transformers_splits_by_sort_order() -> None:
    """Three modes of 0.3 and a tail of 0.1: 0.5 needs two of them, which is no reason to drop the third."""
    z = torch.tensor([[0.3, 0.1, 0.3, 0.3]], dtype=torch.float64).log()
    ours = alive(decal.RULES["top_p"](0.5).mask(z))
    theirs = alive(TopPLogitsWarper(0.5)(NO_IDS, z))
    assert ours.tolist() == [[True, False, True, True]]
    assert theirs.sum() == 2
    assert not (theirs & ~ours).any()


def test_top_p_and_transformers_differ_only_in_ties() -> None:
    z = fresh_rows(seed=15, size=300).mul(2).round().div(2)
    for p in (0.3, 0.8, 0.95):
        ours = decal.RULES["top_p"](p).mask(z)
        theirs = alive(TopPLogitsWarper(p)(NO_IDS, z))
        cutoff = torch.where(alive(ours), ours, torch.inf).amin(-1, keepdim=True)
        assert not (theirs & ~alive(ours)).any()
        assert torch.equal(theirs & (z > cutoff), z > cutoff)
        assert (theirs & (z == cutoff)).any(-1).all()
        assert (theirs != alive(ours)).any(), "no row of this test has a tie at its cutoff"


def test_top_k_keeps_ties_as_transformers_does() -> None:
    z = torch.tensor([[1.0, 4.0, 4.0, 5.0, 4.0, 0.0]])
    for k in (1, 2, 3, 4, 5):
        ours, theirs = decal.RULES["top_k"](k).mask(z), TopKLogitsWarper(k)(NO_IDS, z)
        assert torch.equal(ours, theirs)
    assert alive(decal.RULES["top_k"](2).mask(z)).sum() == 4


def test_min_p_keeps_ties_as_transformers_does() -> None:
    z = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.1]], dtype=torch.float64).log()
    assert alive(decal.RULES["min_p"](0.49).mask(z)).tolist() == alive(MinPLogitsWarper(0.49)(NO_IDS, z)).tolist()
    assert alive(decal.RULES["min_p"](0.49).mask(z)).sum() == 4


# ---- the mode


@pytest.mark.parametrize(("name", "value"), [("epsilon", 0.9), ("eta", 0.9999)])
def test_a_threshold_above_every_probability_leaves_the_modes(name: str, value: float) -> None:
    """transformers' epsilon and eta then keep the largest token and what ties with it; so does decal."""
    z = torch.tensor([[1.0, 3.0, 2.0, 3.0]], dtype=torch.float64)
    ours = alive(RULES[name](value).mask(z))
    assert ours.tolist() == [[False, True, False, True]]
    assert torch.equal(ours, alive(WARPERS[name][0](value)(NO_IDS, z)))


@pytest.mark.parametrize("name", ["top_p", "min_p"])
def test_the_strictest_value_leaves_the_mode(name: str) -> None:
    z = fresh_rows(seed=16)
    value = {"top_p": 0.0, "min_p": 1.0}[name]
    ours = alive(RULES[name](value).mask(z))
    assert torch.equal(ours, z == z.amax(-1, keepdim=True))
    assert torch.equal(ours, alive(WARPERS[name][0](value)(NO_IDS, z)))


def test_typical_may_drop_the_mode_as_transformers_does() -> None:
    """A mode of 0.4 over a flat tail: the entropy is that of the tail, and the mode is too predictable."""
    z = torch.tensor([[0.4] + [0.6 / 99] * 99], dtype=torch.float64).log()
    ours = alive(decal.RULES["typical"](0.3).mask(z))
    assert not ours[0, 0]
    assert ours[0, 1:].all()
    assert torch.equal(ours, alive(TypicalLogitsWarper(0.3)(NO_IDS, z)))


def test_top_k_beyond_the_tokens_left_keeps_them_all() -> None:
    z = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    assert torch.equal(decal.RULES["top_k"](3).mask(z), z)
    assert torch.equal(TopKLogitsWarper(3)(NO_IDS, z), z)


# ---- top-H


def test_top_h_keeps_ties_that_transformers_splits_by_sort_order() -> None:
    z = torch.tensor([[0.4, 0.2, 0.2, 0.2]], dtype=torch.float64).log()
    ours = alive(decal.top_h(0.6, variant="cumulative").mask(z))
    theirs = alive(TopHLogitsWarper(0.6)(NO_IDS, z))
    assert ours.all()
    assert theirs.sum() == 2


def test_top_h_at_1_is_off_and_in_transformers_cuts_to_100_tokens() -> None:
    z = fresh_rows(seed=17)[::2]
    ours = decal.top_h(1.0, variant="cumulative").mask(z)
    theirs = alive(TopHLogitsWarper(1.0)(NO_IDS, z))
    assert torch.equal(ours, z)
    # The last of its sums is the entropy itself, computed in another order, so it may or may not reach it.
    assert ((theirs.sum(-1) == 100) | (theirs.sum(-1) == 99)).all()
    assert not (theirs & ~alive(decal.top_k(100).mask(z))).any()


# ---- the tokens so far


@pytest.mark.parametrize("r", [0.7, 1.1, 1.3, 2.0])
def test_the_legacy_repetition_penalty_is_the_same(r: float) -> None:
    z, ids = fresh_rows(seed=18), fresh_texts(seed=18)
    for scope, ignored in (("all", None), ("generated", 25)):
        chain = decal.repetition_penalty(r, form="legacy", scope=scope)
        ours = chain(z, history=decal.History.of(ids, prompt=25))
        assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(r, prompt_ignore_length=ignored)(ids, z))
        assert not torch.equal(ours, z)


def test_the_repetition_penalty_of_padded_rows_is_the_same() -> None:
    """``generate`` tells transformers' processor how much padding each row has."""
    z, ids = fresh_rows(seed=19), fresh_texts(seed=19)
    padding = torch.arange(len(ids)) % 30
    ids = torch.where(torch.arange(ids.shape[1]) < padding[:, None], 1999, ids)
    ours = decal.repetition_penalty(1.3, form="legacy")(z, history=decal.History.of(ids, pad=1999))
    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=padding)(ids, z))
    without = RepetitionPenaltyLogitsProcessor(1.3)(ids, z)
    assert not torch.equal(ours, without), "padding must matter in this test"


def test_tokens_outside_the_logits_are_ignored_as_in_transformers() -> None:
    z, ids = fresh_rows(seed=20, size=500), fresh_texts(seed=20, size=1000)
    assert (ids >= 500).any()
    history = decal.History.of(ids)
    ours = decal.repetition_penalty(1.3, form="legacy")(z, history=history)
    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(1.3)(ids, z))
    assert torch.equal(decal.no_repeat_ngram(1)(z, history=history), NoRepeatNGramLogitsProcessor(1)(ids, z))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_repeat_ngram_bans_the_same(n: int) -> None:
    z, ids = fresh_rows(seed=21), fresh_texts(seed=21)
    ours = decal.no_repeat_ngram(n)(z, history=decal.History.of(ids))
    theirs = NoRepeatNGramLogitsProcessor(n)(ids, z)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, z)


def test_no_repeat_ngram_of_a_short_text_bans_nothing() -> None:
    z = fresh_rows(seed=22)
    for length in (1, 2, 3):
        ids = torch.full((len(z), length), 5)
        ours = decal.no_repeat_ngram(4)(z, history=decal.History.of(ids))
        assert torch.equal(ours, z)
        assert torch.equal(NoRepeatNGramLogitsProcessor(4)(ids, z), z)


def test_no_repeat_ngram_leaves_alone_a_row_that_transformers_empties() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    ids = torch.tensor([[0, 1, 2], [0, 1, 1]])
    ours = decal.no_repeat_ngram(1)(z, history=decal.History.of(ids))
    theirs = NoRepeatNGramLogitsProcessor(1)(ids, z)
    assert not alive(theirs)[0].any()
    assert torch.equal(ours[0], z[0])
    assert torch.equal(ours[1], theirs[1])


def test_no_repeat_ngram_takes_no_padding_for_text_and_transformers_does() -> None:
    """The text 5 0 behind two paddings, which are 0 too: transformers reads 0 0 and 0 5 in them."""
    z, ids = torch.zeros(1, 6), torch.tensor([[0, 0, 5, 0]])
    assert alive(NoRepeatNGramLogitsProcessor(2)(ids, z)).tolist() == [[False, True, True, True, True, False]]
    ours = decal.no_repeat_ngram(2)(z, history=decal.History.of(ids, pad=0))
    assert alive(ours).all()


def test_settings_of_generate_as_a_chain() -> None:
    """Every step of transformers that decal has, as ``generate`` itself builds and orders them."""
    config = GenerationConfig(
        do_sample=True,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        temperature=1.3,
        top_h=0.9,
        top_k=60,
        top_p=0.95,
        min_p=0.01,
        typical_p=0.9,
        epsilon_cutoff=2e-3,
        eta_cutoff=5e-3,
    )
    z, ids = fresh_rows(seed=23), fresh_texts(seed=23)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu")
    chain = decal.from_transformers(config).chain
    assert len(processors) == len(chain.steps) == 10
    theirs = z
    for processor in processors:
        if isinstance(processor, EtaLogitsWarper):
            processor = DoubleEta(epsilon=config.eta_cutoff)
        theirs = processor(ids, theirs)
    ours = chain(z, history=decal.History.of(ids))
    assert torch.equal(alive(ours), alive(theirs))
    assert (alive(ours).sum(-1) > 1).sum() > 20
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
