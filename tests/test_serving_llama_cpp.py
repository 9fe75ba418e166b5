"""llama.cpp's adapter without llama.cpp: processors called as llama-cpp-python calls them, and fields of requests."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replay import CHAINS, VOCABULARY, law, row
from tiny import byte_level

import decal
from decal import DecalError, parse
from decal.kernels import dispatch
from decal.serving import llama_cpp
from decal.serving.request import Request
from decal.serving.single import BACK, Follower

TABLE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `completion_kwargs` takes from llama-cpp-python."""
    made = SimpleNamespace(LogitsProcessorList=type("L", (list,), {}), StoppingCriteriaList=type("S", (list,), {}))
    monkeypatch.setitem(sys.modules, "llama_cpp", made)
    return made


def step(kwargs: dict[str, Any], text: list[int], drafts: int = 0) -> np.ndarray:
    """A step of llama-cpp-python: logits are a column of a table; exceptions of processors are lost, not those of criteria."""
    table = np.zeros(VOCABULARY, TABLE).view(np.recarray)
    table.logit[:] = row(text)[0].numpy()
    ids = np.array([*text, *[0] * drafts], np.intc)
    for processor in kwargs["logits_processor"]:
        try:
            table.logit[:] = processor(ids, table.logit)
        except BaseException:
            break
    assert not any(criterion(ids[: len(text)], table.logit) for criterion in kwargs.get("stopping_criteria", ()))
    return table.logit.copy()


def generate(kwargs: dict[str, Any], prompt: list[int], seed: int, length: int = 12) -> Iterator[tuple[list[int], np.ndarray]]:
    """Texts with the scores that the next token is drawn from."""
    rng, text = np.random.default_rng(seed), list(prompt)
    for _ in range(length):
        scores = step(kwargs, text)
        yield list(text), scores
        p = np.exp(scores - scores.max(), dtype=np.float64)
        text.append(int(rng.choice(VOCABULARY, p=p / p.sum())))


def number_of(processor: llama_cpp.Processor) -> int:
    group = processor.follower._group
    return 0 if group is None else group.members[0].number


def check(processor: llama_cpp.Processor, prompt: list[int], text: list[int], scores: np.ndarray) -> None:
    with dispatch.use("reference"):
        want = law(processor.follower.request, prompt, text[len(prompt) :], number_of(processor))
    assert np.array_equal(np.isneginf(scores), want[0].isneginf().numpy())
    np.testing.assert_allclose(scores, want[0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 17])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_step_is_what_the_chain_makes_of_it(lib: Any, chain: str, seed: int | None) -> None:
    for turn in range(3):
        kwargs = llama_cpp.completion_kwargs(chain, seed=seed)
        (processor,) = kwargs["logits_processor"]
        prompt = np.random.default_rng(turn).integers(VOCABULARY, size=1 + turn).tolist()
        for text, scores in generate(kwargs, prompt, turn):
            check(processor, prompt, text, scores)


def test_answers_are_followed_to_their_end(lib: Any) -> None:
    tokenizer = byte_level(["red green"])
    answers, prompt, found = ["red", "green", "reed"], [5, 7], []
    for seed in range(40):
        kwargs = llama_cpp.completion_kwargs("guided(1.0)", answers=answers, tokenizer=tokenizer, seed=seed)
        follower, text = kwargs["logits_processor"][0].follower, list(prompt)
        assert kwargs["max_tokens"] == follower.request.chain.guide.longest
        while text[-1] != tokenizer.eos_token_id:
            text.append(int(follower(row(text, len(tokenizer)), text).argmax()))
        assert len(text) - len(prompt) <= kwargs["max_tokens"]
        found.append(tokenizer.decode(text[len(prompt) : -1]))
    assert set(found) == set(answers)


