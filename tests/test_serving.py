"""Requests to engines, batches of chains, and both of vLLM's interfaces in miniature."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replay import CHAINS, VOCABULARY, law, row
from tiny import byte_level

from decal import DecalError, ValidSet, parse, split_temperature
from decal.serving.batch import Member, grouped, histories, process
from decal.serving.request import KEYS, MOST_STEPS, NEUTRAL, Request, as_params, beside
from decal.serving.vllm import _Processor, request_fields

# ---- requests


def test_a_request_is_its_chain_and_its_seed():
    request = Request.of({"decal": "temperature(1.3) | min_p(0.1)", "decal_seed": 17, "other": 3})
    assert request == Request(parse("temperature(1.3) | min_p(0.1)"), 17)
    assert Request.of({"decal": parse("min_p(0.1)").to_json()}) == Request(parse("min_p(0.1)"))
    assert Request.of(None) is Request.of({}) is Request.of({"other": 3}) is None
    # JSON that went through another program.
    assert Request.of({"decal": "min_p(0.1)", "decal_seed": 17.0}).seed == 17


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"decal": "min_p(7)"}, r"decal: min_p: p must be in \[0, 1\] \(0 = off\), got 7"),
        ({"decal": "minp(0.1)"}, "did you mean min_p"),
        ({"decal": 3}, "the chain is a text"),
        ({"decal": None}, "the chain is a text"),
        ({"decal": "min_p([0.1, 0.2])"}, "one value for each parameter, got a list of 2"),
        ({"decal": " | ".join(["min_p(0.1)"] * (MOST_STEPS + 1))}, f"may have {MOST_STEPS} steps, got {MOST_STEPS + 1}"),
        ({"decal": "best_of_k(4, coverage=1.0, steps=1001)"}, "may ask for 1000 steps, got 1001"),
        ({"decal": f"xtc(0.1, 0.5, spared=({2**70},))"}, "which is no token of any model"),
        ({"decal": "mirostat(3) | mirostat(3) | mirostat(3)"}, "may have 2 steps with a memory, got 3"),
        ({"decal": "guided(1)", "decal_answers": ["a" * 60_000, "b" * 60_000]}, "may have 100000 characters in all"),
        ({"decal_seeds": 3}, "unknown key 'decal_seeds'; did you mean decal_seed"),
        ({"decal_seed": 3}, "decal_seed without a chain"),
        ({"decal": "min_p(0.1)", "decal_seed": 0.5}, "decal_seed must be a whole number"),
        ({"decal": "min_p(0.1)", "decal_seed": True}, "decal_seed must be a whole number"),
        ({"decal": "min_p(0.1)", "decal_seed": float("inf")}, "decal_seed must be a whole number"),
        ({"decal": "min_p(0.1)", "decal_seed": 2**63}, r"below 2\*\*63"),
        ({"decal": "min_p(0.1)", "decal_seed": "3"}, "got '3'"),
        ({"decal": "guided(1)"}, "send decal_answers"),
        ({"decal": "top_w(1.0)"}, "reads the model's embeddings, which an engine doesn't give"),
        ({"decal": "ensemble(0.5)"}, "reads other prompts, which an engine doesn't give"),
        ({"decal": "split_temperature(2, 0.5)"}, r"reads the tokens that end a text; write their ids into it, such as ends="),
        ({"decal": "min_p(0.1)", "decal_answers": ["red"]}, "no step of min_p"),
        ({"decal": "guided(1)", "decal_answers": "red"}, "must be a list of texts, got 'red'"),
        ({"decal": "guided(1)", "decal_answers": []}, "is empty"),
        ({"decal": "guided(1)", "decal_answers": ["red", "red"]}, "given twice"),
        ({"decal": "guided(1)", "decal_answers": ["red", 3]}, "must be a list of texts"),
        ({"decal": "guided(1)", "decal_answers": list(map(str, range(10_001)))}, "may have 10000 answers, got 10001"),
        ({"decal": "guided(1)", "decal_regex": "a|b"}, "unknown key 'decal_regex'"),
    ],
)
def test_a_request_that_can_t_be_done_is_refused_by_the_name_of_its_key(params: dict[str, Any], message: str):
    with pytest.raises(DecalError, match=message):
        Request.of(params)


def test_a_client_sends_what_the_server_reads():
    chain = parse("temperature(1.3) | guided(0.5)")
    params = as_params(chain, seed=4, answers=("red", "green"))
    assert params == {"decal": str(chain), "decal_seed": 4, "decal_answers": ["red", "green"]}
    assert set(params) == set(KEYS)
    request = Request.of(params)
    assert (request.chain, request.seed, request.answers) == (chain, 4, ("red", "green"))
    with pytest.raises(DecalError, match="min_p"):
        as_params("min_p(7)")


def test_a_regular_expression_is_listed_by_the_client():
    assert sorted(as_params("guided(1)", regex="[ab]c?")["decal_answers"]) == ["a", "ac", "b", "bc"]
    schema = ValidSet.from_json_schema({"enum": ["x", 3]})
    assert sorted(as_params("guided(1)", answers=schema)["decal_answers"]) == ['"x"', "3"]
    with pytest.raises(DecalError, match="a request may have 10000 answers, got 1000000000000"):  # not listed before
        as_params("guided(1)", answers=ValidSet.digits(12))
    for regex, message in (("a*", "infinite"), ("[a-z]{3}", "may have 10000 answers, got 17576"), ("(", "regex")):
        with pytest.raises(DecalError, match=message):
            as_params("guided(1)", regex=regex)
    with pytest.raises(DecalError, match="answers and regex: give one of them"):
        as_params("guided(1)", regex="a", answers=["a"])


def test_answers_are_in_the_tokens_of_the_engine_s_model():
    tokenizer = byte_level(["red green"])
    request = Request.of({"decal": "guided(1)", "decal_answers": ["red", "green"]}).given(tokenizer)
    again = Request.of({"decal": "guided(0.5)", "decal_answers": ["red", "green"]}).given(tokenizer)
    assert request.chain.guide is again.chain.guide  # worked out once, and so rows of one group
    assert sorted(map(len, tokenizer(["red", "green"])["input_ids"])) == sorted({request.chain.guide.longest - 1, 3})


def test_settings_that_act_beside_a_chain_are_named_with_what_to_send():
    assert beside({"temperature": 0.7, "top_p": 1.0, "top_k": 40}) == ["temperature=0.7 (send 1)", "top_k=40 (send 0)"]
    assert beside(SimpleNamespace(temperature=1.0, top_k=-1, min_p=0.0, frequency_penalty=None)) == []
    for name, values in NEUTRAL.items():
        assert all(beside({name: value}) == [] for value in values)
        assert len(beside({name: 0.5})) == 1


# ---- batches


def random_requests(rng: random.Random, count: int) -> list[Request | None]:
    made: list[Request | None] = []
    for _ in range(count):
        kind = rng.randrange(5)
        if kind == 0:
            text = f"temperature({rng.uniform(0.3, 2):.3f}) | top_k({rng.randrange(1, 9)}) | min_p({rng.uniform(0, 0.3):.3f})"
        elif kind == 1:
            text = f"repetition_penalty({rng.uniform(1, 2):.2f}) | mirostat({rng.uniform(0.5, 4):.2f})"
        else:
            text = rng.choice(CHAINS)
        seed = {"decal_seed": rng.randrange(10)} if rng.random() < 0.5 else {}
        made.append(None if rng.random() < 0.1 else Request.of({"decal": text, **seed}))
    return made


def test_requests_whose_texts_end_otherwise_are_apart():
    z = torch.randn(4, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = [(1, 2), (3,), (1, 2), (4, 5, 6)]
    for told in (True, False):
        chains = [
            split_temperature(2.0, 0.5).for_ends(e) if told else split_temperature(2.0 + i, 0.5, e) for i, e in enumerate(ends)
        ]
        groups = grouped([Member(Request(chain, None), i) for i, chain in enumerate(chains)])
        assert sorted(group.rows.tolist() for group in groups) == [[0, 2], [1], [3]]
        out = process(z.clone(), groups, lambda group: None, lambda group: histories(group, [((), ())] * len(group.rows)))
        for i, chain in enumerate(chains):
            torch.testing.assert_close(out[i], chain(z[i : i + 1])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_a_batch_are_what_each_is_alone(seed: int):
    rng = random.Random(seed)
    requests = random_requests(rng, rng.choice([1, 2, 7, 40]))
    members = [
        request and Member(request, request.seed if request.seed is not None else 100 + i) for i, request in enumerate(requests)
    ]
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 9))] for _ in requests]
    rows = torch.cat([row(prompt) for prompt in prompts])
    groups = grouped(members)
    assert sorted(r for group in groups for r in group.rows.tolist()) == [i for i, m in enumerate(members) if m]

    def lengths(group: Any) -> torch.Tensor:
        return torch.tensor([[len(prompts[r])] for r in group.rows.tolist()])

    out = process(
        rows.clone(), groups, lengths, lambda group: histories(group, [(prompts[r], ()) for r in group.rows.tolist()])
    )
    for i, member in enumerate(members):
        want = rows[i : i + 1] if member is None else law(member.request, prompts[i], (), member.number)
        torch.testing.assert_close(out[i : i + 1], want, rtol=0, atol=0)


def test_chains_with_the_same_rules_are_one_group():
    texts = [f"temperature({t}) | min_p({p})" for t in (0.5, 1, 2) for p in (0, 0.1)] + ["min_p(0.1) | temperature(2)"] * 2
    assert [len(group.members) for group in grouped([Member.of(Request.of({"decal": text})) for text in texts])] == [6, 2]
    # Words and tables are the same for all rows of a chain.
    texts = ["top_h(0.4)", "top_h(0.4, variant='cumulative')", "top_h(0.3)"]
    assert sorted(len(group.members) for group in grouped([Member.of(Request.of({"decal": text})) for text in texts])) == [1, 2]


def test_a_request_without_a_seed_has_a_number_of_its_own():
    request = Request.of({"decal": "xtc(0.1, 0.5)"})
    assert len({Member.of(request).number for _ in range(100)}) == 100
    assert Member.of(request, seed=5).number == 5
    assert Member.of(Request.of({"decal": "xtc(0.1, 0.5)", "decal_seed": 7}), seed=5).number == 7


# ---- vLLM in miniature: engines that add, drop, pause, move and reorder requests, and compare every row with the replay


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


@dataclass
class Running:
    """A request in the engine."""

    params: SimpleNamespace
    prompt: list[int]
    output: list[int] = field(default_factory=list)

    @property
    def request(self) -> Request | None:
        return Request.of(self.params.extra_args)

    @property
    def text(self) -> list[int]:
        return self.prompt + self.output


def config(**changes: Any) -> SimpleNamespace:
    model = SimpleNamespace(logits_processors=["decal.serving.vllm:Processor"], get_vocab_size=lambda: VOCABULARY)
    return SimpleNamespace(model_config=model, scheduler_config=SimpleNamespace(async_scheduling=False, **changes))


def newcomer(rng: random.Random) -> Running:
    request = random_requests(rng, 1)[0]
    asked = None if request is None else as_params(request.chain, request.seed)
    # Without a seed of its own decal's coins go by the engine's.
    params = SimpleNamespace(extra_args=asked, seed=rng.randrange(1000), **{name: off[0] for name, off in NEUTRAL.items()})
    _Processor.validate_params(params)
    return Running(params, [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))])


def check_row(out: torch.Tensor, one: Running, output: list[int]) -> None:
    request = one.request
    if request is None:
        torch.testing.assert_close(out, row(one.prompt + output), rtol=0, atol=0)
    else:
        number = one.params.seed if request.seed is None else request.seed
        torch.testing.assert_close(out, law(request, one.prompt, output, number), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_the_first_interface_follows_requests_through_the_batch(seed: int):
    rng = random.Random(seed)
    processor = _Processor(config(), torch.device("cpu"), False)
    batch: list[Running | None] = []
    paused: list[Running] = []
    for _ in range(40):
        removed, added, moved = [], [], []
        for slot, one in enumerate(batch):
            if one is not None and rng.random() < 0.12:
                removed.append(slot)
                if rng.random() < 0.6:
                    paused.append(one)
                batch[slot] = None
        while rng.random() < 0.45 or not any(batch):
            comer = paused.pop(rng.randrange(len(paused))) if paused and rng.random() < 0.5 else newcomer(rng)
            # A request comes back with a list of its own, into any free slot or a new one.
            comer = Running(comer.params, comer.prompt, list(comer.output))
            free = [slot for slot, one in enumerate(batch) if one is None] + [len(batch)]
            slot = rng.choice(free)
            batch[slot : slot + 1] = [comer]
            added.append((slot, comer.params, comer.prompt, comer.output))
        for slot in [slot for slot, one in enumerate(batch) if one is None]:
            last = max(slot for slot, one in enumerate(batch) if one is not None)
            if slot < last:
                moved.append((last, slot, Direction.UNIDIRECTIONAL))
                batch[slot], batch[last] = batch[last], None
        batch = [one for one in batch if one is not None]
        if len(batch) > 1 and rng.random() < 0.3:
            one, other = rng.sample(range(len(batch)), 2)
            moved.append((one, other, Direction.SWAP))
            batch[one], batch[other] = batch[other], batch[one]
        changed = removed or added or moved
        update = SimpleNamespace(batch_size=len(batch), removed=removed, added=added, moved=moved) if changed else None
        processor.update_state(update)
        out = processor.apply(torch.cat([row(one.text) for one in batch]))
        for slot, one in enumerate(batch):
            check_row(out[slot : slot + 1], one, one.output)
            if rng.random() < 0.9:  # else its prompt is still being read
                probabilities = out[slot].softmax(-1)
                one.output.append(int(torch.multinomial(probabilities, 1)))


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_second_interface_follows_requests_through_slots_and_drafts(seed: int, drafts: int):
    rng = random.Random(seed)
    slots, longest = 6, 200
    tokens = torch.full((slots, longest), -7, dtype=torch.int32)
    prompt_len = torch.zeros(slots, dtype=torch.int32)
    tables = SimpleNamespace(
        device=torch.device("cpu"), all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(gpu=prompt_len)
    )
    processor = _Processor(config(), tables)
    held: dict[int, Running] = {}
    paused: list[Running] = []
    for _ in range(40):
        for slot in list(held):
            if rng.random() < 0.12:
                one = held.pop(slot)
                tokens[slot] = -7
                if rng.random() < 0.6:
                    paused.append(one)
        while len(held) < slots and (rng.random() < 0.6 or not held):
            one = paused.pop() if paused and rng.random() < 0.5 else newcomer(rng)
            slot = rng.choice([slot for slot in range(slots) if slot not in held])
            assert processor.add_request(slot, one.params) is (one.request is not None)
            held[slot] = one
            prompt_len[slot] = len(one.prompt)
            tokens[slot, : len(one.text)] = torch.tensor(one.text)
        processor.apply_staged_writes()
        order = rng.sample(sorted(held), len(held))
        rows: list[tuple[int, int, list[int]]] = []  # slot, place among its own, drafts so far
        for slot in order:
            guess: list[int] = []
            rows.append((slot, 0, []))
            for place in range(1, rng.randrange(drafts + 1) + 1 if held[slot].output else 1):
                guess = [*guess, rng.randrange(VOCABULARY)]
                rows.append((slot, place, guess))
        texts = [held[slot].text + guess for slot, _, guess in rows]
        context = SimpleNamespace(
            expanded_idx_mapping=torch.tensor([slot for slot, *_ in rows], dtype=torch.int32),
            idx_mapping_np=np.array(order, dtype=np.int32),
            expanded_local_pos=torch.tensor([place for _, place, _ in rows], dtype=torch.int32),
            input_ids=torch.tensor([text[-1] for text in texts], dtype=torch.int32),
            pos=torch.tensor([len(text) - 1 for text in texts]),
        )
        out = processor.apply(torch.cat([row(text) for text in texts]), context)
        for place, (slot, _, guess) in enumerate(rows):
            check_row(out[place : place + 1], held[slot], held[slot].output + guess)
        for slot in order:
            one = held[slot]
            own = [place for place, (of, *_) in enumerate(rows) if of == slot]
            accepted = rng.randrange(len(own))
            drawn = int(torch.multinomial(out[own[accepted]].softmax(-1), 1))
            one.output += [*rows[own[accepted]][2], drawn]
            tokens[slot, : len(one.text)] = torch.tensor(one.text)


def test_engine_settings_beside_a_chain_are_refused_when_a_request_is_admitted():
    neutral = {name: off[0] for name, off in NEUTRAL.items()}
    for name in NEUTRAL:
        params = SimpleNamespace(extra_args={"decal": "min_p(0.1)"}, seed=None, **{**neutral, name: 0.5})
        with pytest.raises(ValueError, match=rf"would apply {name}=0.5 \(send {neutral[name]}\) beside the chain min_p"):
            _Processor.validate_params(params)
        params.extra_args = None
        _Processor.validate_params(params)


def test_fields_of_a_request_switch_the_engine_s_own_settings_off():
    fields = request_fields("min_p(0.1)", seed=3)
    assert fields.pop("vllm_xargs") == {"decal": "min_p(0.1)", "decal_seed": 3}
    assert beside(fields) == []
    assert set(fields) == set(NEUTRAL)


def test_a_plug_in_that_would_not_see_the_tokens_refuses_to_start():
    asynchronous = SimpleNamespace(
        model_config=SimpleNamespace(logits_processors=None), scheduler_config=SimpleNamespace(async_scheduling=True)
    )
    with pytest.raises(DecalError, match="--no-async-scheduling"):
        _Processor(asynchronous, torch.device("cpu"), False)


def test_a_request_that_was_refused_too_late_ends_and_others_go_on(caplog: pytest.LogCaptureFixture):
    processor = _Processor(config(), torch.device("cpu"), False)
    processor._config.hf_text_config = SimpleNamespace(eos_token_id=[7, 9])
    processor._tokenizer = "no tokenizer"
    bad = SimpleNamespace(extra_args={"decal": "guided(1)", "decal_answers": ["red"]}, seed=1)
    good = SimpleNamespace(extra_args={"decal": "min_p(0.1)"}, seed=1)
    update = SimpleNamespace(removed=[], added=[(0, bad, [1], []), (1, good, [2], [])], moved=[])
    processor.update_state(update)
    assert "a request ends without a word" in caplog.text
    out = processor.apply(torch.cat([row([1]), row([2])]))
    assert out[0].isfinite().nonzero().tolist() == [[7]]
    torch.testing.assert_close(out[1:], parse("min_p(0.1)")(row([2])), rtol=0, atol=0)


def test_memories_of_requests_that_left_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("decal.serving.batch.KEPT", 20 * VOCABULARY * 8)
    processor = _Processor(config(), torch.device("cpu"), False)
    params = SimpleNamespace(extra_args={"decal": "mirostat(3.0)"}, seed=1)
    for number in range(50):
        update = SimpleNamespace(removed=[0] if number else [], added=[(0, params, [number % VOCABULARY], [number])], moved=[])
        processor.update_state(update)
        processor.apply(row([number]))
    assert len(processor._rested._places) == 20


def test_a_seed_of_the_engine_may_be_large():
    processor = _Processor(config(), torch.device("cpu"), False)
    params = SimpleNamespace(extra_args={"decal": "xtc(0.1, 0.5)"}, seed=2**64 - 1)
    processor.update_state(SimpleNamespace(removed=[], added=[(0, params, [1], [])], moved=[]))
    assert processor.apply(row([1])).isfinite().any()


def test_a_request_whose_place_is_taken_by_another_keeps_its_memory():
    processor = _Processor(config(), torch.device("cpu"), False)
    params = SimpleNamespace(extra_args={"decal": "mirostat(3.0, 0.9)"}, seed=1)
    plain, output = SimpleNamespace(extra_args=None, seed=2), []
    processor.update_state(SimpleNamespace(removed=[], added=[(0, params, [1, 2], output), (1, plain, [3], [])], moved=[]))
    for token in (7, 8, 9, 17, 22):
        processor.apply(torch.cat([row([1, 2, *output]), row([3])]))
        output.append(token)
    # Paused: the other moves to its place, which is all that is told.
    processor.update_state(SimpleNamespace(removed=[], added=[], moved=[(1, 0, Direction.UNIDIRECTIONAL)]))
    processor.update_state(SimpleNamespace(removed=[], added=[(1, params, [1, 2], list(output))], moved=[]))
    out = processor.apply(torch.cat([row([3]), row([1, 2, *output])]))
    torch.testing.assert_close(out[1:], law(Request.of(params.extra_args), [1, 2], output, 1), rtol=0, atol=0)


def test_coins_are_the_same_in_any_group_and_on_every_rank():
    texts = ["xtc(0.05, 0.0) | xtc(0.05, 0.5)", "xtc(0.05, 0.3) | xtc(0.05, 0.5)"]  # the first step of one is off
    params = [SimpleNamespace(extra_args={"decal": text}, seed=None) for text in texts]
    for number in range(40):
        prompts = [[number] * (1 + number % 7), [number]]
        params[0].seed = number if number % 2 else None
        outs = []
        for count in (1, 2, 2):
            processor = _Processor(config(), torch.device("cpu"), False)
            added = [(i, params[i], prompts[i], []) for i in range(count)]
            processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
            outs.append(processor.apply(torch.cat([row(prompts[i]) for i in range(count)])))
        assert torch.equal(outs[0][0], outs[1][0])
        assert torch.equal(outs[1], outs[2])


def test_a_chain_is_applied_once_where_a_plug_in_brings_the_class_again():
    whole = config()
    both = [_Processor(whole, torch.device("cpu"), False) for _ in range(2)]
    params = SimpleNamespace(extra_args={"decal": "temperature(2.0)"}, seed=1)
    out = row([1])
    for processor in both:
        processor.update_state(SimpleNamespace(removed=[], added=[(0, params, [1], [])], moved=[]))
        out = processor.apply(out)
    torch.testing.assert_close(out, row([1]) / 2)


@pytest.mark.parametrize(
    ("asked", "setting", "message"),
    [
        ({"decal": "min_p(0.1)"}, {"thinking_token_budget": 100}, "thinking_token_budget forces tokens behind the chain min_p"),
        ({"decal": "guided(1)", "decal_answers": ["a"]}, {"min_tokens": 2}, "min_tokens=2 bans the end of answers"),
    ],
)
def test_what_would_force_or_ban_tokens_against_the_chain_is_refused(
    asked: dict[str, Any], setting: dict[str, int], message: str
):
    with pytest.raises(DecalError, match=message):
        _Processor.validate_params(SimpleNamespace(extra_args=asked, **setting))
    _Processor.validate_params(SimpleNamespace(extra_args={"decal": "min_p(0.1)"}, min_tokens=2))
    _Processor.validate_params(SimpleNamespace(extra_args=None, **setting))


def test_a_memory_that_is_lost_is_told(caplog: pytest.LogCaptureFixture):
    processor = _Processor(config(), torch.device("cpu"), False)
    params = SimpleNamespace(extra_args={"decal": "mirostat(3.0)"}, seed=1)
    processor.update_state(SimpleNamespace(removed=[], added=[(0, params, [1], [2, 3])], moved=[]))
    processor.apply(row([1, 2, 3]))
    assert "1 requests go on without what mirostat(3.0, 0.1) remembered" in caplog.text


def test_another_processor_takes_over_where_the_first_is_gone():
    whole = config()
    first, second = (_Processor(whole, torch.device("cpu"), False) for _ in range(2))
    assert (first._idle, second._idle) == (False, True)
    del first
    assert not second._idle


def test_several_answers_with_one_seed_are_refused():
    params = SimpleNamespace(extra_args={"decal": "min_p(0.1)", "decal_seed": 3}, n=4, seed=None)
    with pytest.raises(DecalError, match="n=4 texts with one seed would be the same"):
        _Processor.validate_params(params)
    params.n = 1
    _Processor.validate_params(params)


def test_importing_an_adapter_imports_no_engine():
    names = ["vllm", "sglang", "llama_cpp", "mlx", "lm_eval", "transformers", "numba", "triton"]
    code = f"import sys, decal.serving.vllm\nprint([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_vllm_its_class_says_so():
    import decal.serving.vllm as adapter

    if "vllm" in sys.modules:
        pytest.skip("vLLM is here")
    with pytest.raises(DecalError, match="needs vLLM"):
        adapter.Processor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'processor'"):
        adapter.processor  # noqa: B018
