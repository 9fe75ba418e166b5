"""SGLang's adapter against a miniature of the engine: requests that come, wait, go and overlap; every row by the replay."""

from __future__ import annotations

import random
import subprocess
import sys
import weakref
from array import array
from dataclasses import dataclass, field
from http import HTTPStatus
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from replay import CHAINS, VOCABULARY, law, row
from tiny import byte_level

from decal import Chain, DecalError, parse
from decal.serving import sglang as adapter
from decal.serving.request import Request, beside
from decal.serving.sglang import NEUTRAL, PROCESSOR, Live, request_fields


class Abort:
    """SGLang's FINISH_ABORT."""

    def __init__(self, message: str, status_code: int, err_type: str):
        self.message, self.status_code, self.err_type = message, status_code, err_type


class Base:
    """SGLang's CustomLogitProcessor."""


@dataclass
class Info:
    """SGLang's SamplingBatchInfo, as far as a sampler reads it."""

    custom_logit_processor: dict[int, Any] | None
    custom_params: list[Any]
    has_custom_logit_processor: bool


class Sampler:
    """SGLang's Sampler without settings: it draws from the softmax, and tells log-probabilities."""

    backends: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.told: torch.Tensor | None = None

    def forward(
        self, output: Any, info: Info, logprob: bool, *rest: Any, logprob_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = output.next_token_logits
        if info.has_custom_logit_processor:
            apply(logits, info)
        told = logits if logprob_logits is None else logprob_logits
        self.told = told.log_softmax(-1) if logprob else None
        return self._sample_from_probs(logits.softmax(-1))

    def _sample_from_probs(self, probabilities: torch.Tensor) -> torch.Tensor:
        self.backends.append(CONFIG.sampling_backend)
        return torch.multinomial(probabilities, 1)[:, 0].int()


class Bag(SimpleNamespace):
    """SGLang's configuration."""

    def override(self, **values: Any) -> Any:
        from unittest.mock import patch

        return patch.multiple(self, **values)


CONFIG = Bag(speculative_algorithm=None, disaggregation_mode="null", sampling_backend="decal")


@pytest.fixture(autouse=True)
def miniature(monkeypatch: pytest.MonkeyPatch):
    """SGLang's modules in miniature, and the classes that are made of them."""
    parts: dict[str, dict[str, Any]] = {
        "": {},
        ".srt": {},
        ".srt.managers": {},
        ".srt.managers.schedule_batch": {"FINISH_ABORT": Abort},
        ".srt.runtime_context": {
            "get_spec": lambda: CONFIG,
            "get_disagg": lambda: CONFIG,
            "get_exec": lambda: SimpleNamespace(kernel=CONFIG),
        },
        ".srt.sampling": {},
        ".srt.sampling.custom_logit_processor": {"CustomLogitProcessor": Base},
        ".srt.layers": {},
        ".srt.layers.sampler": {"Sampler": Sampler},
    }
    for name, contents in parts.items():
        module = ModuleType(f"sglang{name}")
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, f"sglang{name}", module)
        if name:
            above, _, last = f"sglang{name}".rpartition(".")
            setattr(sys.modules[above], last, module)
    monkeypatch.setattr(CONFIG, "speculative_algorithm", None)
    monkeypatch.setattr(CONFIG, "disaggregation_mode", "null")
    yield
    for name in ("Processor", "Sampler"):
        adapter.__dict__.pop(name, None)


# ---- the engine


@dataclass(eq=False)
class Asked:
    """SGLang's Req."""

    rid: str
    origin_input_ids: Any
    custom_params: dict[str, Any] | None
    sampling_params: Any = None
    output_ids: Any = field(default_factory=lambda: array("q"))
    kv: Any = field(default_factory=lambda: SimpleNamespace(kv_committed_len=0))
    to_finish: Abort | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.sampling_params is None:
            self.sampling_params = settings()
        if self.custom_params is not None:
            self.params = {**self.custom_params, "__req__": weakref.proxy(self)}
        else:
            self.params = None

    @property
    def request(self) -> Request | None:
        return Request.of(self.custom_params)

    def finished(self) -> bool:
        return False