def test_a_new_text_begins_afresh_and_a_text_that_falls_back_is_known() -> None:
    """A random walk over texts: on, back by some tokens, or to another one."""
    rng = random.Random(3)
    for chain in (
        "mirostat(3.0)",
        "dry(0.8, 1.75, 1) | xtc(0.1, 0.5) | min_p(0.02)",
        "presence_penalty(1.5)",
        "risk_budget(0.8)",
    ):
        request = Request.of({"decal": chain})
        follower, kinds = Follower(request), {"on": 0, "back": 0, "new": 0}
        prompt, text = [1, 2, 3], [1, 2, 3]
        for _ in range(150):
            out = follower(row(text), np.array(text))
            assert follower._group is not None
            want = law(request, prompt, text[len(prompt) :], follower._group.members[0].number)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
            kind = rng.choices(list(kinds), [10, 3, 1])[0]
            if kind == "new" or len(text) == len(prompt):
                if kind != "on":
                    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))]
                    prompt = [prompt[0] + VOCABULARY, *prompt] if prompt == text[: len(prompt)] else prompt
                    prompt = [t % VOCABULARY for t in prompt]
                    text, kind = list(prompt), "new"
                    follower.reset()
                else:
                    text = [*text, rng.randrange(VOCABULARY)]
            elif kind == "back":
                kept = rng.randrange(max(len(prompt), len(text) - BACK // 2), len(text))
                text = [*text[:kept], rng.randrange(VOCABULARY)]
            else:
                text = [*text, int(out.softmax(-1).multinomial(1))]
            kinds[kind] += 1
        assert min(kinds.values()) > 3


def test_a_text_that_does_not_go_on_is_new_without_being_told() -> None:
    request = Request.of({"decal": "presence_penalty(5) | mirostat(2.0)"})
    follower = Follower(request)
    for text in ([1, 2], [1, 2, 3], [1, 2, 3, 4]):
        follower(row(text), text)
    for other in ([7, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1]):  # another text, one that goes on by two, and one before the prompt
        torch.testing.assert_close(follower(row(other), other), law(request, other, (), 0), rtol=1e-5, atol=1e-6)
        assert follower._prompt == len(other)


def test_a_text_that_was_forgotten_begins_afresh() -> None:
    request = Request.of({"decal": "mirostat(2.0)"})
    follower, text = Follower(request), [1]
    for token in range(2, BACK + 12):
        follower(row(text), text)
        text.append(token % VOCABULARY)
    assert follower._group is not None
    assert len(follower._group.members[0].places) == BACK
    early = text[:4]
    torch.testing.assert_close(follower(row(early), early), law(request, early, (), 0), rtol=1e-5, atol=1e-6)


def test_a_bias_comes_before_the_chain(lib: Any) -> None:
    bias = {3: 4.0, "5": -2.5, 7: -math.inf}
    kwargs = llama_cpp.completion_kwargs("min_p(0.1)", logit_bias=bias)
    assert "logit_bias" not in kwargs
    for number in range(20):
        z = row([number]).clone()
        for token, value in bias.items():
            z[0, int(token)] += value
        with dispatch.use("reference"):
            want = parse("min_p(0.1)")(z)
        np.testing.assert_array_equal(step(kwargs, [number]), want[0].numpy())
        assert step(kwargs, [number])[7] == -np.inf


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ([3], "a mapping of token ids"),
        ({"x": 1}, "the token 'x'"),
        ({-1: 1}, "the token -1"),
        ({True: 1}, "the token True"),
        ({3: "1"}, "finite or -inf, got '1'"),
        ({3: math.inf}, "finite or -inf, got inf"),
        ({3: math.nan}, "finite or -inf, got nan"),
    ],
)
def test_a_bias_that_is_none(bias: Any, message: str) -> None:
    with pytest.raises(DecalError, match=message):
        llama_cpp.processor("min_p(0.1)", logit_bias=bias)


def test_contiguous_scores_are_not_copied_and_stay_as_they_are() -> None:
    scores = row([1])[0].numpy()
    before = scores.copy()
    out = llama_cpp.processor("top_k(3)")(np.array([1], np.intc), scores)
    assert (out > -np.inf).sum() == 3
    np.testing.assert_array_equal(scores, before)


def test_an_error_leaves_nothing_to_draw_and_comes_out_of_the_stopping_criterion(lib: Any) -> None:
    kwargs = llama_cpp.completion_kwargs("min_p(0.1)", logit_bias={VOCABULARY: 1.0})
    with pytest.raises(DecalError, match=f"logit_bias has the token {VOCABULARY}, the model {VOCABULARY} tokens"):
        step(kwargs, [1])
    scores = row([1])[0].numpy()
    with pytest.raises(DecalError, match="logit_bias has the token"):
        kwargs["logits_processor"][0](np.array([1], np.intc), scores)
    assert np.isneginf(scores).all()


