"""Chains in mlx-lm itself, on a random model and on the default one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay import CHAINS
from tiny import byte_level, llama
from torch import Tensor

import decal
from decal import DecalError, History
from decal.kernels import dispatch
from decal.serving.engine import Written
from decal.serving.mlx_lm import Live, batch_kwargs, generate_kwargs, sampler
from decal.serving.verify import verify

pytestmark = pytest.mark.mlx

ANSWERS = ["red", "green", "reed"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A random Llama, or the model in the folder DECAL_MLX."""
    folder = os.environ.get("DECAL_MLX")
    if not folder:
        folder = str(tmp_path_factory.mktemp("model"))
        tokenizer = byte_level(["the red and the green", "once upon a time"], merges=40)
        llama(len(tokenizer), seed=3, dtype=torch.float32, spread=0.3).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Live.start(folder)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import mlx.core as mx

    mx.random.seed(0)  # MLX begins elsewhere in every process


class Spy:
    """A logits processor that notes what mlx-lm shows."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], Tensor]] = []

    def __call__(self, tokens: Any, logits: Any) -> Any:
        self.seen.append((np.array(tokens).tolist(), torch.from_numpy(np.array(logits))))
        return logits


def wanted(processor: Any, prompt: list[int], steps: list[tuple[list[int], Tensor]]) -> list[Tensor]:
    """What the chain makes of the rows, in plain torch: log-probabilities, of the token drawn with a seed."""
    request, group, found = processor.follower.request, processor.follower._group, []
    chain, state = request.chain, request.chain.init(1)
    number = 0 if group is None else group.members[0].number
    with dispatch.use("reference"):
        for place, (text, row) in enumerate(steps):
            assert text[: len(prompt)] == prompt
            history = History.of([text], prompt=len(prompt), request=[number])
            scores, seen = chain.apply(row, state, history=history)
            if request.seed is not None:
                drawn = chain.sample(row, request.seed, len(text), state=state, history=history)
                scores = torch.full_like(row, -torch.inf).scatter_(1, drawn[:, None], 0.0)
            found.append(scores[0].log_softmax(-1))
            if place < len(steps) - 1:
                state = chain.observe(state, seen, torch.tensor([steps[place + 1][0][-1]]))
    return found


def check(processor: Any, spy: Spy, prompt: list[int], tokens: list[int], laws: list[Tensor]) -> None:
    # mlx-lm works one step ahead.
    for token, theirs, ours in zip(tokens, laws, wanted(processor, prompt, spy.seen), strict=False):
        assert torch.equal(theirs.isneginf(), ours.isneginf())
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert ours[token] > -torch.inf
        if processor.follower.request.seed is not None:
            assert token == int(ours.argmax())
    assert len(tokens) == len(laws) <= len(spy.seen)


@pytest.mark.parametrize("seed", [None, 17])
@pytest.mark.parametrize("chain", CHAINS)
def test_generate_step(live: Live, chain: str, seed: int | None) -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    prompt, spy = live.tokenizer.encode("once upon the red"), Spy()
    kwargs = generate_kwargs(chain, seed=seed, logits_processors=[spy], max_tokens=8)
    steps = list(generate_step(mx.array(prompt), live._model, **kwargs))
    tokens, laws = [int(token) for token, _ in steps], [torch.from_numpy(np.array(law)) for _, law in steps]
    assert len(tokens) == 8
    check(kwargs["logits_processors"][-1], spy, prompt, tokens, laws)


def test_a_batch_of_chains(live: Live) -> None:
    """Prompts of different lengths, that end at different times, more than are prefilled at once."""
    from mlx_lm.generate import BatchGenerator

    prompts = [live.tokenizer.encode("once upon a time the red and"[: 3 + 2 * n]) for n in range(len(CHAINS))]
    seeds = [n if n % 2 else None for n in range(len(CHAINS))]
    kwargs, spies = batch_kwargs(CHAINS, seeds=seeds), [Spy() for _ in CHAINS]
    processors = [own for (own,) in kwargs["logits_processors"]]
    kwargs["logits_processors"] = [[spy, own] for spy, own in zip(spies, processors, strict=True)]
    generator = BatchGenerator(live._model, prefill_batch_size=4, completion_batch_size=6)
    numbers = generator.insert(prompts, max_tokens=[4 + n % 5 for n in range(len(CHAINS))], **kwargs)
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    laws: dict[int, list[Tensor]] = {number: [] for number in numbers}
    while found := generator.next_generated():
        for one in found:
            tokens[one.uid].append(one.token)
            laws[one.uid].append(torch.from_numpy(np.array(one.logprobs)))
    generator.close()
    for place, number in enumerate(numbers):
        assert len(tokens[number]) == 4 + place % 5
        check(processors[place], spies[place], prompts[place], tokens[number], laws[number])


def test_answers(live: Live) -> None:
    asked = {"decal": "guided(1.0)", "decal_answers": ANSWERS}
    prompt = live.tokenizer.encode("once")
    written = [live.write([prompt] * 5, {**asked, "decal_seed": seed}, 9, False) for seed in range(12)]
    found = [live.tokenizer.decode(one.tokens[:-1]) for batch in written for one in batch]
    assert set(found) == set(ANSWERS)
    assert {one.tokens[-1] for batch in written for one in batch} == {live.tokenizer.eos_token_id}


def test_text_of_generate(live: Live) -> None:
    import mlx_lm
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapped = TokenizerWrapper(live.tokenizer)
    kwargs = generate_kwargs("guided(1.0)", answers=ANSWERS, tokenizer=wrapped, seed=2)
    assert mlx_lm.generate(live._model, wrapped, "the", **kwargs) in ANSWERS


def test_drafts_where_only_logits_matter(live: Live) -> None:
    """A chain that reads no text is right with a draft model; what is shown of the text is not all of it."""
    import mlx.core as mx
    from mlx_lm.generate import speculative_generate_step

    prompt, spy = mx.array(live.tokenizer.encode("once upon the red")), Spy()
    with pytest.raises(DecalError, match="draft_model"):
        generate_kwargs("dry(0.8)", draft_model=live._model)
    kwargs = generate_kwargs("top_k(3)", logits_processors=[spy], max_tokens=20)
    steps = list(speculative_generate_step(prompt, live._model, live._model, **kwargs))
    assert len(steps) == 20
    for token, law, _ in steps:
        law = torch.from_numpy(np.array(law))
        assert int(law.isfinite().sum()) == 3
        assert law[token] > -torch.inf
    assert max(len(text) for text, _ in spy.seen) <= 20 + 3, "it shows the prompt now: say so, and allow it"
    assert min(len(text) for text, _ in spy.seen) == 1 < len(prompt)


def test_a_sampler(live: Live) -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    prompt = live.tokenizer.encode("once upon the red")
    text, chain = list(prompt), "temperature(1.3) | top_k(5)"
    drawn = sampler(chain, seed=9, position=len(prompt))
    for token, logprobs in generate_step(mx.array(prompt), live._model, sampler=drawn, max_tokens=6):
        row = torch.from_numpy(np.array(logprobs))[None]
        assert int(token) == int(decal.parse(chain).sample(row, 9, len(text)))
        text.append(int(token))


def test_verify(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[Written]] = []

    def write(prompts: list[list[int]], asked: dict[str, Any], length: int, laws: bool) -> list[Written]:
        texts = Live.write(live, prompts, asked, length, laws)
        told.extend([texts] if laws else [])
        return texts

    monkeypatch.setattr(live, "write", write)
    report = verify(live, CHAINS, ["once upon", "the red and the", "a"], generations=6, length=4, draws=30)
    assert report.ok, str(report)
    steps = [finding.steps for finding in report.findings if "xtc" not in finding.chain]
    # A text that reaches its end has fewer than four tokens.
    assert steps == [sum(len(text.tokens) for text in texts) for texts in told]
    assert all(12 <= size <= 24 for size in steps)


def test_the_example_runs(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    tokenizer = byte_level(["red green"], template="{% for m in messages %}{{ m.content }}{% endfor %}")
    llama(len(tokenizer), dtype=torch.float32, spread=0.3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "mlx_lm_generate.py"))
    example["main"](str(tmp_path))
    assert len(capsys.readouterr().out.splitlines()) >= 3