def settings(**changes: Any) -> SimpleNamespace:
    """SGLang's SamplingParams, without any of its own."""
    off = {name: values[-1] for name, values in NEUTRAL.items()}
    return SimpleNamespace(**{**off, "beam_width": None, "n": 1, "sampling_seed": None, **changes})


def apply(logits: torch.Tensor, info: Info, times: int = 1) -> None:
    """SGLang's apply_custom_logit_processor."""
    for entry in (info.custom_logit_processor or {}).values():
        index = (entry.indices[:, None] * times + torch.arange(times)).flatten()
        params = [info.custom_params[i] for i in entry.rows for _ in range(times)]
        logits.index_copy_(0, index, entry.processor(logits.index_select(0, index), params))


def batch_info(batch: list[Asked], processor: Any) -> Info:
    rows = [row for row, one in enumerate(batch) if one.params is not None]
    entry = SimpleNamespace(processor=processor, rows=rows, indices=torch.tensor(rows, dtype=torch.long))
    return Info({1: entry} if rows else None, [one.params for one in batch], bool(rows))


def newcomer(rng: random.Random, number: int, texts: list[str], seeds: float = 0.5) -> Asked:
    prompt = array("q", [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))])
    kind = rng.randrange(8)
    if kind == 0:
        return Asked(f"r{number}", prompt, None)
    if kind == 1:
        return Asked(f"r{number}", prompt, {"thinking_budget": 3})
    asked: dict[str, Any] = {"decal": rng.choice(texts)}
    if rng.random() < seeds:
        asked["decal_seed"] = rng.randrange(10)
    return Asked(f"r{number}", prompt, asked, settings(sampling_seed=rng.choice([None, rng.randrange(1000)])))


def number_of(one: Asked) -> int:
    """What tells its coins apart: a seed, or the number that decal made of its name."""
    request = one.request
    assert request is not None
    return one.decal_member.number if request.seed is None else request.seed  # type: ignore[attr-defined]


def wanted(one: Asked, output: list[int]) -> torch.Tensor:
    if one.request is None:
        return row([*one.origin_input_ids, *output])
    return law(one.request, list(one.origin_input_ids), output, number_of(one))


@pytest.mark.parametrize("seed", range(12))
def test_every_row_is_what_its_request_is_alone(seed: int):
    rng = random.Random(seed)
    processor = adapter.Processor()
    batch: list[Asked] = []
    waiting: list[Asked] = []
    for step in range(25):
        if rng.random() < 0.4:  # a batch of newcomers is merged into a running one, and has a processor of its own
            processor = adapter.Processor()
        for one in [one for one in batch if rng.random() < 0.15]:
            batch.remove(one)
            if rng.random() < 0.6:  # SGLang needed its memory, and will read its text again
                waiting.append(one)
        while not batch or rng.random() < 0.4:
            back = waiting.pop() if waiting and rng.random() < 0.5 else newcomer(rng, step * 100 + len(batch), CHAINS)
            batch.insert(rng.randrange(len(batch) + 1), back)
        texts = [[*one.origin_input_ids, *one.output_ids] for one in batch]
        parts = [rng.random() < 0.1 for _ in batch]
        for one, text, part in zip(batch, texts, parts, strict=True):
            one.kv.kv_committed_len = rng.randrange(len(text)) if part else len(text)
        logits = torch.cat([row(text) for text in texts])
        before = logits.clone()
        apply(logits, batch_info(batch, processor))
        for place, (one, part) in enumerate(zip(batch, parts, strict=True)):
            assert one.to_finish is None
            if not part:
                torch.testing.assert_close(logits[place : place + 1], wanted(one, list(one.output_ids)), rtol=0, atol=0)
                one.output_ids.append(int(torch.multinomial(logits[place].softmax(-1), 1)))
            elif one.request is not None and (one.request.chain.needs or one.request.seed is not None):
                assert torch.equal(logits[place], before[place])  # of a part of a prompt nothing is drawn