def test_an_interrupt_is_not_lost(lib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    kwargs = llama_cpp.completion_kwargs("min_p(0.1)")
    monkeypatch.setattr(kwargs["logits_processor"][0], "follower", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(kwargs, [1])


def test_drafts_that_may_be_rejected_are_refused_where_the_text_matters(lib: Any) -> None:
    for chain, seed in (("mirostat(3.0)", None), ("presence_penalty(1.0)", None), ("min_p(0.1)", 4)):
        kwargs = llama_cpp.completion_kwargs(chain, seed=seed)
        step(kwargs, [1, 2])
        with pytest.raises(DecalError, match="draft_model"):
            step(kwargs, [1, 2, 3], drafts=2)
    kwargs = llama_cpp.completion_kwargs("min_p(0.1)")
    check(kwargs["logits_processor"][0], [1, 2, 3], [1, 2, 3], step(kwargs, [1, 2, 3], drafts=2))


def test_arguments(lib: Any) -> None:
    def ban(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores[:40] = -np.inf
        return scores

    kwargs = llama_cpp.completion_kwargs("top_k(3)", max_tokens=9, top_k=0, logits_processor=[ban], tfs_z=1.0)
    assert type(kwargs["logits_processor"]) is lib.LogitsProcessorList
    assert type(kwargs["stopping_criteria"]) is lib.StoppingCriteriaList
    assert kwargs["max_tokens"] == 9
    assert {name: kwargs[name] for name in llama_cpp.NEUTRAL} == {name: off[0] for name, off in llama_cpp.NEUTRAL.items()}
    assert "seed" not in kwargs
    kept = np.flatnonzero(step(kwargs, [1]) > -np.inf)
    assert len(kept) == 3
    assert kept.min() >= 40
    assert "stopping_criteria" not in llama_cpp.completion_kwargs("top_k(3)", chat=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.7}, r"temperature=0.7 \(send 1\) would act beside the chain min_p"),
        ({"top_k": 40, "min_p": 0.05}, r"top_k=40 \(send 0\), min_p=0.05"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"mirostat_mode": 2}, "mirostat_mode"),
        ({"tfs_z": 0.9}, "tfs_z=0.9"),
        ({"grammar": "x"}, "grammar brings a grammar"),
        ({"response_format": {"type": "json_object"}}, "response_format brings a grammar"),
        ({"tools": []}, "tools brings"),
        ({"chat": True, "stopping_criteria": [len]}, "takes no stopping_criteria"),
        ({"answers": ["a"]}, "no step of min_p"),
    ],
)
def test_what_would_act_beside_the_chain_is_refused(lib: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DecalError, match=message):
        llama_cpp.completion_kwargs("min_p(0.1)", **kwargs)


def test_refusals(lib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DecalError, match="answers need the model's tokenizer"):
        llama_cpp.processor("guided(1)", answers=["red"])
    with pytest.raises(DecalError, match="longest answer takes 4 tokens, got max_tokens=2"):
        llama_cpp.completion_kwargs("guided(1)", answers=["red"], tokenizer=byte_level(), max_tokens=2)
    with pytest.raises(DecalError, match="did you mean min_p"):
        llama_cpp.processor("minp(0.1)")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(DecalError, match="needs llama-cpp-python"):
        llama_cpp.completion_kwargs("min_p(0.1)")
    with pytest.raises(DecalError, match="needs llama-cpp-python"):
        llama_cpp.Live.start("model.gguf")


# ---- fields of a server's request


def random_chain(rng: random.Random) -> decal.Chain:
    """Of what llama.cpp has, in any order."""
    number = lambda low, high: round(rng.uniform(low, high), 3)  # noqa: E731
    window = rng.randrange(1, 200)
    penalties = [
        decal.repetition_penalty(number(0.5, 2), window=window, form="legacy"),
        decal.frequency_penalty(number(-1, 2), window=window, scope="all"),
        decal.presence_penalty(number(-1, 2), window=window, scope="all"),
    ]
    cuts = [
        [chain for chain in penalties if rng.random() < 0.6] or penalties,
        [decal.dry(number(0.1, 4), number(1, 3), rng.randrange(1, 6), window=rng.randrange(1, 300))],
        [decal.top_n_sigma(number(0.1, 3))],
        [decal.top_k(rng.randrange(1, 300))],
        [decal.typical(number(0.1, 0.99))],
        [decal.top_p(number(0.1, 0.99))],
        [decal.min_p(number(0.001, 0.9))],
        [decal.xtc(number(0.01, 0.5), number(0.1, 1))],
        [
            rng.choice(
                [decal.temperature(number(0, 3)), decal.dynamic_temperature(number(0, 2), number(0.1, 1), number(0.5, 2))]
            )
        ],
    ]
    if rng.random() < 0.1:
        mirostat = decal.mirostat(number(0.5, 7), number(0.01, 0.5), version=rng.choice("12"))
        return decal.temperature(number(1.1, 3)) | mirostat if rng.random() < 0.5 else mirostat
    groups = rng.sample(cuts, rng.randrange(1, len(cuts) + 1))
    if rng.random() < 0.2:
        groups.append([decal.adaptive_p(number(0, 1), number(0, 0.99))])
    steps = [step for group in groups for chain in group for step in chain.steps if not step.is_off]
    return decal.Chain(tuple(steps or decal.top_k(3).steps))


def test_fields_and_chains_are_inverses_of_each_other() -> None:
    rng, done, wrong = random.Random(5), 0, []
    for _ in range(1500):
        chain = random_chain(rng)
        if "typical" in (names := [step.rule.name for step in chain.steps]) or "dynamic_temperature" in names:
            # Behind what leaves tokens at -inf llama.cpp gets these two wrong.
            try:
                llama_cpp.request_fields(chain)
            except DecalError as error:
                wrong.append(str(error))
                continue
        done += 1
        fields, _ = llama_cpp.request_fields(chain)
        sent = json.loads(json.dumps(fields))
        assert decal.from_llama_cpp(sent).chain == chain
        assert decal.from_llama_cpp({"samplers": list("edskypmxt"), **sent}).chain == chain
    assert done > 1000
    assert len(wrong) > 20
    assert all("behind t" in error and "at -inf" in error for error in wrong)


def test_everything_that_is_not_in_the_chain_is_switched_off() -> None:
    """Whatever a server has by default."""
    fields, report = llama_cpp.request_fields("temperature(1.0)")
    assert fields.pop("samplers") == []
    assert report == ()
    order = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "adaptive_p"]
    assert str(decal.from_llama_cpp({"samplers": order, **fields}).chain) == "temperature(1.0)"
    back = decal.from_llama_cpp({"samplers": order, **fields, "top_k": 3})
    assert str(back.chain) == "top_k(3)"


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("flatten(0.7)", r"flatten\(0.7\): llama.cpp has no such sampler; .*temperature\(1 / \(1 - strength\)\)"),
        ("min_p(0.1) | eta(0.01)", r"eta\(0.01\): llama.cpp has no such sampler"),
        ("repetition_penalty(1.2)", 'say form="legacy"'),
        ("repetition_penalty(1.2, 0, 'all', 'legacy')", "say window=, or context="),
        ("presence_penalty(0.5, 64)", 'say scope="all"'),
        ("presence_penalty(0.5, 64, 'all') | frequency_penalty(0.5, 32, 'all')", "one window, and an earlier one has 64"),
        ("presence_penalty(0.5, 64, 'all') | min_p(0.1) | frequency_penalty(0.5, 64, 'all')", "stand together"),
        ("presence_penalty(0.5, 64, 'all') | repetition_penalty(1.2, 64, 'all', 'legacy')", "one repetition_penalty, then"),
        ("presence_penalty(0.5, 64, 'all') | presence_penalty(0.5, 64, 'all')", "penalties are one"),
        ("dry(0.8)", "say window="),
        ("dry(0.8, 1.75, 2, 64, (5,))", "pass tokenizer="),
        ("xtc(0.1, 0.5, 7)", "say seed=0"),
        ("xtc(0.1, 0.5, 0, (3,))", "spares no tokens"),
        ("xtc(0.1, 0.5) | xtc(0.1, 0.5)", "one coin"),
        ("adaptive_p(0.5) | min_p(0.1)", "must come last"),
        ("min_p(0.1) | mirostat(3.0)", r"min_p\(0.1\): llama.cpp runs nothing beside mirostat"),
        ("mirostat(3.0) | temperature(0.7)", "nothing beside mirostat"),
        ("min_p(0.1) | temperature(2.0) | min_p(0.2)", r"one setting for all min_p steps, and an earlier one has"),
        ("temperature(0.7) | dynamic_temperature(0.7, 0.2)", "one setting for all temperature"),
        ("top_n_sigma(1.0) | typical(0.9)", "NaN entropy"),
        ("temperature(0.0) | typical(0.9)", "NaN entropy"),
        ("top_n_sigma(1.0) | top_k(50) | dynamic_temperature(1.0, 0.5)", "counts the tokens"),
        ("top_n_sigma(0.0)", "at 0 it is off in llama.cpp"),
        ("top_p(0.99999999999)", "float32"),
        ("min_p(1e-60)", "float32"),
        ("min_p([0.1, 0.2])", "one value for each parameter"),
    ],
)
def test_what_llama_cpp_can_t_do_is_said_step_by_step(chain: str, message: str) -> None:
    with pytest.raises(DecalError, match=message):
        llama_cpp.request_fields(chain)