def test_coins_of_a_request_without_a_seed_are_the_same_in_every_process():
    first, again, other = (Asked(rid, [1], {"decal": "xtc(0.1, 0.5)"}) for rid in ("a", "a", "b"))
    sent = Asked("a", [1], {"decal": "xtc(0.1, 0.5)"}, settings(sampling_seed=5))
    for one in (first, again, other, sent):
        one.kv.kv_committed_len = 1
        adapter.Processor()(row([1]), [one.params])
    assert number_of(first) == number_of(again) != number_of(other)
    assert number_of(sent) == 5


@pytest.mark.parametrize("text", CHAINS)
@pytest.mark.parametrize("drawn", [None, 4])
def test_a_token_that_is_not_told_yet_is_not_missed_or_refused(text: str, drawn: int | None):
    asked: dict[str, Any] = {"decal": text} if drawn is None else {"decal": text, "decal_seed": drawn}
    one, other = Asked("late", array("q", [3, 1, 4]), asked), Asked("plain", array("q", [1, 5]), {"decal": "top_k(2)"})
    one.kv.kv_committed_len, other.kv.kv_committed_len = 3, 2
    processor = adapter.Processor()
    logits = torch.cat([row([3, 1, 4]), row([1, 5])])
    apply(logits, batch_info([one, other], processor))
    torch.testing.assert_close(logits[:1], wanted(one, []), rtol=0, atol=0)
    token = int(logits[0].argmax())
    # SGLang runs the next step before it has told the request of the token.
    one.kv.kv_committed_len, other.kv.kv_committed_len = 4, 3
    logits = torch.cat([row([3, 1, 4, token]), row([1, 5, 9])])
    apply(logits, batch_info([one, other], processor))
    torch.testing.assert_close(logits[1:], wanted(other, [9]), rtol=0, atol=0)
    if parse(text).needs:
        assert one.to_finish is not None
        assert one.to_finish.status_code == HTTPStatus.BAD_REQUEST
        assert "--disable-overlap-schedule" in one.to_finish.message
        assert torch.equal(logits[:1], row([3, 1, 4, token]))
    else:
        assert one.to_finish is None
        torch.testing.assert_close(logits[:1], wanted(one, [token]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("asked", "sampling", "message"),
    [
        ({"decal": "min_p(7)"}, {}, "decal: min_p: p must be in"),
        ({"decal_seed": 3}, {}, "decal_seed without a chain"),
        ({"decal_seeds": 3}, {}, "unknown key 'decal_seeds'; did you mean decal_seed"),
        ({"decal": "guided(1)"}, {}, "send decal_answers"),
        ({"decal": "guided(1)", "decal_answers": ["red"]}, {}, "without --skip-tokenizer-init"),
        ({"decal": "top_w(1.0)"}, {}, "reads the model's embeddings"),
        ({"decal": "min_p(0.1)"}, {"temperature": 0.7}, r"temperature=0.7 (send 1) beside the chain min_p(0.1)"),
        ({"decal": "min_p(0.1)"}, {"top_k": 1}, "A temperature of 0 is a top_k of 1 to SGLang"),
        ({"decal": "min_p(0.1)"}, {"top_k": 40}, "top_k=40 (send -1)"),
        ({"decal": "min_p(0.1)"}, {"top_p": 0.9, "repetition_penalty": 1.1}, "repetition_penalty=1.1 (send 1)"),
        ({"decal": "min_p(0.1)", "decal_seed": 3}, {"n": 4}, "n=4 texts with one seed would be the same"),
    ],
)
def test_a_bad_request_ends_alone(asked: dict[str, Any], sampling: dict[str, Any], message: str):
    bad, good = Asked("bad", [1, 2], asked, settings(**sampling)), Asked("good", [3], {"decal": "top_k(3)"})
    bad.kv.kv_committed_len, good.kv.kv_committed_len = 2, 1
    for _ in range(2):
        logits = torch.cat([row([1, 2]), row([3])])
        apply(logits, batch_info([bad, good], adapter.Processor()))
        assert good.to_finish is None
        torch.testing.assert_close(logits[1:], parse("top_k(3)")(row([3])), rtol=0, atol=0)
        assert torch.equal(logits[:1], row([1, 2]))
        assert message in bad.to_finish.message
        assert (bad.to_finish.status_code, bad.to_finish.err_type) == (HTTPStatus.BAD_REQUEST, "BadRequestError")


def test_a_seed_of_the_engine_may_be_large():
    one = Asked("large", array("q", [1]), {"decal": "xtc(0.05, 0.5)"}, settings(sampling_seed=2**64 - 1))
    one.kv.kv_committed_len = 1
    out = adapter.Processor()(row([1]), [one.params])
    torch.testing.assert_close(out, law(one.request, [1], [], -1), rtol=0, atol=0)


def test_guided_follows_the_answers_in_the_engine_s_tokens():
    tokenizer = byte_level(["red green"])
    asked = {"decal": "guided(1)", "decal_answers": ["red", "green"], "decal_seed": 1}
    one = Asked("guided", array("q", tokenizer("a colour:")["input_ids"]), asked, tokenizer=tokenizer)
    given = one.request.given(tokenizer)
    output: list[int] = []
    while not output or output[-1] != tokenizer.eos_token_id:
        text = [*one.origin_input_ids, *output]
        one.kv.kv_committed_len = len(text)
        out = adapter.Processor()(row(text, len(tokenizer)), [one.params])
        want = law(given, list(one.origin_input_ids), output, 1, lambda text: row(text, len(tokenizer)))
        torch.testing.assert_close(out, want, rtol=0, atol=0)
        output.append(int(out.argmax()))
        one.output_ids.append(output[-1])
        assert len(output) <= given.chain.guide.longest
    assert tokenizer.decode(output[:-1]) in ("red", "green")
    assert one.to_finish is None


def test_what_fails_in_a_batch_is_found_row_by_row(monkeypatch: pytest.MonkeyPatch):
    apply_chain = Chain.apply

    def fails(chain: Chain, *args: Any, **kwargs: Any) -> Any:
        if any(0.31 in torch.as_tensor(step.values["p"], dtype=torch.float64).flatten().tolist() for step in chain.steps):
            raise RuntimeError("no such kernel")
        return apply_chain(chain, *args, **kwargs)

    monkeypatch.setattr(Chain, "apply", fails)
    batch = [Asked(str(p), [1, 2], {"decal": f"min_p({p})"}) for p in (0.1, 0.31, 0.2)]
    logits = torch.cat([row([1]), row([2]), row([3])])
    apply(logits, batch_info(batch, adapter.Processor()))
    assert [one.to_finish and one.to_finish.message for one in batch] == [None, "decal: min_p(0.31): no such kernel", None]
    assert batch[1].to_finish.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
    for place, p in ((0, 0.1), (2, 0.2)):
        wanted = apply_chain(parse(f"min_p({p})"), row([place + 1]))[0]
        torch.testing.assert_close(logits[place : place + 1], wanted, rtol=0, atol=0)
    # It has been told, and isn't asked again.
    logits = torch.cat([row([1]), row([2]), row([3])])
    apply(logits, batch_info(batch, adapter.Processor()))
    assert torch.equal(logits[1:2], row([2]))


# ---- speculative decoding, and prompts read elsewhere


@pytest.mark.parametrize(
    ("drafts", "asked", "message"),
    [
        ("EAGLE", {"decal": "min_p(0.1)"}, "by EAGLE SGLang applies no logit processors to its drafts"),
        ("NGRAM", {"decal": "min_p(0.1)"}, "by NGRAM"),
        ("DFLASH", {"decal": "dry(0.8)"}, "doesn't tell logit processors the drafted tokens, which dry"),
        ("DFLASH", {"decal": "mirostat(3.0)"}, "which mirostat"),
        ("DFLASH", {"decal": "min_p(0.1)", "decal_seed": 3}, r"min_p(0.1) with a seed depends on"),
    ],
)
def test_drafts_that_processors_don_t_see_are_refused(
    monkeypatch: pytest.MonkeyPatch, drafts: str, asked: dict[str, Any], message: str
):
    monkeypatch.setattr(CONFIG, "speculative_algorithm", drafts)
    one = Asked("drafted", [1, 2], asked)
    one.kv.kv_committed_len = 2
    assert torch.equal(adapter.Processor()(row([1, 2]), [one.params]), row([1, 2]))
    assert message in one.to_finish.message


def test_drafts_are_done_by_chains_of_the_logits_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CONFIG, "speculative_algorithm", "DFLASH")
    batch = [Asked("a", [1], {"decal": "min_p(0.2)"}), Asked("b", [2], None), Asked("c", [3], {"decal": "top_p(0.5)"})]
    rows = torch.cat([row([place]) for place in range(9)])
    logits = rows.clone()
    apply(logits, batch_info(batch, adapter.Processor()), times=3)
    torch.testing.assert_close(logits[:3], parse("min_p(0.2)")(rows[:3]), rtol=0, atol=0)
    assert torch.equal(logits[3:6], rows[3:6])
    torch.testing.assert_close(logits[6:], parse("top_p(0.5)")(rows[6:]), rtol=0, atol=0)