def test_steps_can_be_left_out() -> None:
    fields, report = llama_cpp.request_fields("top_k(20) | flatten(0.7) | eta(0.01) | temperature(0.7)", partial=True)
    assert decal.from_llama_cpp(fields).chain == parse("top_k(20) | temperature(0.7)")
    assert [line.partition(":")[0] for line in report] == ["top_k", "flatten(0.7)", "eta(0.01)"]
    assert report[1].endswith("left out")
    fields, report = llama_cpp.request_fields("min_p(0.1) | temperature(0.7) | mirostat(3.0)", partial=True)
    assert decal.from_llama_cpp(fields).chain == parse("temperature(0.7) | mirostat(3.0)")
    assert len(report) == 2


def test_what_differs_is_reported() -> None:
    def report(chain: str, **kwargs: Any) -> str:
        return "\n".join(llama_cpp.request_fields(chain, **kwargs).report)

    assert "tied at the cutoff" in report("top_p(0.9)")
    assert (
        report("min_p(0.1) | temperature(0.7)") == report("top_n_sigma(1.0) | min_p(0.1) | dynamic_temperature(1, 0.5)") == ""
    )
    assert "coins are its own" in report("xtc(0.1, 0.5)")
    assert "does nothing" in report("xtc(0.6, 0.5)")
    assert "one of the most probable" in report("temperature(0.0)")
    assert "after the cut" in report("mirostat(3.0)")
    assert "rounds" in report("mirostat(3.0, 0.1, '1')")
    assert "plain temperature" in report("dynamic_temperature(1.2, 0.0)")
    assert "4096 tokens" in report("repetition_penalty(1.2, 0, 'all', 'legacy')", context=4096)
    swapped = llama_cpp.request_fields("presence_penalty(0.5, 9, 'all') | frequency_penalty(0.25, 9, 'all')")
    assert "no difference" in "\n".join(swapped.report)
    assert str(decal.from_llama_cpp(swapped.fields).chain).startswith("frequency_penalty(0.25")
    with pytest.raises(DecalError, match="context must be a number of tokens"):
        llama_cpp.request_fields("min_p(0.1)", context=0)


def test_a_step_that_stands_twice_with_the_same_values_is_sent_twice() -> None:
    chain = parse("min_p(0.1) | temperature(2.0) | min_p(0.1)")
    fields = llama_cpp.request_fields(chain).fields
    assert fields["samplers"] == ["min_p", "temperature", "min_p"]
    assert decal.from_llama_cpp(fields).chain == chain


def test_breakers_as_texts() -> None:
    tokenizer = byte_level(["a:\n b: c\n\nd::e \n", "so:: so:\n sole"] * 4, merges=30)
    for texts in (["\n"], ["\n", ":"], ["so"], ["b", " "]):
        tokens = decal.tokens_with(tokenizer, *texts)
        chain = decal.dry(0.8, window=100, breakers=tokens)
        fields, report = llama_cpp.request_fields(chain, tokenizer=tokenizer)
        assert decal.from_llama_cpp(fields, tokenizer=tokenizer).chain == chain
        assert any("several tokens" in line for line in report) == ("so" in texts)
    # A token that others contain can't be told apart from them.
    chain = decal.dry(0.8, window=100, breakers=tuple(tokenizer.encode(":")))
    assert len(decal.tokens_with(tokenizer, ":")) > 1
    with pytest.raises(DecalError, match="no texts are contained in its breakers and in no other token"):
        llama_cpp.request_fields(chain, tokenizer=tokenizer)