def test_rows_of_drafts_are_refused_whatever_the_configuration_says():
    one, other = Asked("a", [1], {"decal": "dry(0.8)"}), Asked("b", [1], {"decal": "min_p(0.1)", "decal_seed": 1})
    rows = torch.cat([row([place]) for place in range(6)])
    logits = rows.clone()
    apply(logits, batch_info([one, other], adapter.Processor()), times=3)
    assert torch.equal(logits, rows)
    assert all("the tokens of drafts" in end.to_finish.message for end in (one, other))


def test_a_memory_can_t_pass_to_another_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CONFIG, "disaggregation_mode", "prefill")
    one, other = Asked("a", [1], {"decal": "mirostat(3.0)"}), Asked("b", [1], {"decal": "dry(0.8)"})
    for asked in (one, other):
        asked.kv.kv_committed_len = 1
        adapter.Processor()(row([1]), [asked.params])
    assert "can't pass from a server for prompts" in one.to_finish.message
    assert other.to_finish is None


# ---- decal's sampler, in an engine that overlaps: it tells a request of its tokens one step late


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_the_sampler_draws_what_the_chain_draws_alone(seed: int, late: int):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sampler = adapter.Sampler()
    batch: list[Asked] = []
    outputs: dict[str, list[int]] = {}
    pending: list[tuple[Asked, int]] = []
    for step in range(25):
        for one in [one for one in batch if rng.random() < 0.12]:
            batch.remove(one)
        while not batch or rng.random() < 0.3:
            one = newcomer(rng, step * 100 + len(batch), CHAINS)
            outputs[one.rid] = []
            batch.insert(rng.randrange(len(batch) + 1), one)
        texts = [[*one.origin_input_ids, *outputs[one.rid]] for one in batch]
        for one, text in zip(batch, texts, strict=True):
            one.kv.kv_committed_len = len(text)
        logits = torch.cat([row(text) for text in texts])
        info = batch_info(batch, adapter.Processor())
        logprob = rng.random() < 0.5
        tokens = sampler.forward(SimpleNamespace(next_token_logits=logits), info, logprob, [], [], None)
        assert (sampler.backends[-1], CONFIG.sampling_backend) == ("pytorch", "decal")
        for one, token in pending if late else []:
            one.output_ids.append(token)
        pending = [(one, int(token)) for one, token in zip(batch, tokens, strict=True)]
        for place, (one, token) in enumerate(pending):
            assert one.to_finish is None
            output = outputs[one.rid]
            if one.request is not None:
                number = number_of(one)
                own = Request(one.request.chain, number)
                drawn = law(own, list(one.origin_input_ids), output, number)
                assert token == int(drawn.argmax())
                if sampler.told is not None:
                    scores = law(Request(own.chain), list(one.origin_input_ids), output, number)
                    torch.testing.assert_close(sampler.told[place : place + 1], scores.log_softmax(-1), rtol=0, atol=0)
            elif sampler.told is not None:
                assert torch.equal(sampler.told[place], row(texts[place])[0].log_softmax(-1))
            output.append(token)
            if not late:
                one.output_ids.append(token)


def test_the_sampler_leaves_other_processors_to_sglang():
    def forbid(logits: torch.Tensor, params: Any) -> torch.Tensor:
        logits[:, 1:] = -torch.inf
        return logits

    one, other = Asked("a", [1], {"decal": "top_k(1)"}), Asked("b", [2], {"token_ids": [3]})
    one.kv.kv_committed_len = other.kv.kv_committed_len = 1
    ours = SimpleNamespace(processor=adapter.Processor(), rows=[0], indices=torch.tensor([0]))
    theirs = SimpleNamespace(processor=forbid, rows=[1], indices=torch.tensor([1]))
    info = Info({1: ours, 2: theirs}, [one.params, other.params], True)
    logits = torch.cat([row([1]), row([2])])
    tokens = adapter.Sampler().forward(SimpleNamespace(next_token_logits=logits), info, False, [], [], None)
    assert tokens.tolist() == [int(row([1]).argmax()), 0]
    assert info.custom_logit_processor == {1: ours, 2: theirs}


def test_the_sampler_refuses_a_token_that_it_did_not_draw():
    one = Asked("a", [1], {"decal": "dry(0.8)"})
    one.kv.kv_committed_len = 2
    logits = row([1, 2])
    info = batch_info([one], adapter.Processor())
    adapter.Sampler().forward(SimpleNamespace(next_token_logits=logits), info, False, [], [], None)
    assert "whose last token SGLang doesn't tell" in one.to_finish.message


# ---- the plug-in's look at a request that comes in


def asked_of_server(custom: dict[str, Any] | None, string: str | None = None, **sampling: Any) -> SimpleNamespace:
    params = {"custom_params": custom, **sampling} if custom is not None else sampling
    return SimpleNamespace(custom_logit_processor=string, sampling_params=params)


def test_the_plug_in_admits_what_can_be_done_and_sends_it_to_decal():
    manager = SimpleNamespace(preferred_sampling_params=None)
    asked = asked_of_server({"decal": "min_p(0.1)"}, temperature=1.0, max_new_tokens=5)
    adapter._admit(False, manager, asked, [1, 2])
    assert asked.custom_logit_processor == PROCESSOR
    plain = asked_of_server(None, temperature=0.7)
    adapter._admit(False, manager, plain, [1, 2])
    assert plain.custom_logit_processor is None
    adapter._admit(False, manager, SimpleNamespace(sampling_params=None), [1])  # of embeddings


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (asked_of_server({"decal": "min_p(7)"}), "p must be in"),
        (asked_of_server({"decal": "min_p(0.1)"}, temperature=0), r"temperature=0 \(send 1\)"),
        (asked_of_server({"decal": "min_p(0.1)"}, top_k=20), r"top_k=20 \(send -1\)"),
        (asked_of_server({"decal": "min_p(0.1)", "decal_seed": 1}, n=2), "n=2 texts"),
        (asked_of_server({"decal": "min_p(0.1)"}, beam_width=4), r"beam_width=4 \(send 1\)"),
        (asked_of_server(None, string="other"), "runs no custom logit processor but decal's"),
    ],
)
def test_the_plug_in_refuses_the_rest(asked: Any, message: str):
    with pytest.raises(ValueError, match=message):
        adapter._admit(False, SimpleNamespace(preferred_sampling_params=None), asked, [1])


def test_the_plug_in_looks_at_what_the_server_adds(monkeypatch: pytest.MonkeyPatch):
    manager = SimpleNamespace(preferred_sampling_params={"temperature": 0.6})
    with pytest.raises(DecalError, match=r"temperature=0\.6"):
        adapter._admit(False, manager, asked_of_server({"decal": "min_p(0.1)"}), [1])
    adapter._admit(False, manager, asked_of_server({"decal": "min_p(0.1)"}, temperature=1), [1])
    monkeypatch.setattr(CONFIG, "speculative_algorithm", "EAGLE3")
    with pytest.raises(DecalError, match="by EAGLE3"):
        adapter._admit(False, manager, asked_of_server({"decal": "min_p(0.1)"}, temperature=1), [1])


def test_other_processors_are_let_be_if_the_operator_says_so():
    manager, other = SimpleNamespace(), asked_of_server(None, string="other")
    adapter._admit(True, manager, other, [1])
    assert other.custom_logit_processor == "other"
    with pytest.raises(DecalError, match="would act instead of the chain"):
        adapter._admit(True, manager, asked_of_server({"decal": "min_p(0.1)"}, string="other"), [1])


# ---- clients


def test_fields_of_a_request_switch_the_engine_s_own_settings_off():
    fields = request_fields("min_p(0.1)", seed=3)
    assert fields.pop("custom_logit_processor") == PROCESSOR
    params = fields.pop("sampling_params")
    assert fields == {}
    assert params.pop("custom_params") == {"decal": "min_p(0.1)", "decal_seed": 3}
    assert beside(params, NEUTRAL) == []
    assert set(params) == set(NEUTRAL) - {"beam_width"}
    with pytest.raises(DecalError, match="p must be in"):
        request_fields("min_p(7)")
    assert request_fields("guided(1)", answers=("red", "blue"))["sampling_params"]["custom_params"]["decal_answers"] == [
        "red",
        "blue",
    ]


def test_importing_the_adapter_imports_no_engine():
    code = (
        "import sys, decal.serving.sglang as s\ns.request_fields('min_p(0.1)')\n"
        "print([name for name in ('sglang', 'dill', 'transformers', 'numba') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_sglang_what_needs_it_says_so(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sglang", None)
    for needs in ("Processor", "Sampler"):
        with pytest.raises(DecalError, match=rf"sglang.{needs} needs SGLang"):
            getattr(adapter, needs)
    with pytest.raises(DecalError, match="register needs SGLang"):
        adapter.register()
    with pytest.raises(DecalError, match="Live needs SGLang"):
        Live.start("a/model")
    with pytest.raises(AttributeError, match="no attribute 'processor'"):
        adapter.processor  # noqa: B018


# ---- a live engine's answers


def answer(tokens: list[int], laws: torch.Tensor) -> dict[str, Any]:
    """What /generate gives."""
    lowest = torch.finfo(torch.float32).min
    steps = [sorted(((max(float(v), lowest), i, None) for i, v in enumerate(law)), reverse=True) for law in laws]
    return {"output_ids": tokens, "meta_info": {"output_top_logprobs": steps}}


def test_laws_are_read_from_what_the_engine_tells():
    laws = parse("top_k(5)")(torch.randn(3, VOCABULARY)).log_softmax(-1)
    bodies: list[dict[str, Any]] = []

    def ask(body: dict[str, Any]) -> list[dict[str, Any]]:
        bodies.append(body)
        return [answer([1, 2, 3], laws) for _ in body["input_ids"]]

    live = Live(ask, {}, "0", None, VOCABULARY)
    found = live.write([[place] for place in range(11)], {"decal": "top_k(5)"}, 3, True)
    assert len(found) == 11
    assert [ids for body in bodies for ids in body["input_ids"]] == [[place] for place in range(11)]
    for one in found:
        assert one.tokens == [1, 2, 3]
        torch.testing.assert_close(one.laws, laws, rtol=0, atol=0)
    params = bodies[0]["sampling_params"]
    assert (bodies[0]["custom_logit_processor"], params["custom_params"]) == (PROCESSOR, {"decal": "top_k(5)"})
    assert (params["max_new_tokens"], bodies[0]["top_logprobs_num"]) == (3, VOCABULARY)
    # What the model gives is asked for without a chain, and without a temperature.
    rows = live.rows([[1], [2]])
    assert rows.shape == (6, VOCABULARY)
    assert "custom_logit_processor" not in bodies[-1]
    assert bodies[-1]["sampling_params"]["top_k"] == 1
    assert live.write([[1]], {"decal": "top_k(5)"}, 3, False)[0].laws is None


def test_notes_name_what_may_act_beside_a_chain():
    def notes(**info: Any) -> str:
        quiet = {"enable_custom_logit_processor": True, "disable_overlap_schedule": True, "sampling_defaults": "openai"}
        return "\n".join(Live(lambda body: [], {**quiet, **info}, "0", None, 1).notes())

    assert notes() == ""
    assert "--enable-custom-logit-processor" in notes(enable_custom_logit_processor=False)
    assert "--disable-overlap-schedule" in notes(disable_overlap_schedule=False)
    assert notes(disable_overlap_schedule=False, sampling_backend="decal") == ""
    assert "EAGLE" in notes(speculative_algorithm="EAGLE")
    assert "generation config" in notes(sampling_defaults="model")
    assert "0.6" in notes(preferred_sampling_params={"temperature": 0.6})
