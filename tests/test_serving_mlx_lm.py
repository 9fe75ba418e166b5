"""mlx-lm's adapter without mlx-lm: numpy arrays in place of MLX's, and processors called as mlx-lm calls them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replay import CHAINS, VOCABULARY, law, row
from tiny import byte_level

from decal import DecalError, parse
from decal.kernels import dispatch
from decal.serving import mlx_lm


@pytest.fixture(autouse=True)
def mx(monkeypatch: pytest.MonkeyPatch) -> Any:
    rng = np.random.default_rng(0)

    def categorical(logits: np.ndarray) -> np.ndarray:
        return (logits + rng.gumbel(size=logits.shape)).argmax(-1)

    made = SimpleNamespace(
        array=np.array, float32=np.float32, argmax=np.argmax, random=SimpleNamespace(categorical=categorical)
    )
    monkeypatch.setitem(sys.modules, "mlx", SimpleNamespace(core=made))
    monkeypatch.setitem(sys.modules, "mlx.core", made)
    return made


def logits_behind(text: list[int]) -> np.ndarray:
    return row(text).numpy()


def check(processor: Any, prompt: list[int], text: list[int], processed: np.ndarray) -> None:
    group = processor.follower._group
    number = 0 if group is None else group.members[0].number
    with dispatch.use("reference"):
        want = law(processor.follower.request, prompt, text[len(prompt) :], number)
    torch.testing.assert_close(torch.from_numpy(processed), want, rtol=1e-5, atol=1e-6)


def step(processors: Any, sampler: Any, text: list[int]) -> tuple[np.ndarray, int]:
    """As in generate_step: what the processors leave, and the token drawn from its log-probabilities."""
    logits = logits_behind(text)
    for processor in processors:
        logits = processor(np.array(text, np.uint32), logits)
    p = logits.astype(np.float64)
    return logits, int(sampler(p - np.log(np.exp(p).sum()))[0])


@pytest.mark.parametrize("seed", [None, 17])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_step_of_a_generation(chain: str, seed: int | None) -> None:
    for turn in range(2):
        kwargs = mlx_lm.generate_kwargs(chain, seed=seed, max_tokens=9)
        assert kwargs["max_tokens"] == 9
        (processor,) = kwargs["logits_processors"]
        prompt = np.random.default_rng(turn).integers(VOCABULARY, size=2 + turn).tolist()
        text = list(prompt)
        for _ in range(9):
            processed, token = step([processor], kwargs["sampler"], text)
            check(processor, prompt, text, processed)
            assert processed[0, token] > -np.inf
            text.append(token)


def test_a_batch_of_chains_is_each_alone() -> None:
    seeds = [n if n % 2 else None for n in range(len(CHAINS))]
    kwargs = mlx_lm.batch_kwargs(CHAINS, seeds=seeds)
    prompts = [np.random.default_rng(n).integers(VOCABULARY, size=1 + n).tolist() for n in range(len(CHAINS))]
    texts = [list(prompt) for prompt in prompts]
    for _ in range(6):
        for place, text in enumerate(texts):
            processed, token = step(kwargs["logits_processors"][place], kwargs["samplers"][place], text)
            check(kwargs["logits_processors"][place][0], prompts[place], text, processed)
            text.append(token)


def test_draws_are_from_the_chain_s_law() -> None:
    """Without a seed by MLX's generator, here numpy's."""
    kwargs = mlx_lm.generate_kwargs("top_k(5) | temperature(1.5)")
    counts = np.zeros(VOCABULARY)
    for _ in range(4000):
        counts[step(kwargs["logits_processors"], kwargs["sampler"], [3])[1]] += 1
    p = parse("top_k(5) | temperature(1.5)")(row([3])).softmax(-1)[0].numpy()
    assert np.abs(counts / 4000 - p).max() < 0.04
    assert (counts[p == 0] == 0).all()


def test_a_sampler() -> None:
    chain = "temperature(1.5) | top_k(4)"
    rows = torch.cat([row([n]) for n in range(200)])
    tokens = mlx_lm.sampler(chain)(rows.log_softmax(-1).numpy())
    assert parse(chain)(rows).gather(-1, torch.from_numpy(tokens)[:, None]).isfinite().all()
    assert len({int(mlx_lm.sampler(chain)(rows[:1].numpy())[0]) for _ in range(50)}) > 1
    drawn = mlx_lm.sampler(chain, seed=4, position=7)
    found = [int(drawn(rows[n : n + 1].log_softmax(-1).numpy())[0]) for n in range(20)]
    wanted = [int(parse(chain).sample(rows[n : n + 1].log_softmax(-1), 4, 7 + n)) for n in range(20)]
    assert found == wanted
    with pytest.raises(DecalError, match="draws one text, got 2 rows"):
        drawn(rows[:2].numpy())


def test_answers_in_the_tokens_of_a_wrapped_tokenizer() -> None:
    tokenizer = byte_level(["red green"])
    wrapped = SimpleNamespace(_tokenizer=tokenizer)
    found = []
    for seed in range(30):
        kwargs = mlx_lm.generate_kwargs("guided(1.0)", answers=["red", "green"], tokenizer=wrapped, seed=seed)
        text = [5, 7]
        for _ in range(kwargs["max_tokens"]):
            (processor,) = kwargs["logits_processors"]
            text.append(int(processor(np.array(text), row(text, len(tokenizer)).numpy()).argmax()))
            if text[-1] == tokenizer.eos_token_id:
                break
        assert text[-1] == tokenizer.eos_token_id
        found.append(tokenizer.decode(text[2:-1]))
    assert set(found) == {"red", "green"}


def test_other_processors_come_first() -> None:
    def ban(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[:, :40] = -np.inf
        return logits

    kwargs = mlx_lm.generate_kwargs("top_k(3)", logits_processors=[ban])
    kept = np.flatnonzero(step(kwargs["logits_processors"], kwargs["sampler"], [1])[0][0] > -np.inf)
    assert len(kept) == 3
    assert kept.min() >= 40


@pytest.mark.parametrize(
    ("chain", "kwargs", "message"),
    [
        ("min_p(0.1)", {"sampler": len}, "sampler would act beside the chain min_p"),
        ("min_p(0.1)", {"temp": 0.7, "top_p": 0.9}, "temp, top_p would act beside"),
        ("dry(0.8)", {"draft_model": 1}, "reads the text .* nothing of the prompt but its last token"),
        ("min_p(0.1)", {"seed": 3, "draft_model": 1}, "draft_model"),
        ("dry(0.8)", {"prompt_cache": [SimpleNamespace(offset=0), SimpleNamespace(offset=3)]}, "what a prompt_cache holds"),
        ("dry(0.8)", {"input_embeddings": 1}, "input_embeddings"),
        ("guided(1)", {"answers": ["red"]}, "pass tokenizer="),
        ("guided(1)", {"answers": ["red"], "tokenizer": byte_level(), "max_tokens": 2}, "takes 4 tokens, got max_tokens=2"),
        ("minp(0.1)", {}, "did you mean min_p"),
        ("top_w(1.0)", {}, "reads the model's embeddings"),
    ],
)
def test_refusals(chain: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DecalError, match=message):
        mlx_lm.generate_kwargs(chain, **kwargs)


def test_what_is_not_refused() -> None:
    cache = [SimpleNamespace(offset=3)]
    assert mlx_lm.generate_kwargs("min_p(0.1)", draft_model=1, prompt_cache=cache)["draft_model"] == 1
    assert mlx_lm.generate_kwargs("dry(0.8)", prompt_cache=[SimpleNamespace(offset=0)], temp=None)["prompt_cache"]


def test_more_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DecalError, match="which mlx-lm gives to its logits processors alone"):
        mlx_lm.sampler("mirostat(3.0)")
    with pytest.raises(DecalError, match="position must be"):
        mlx_lm.sampler("min_p(0.1)", seed=3, position=-1)
    with pytest.raises(DecalError, match="needs their number"):
        mlx_lm.batch_kwargs("min_p(0.1)")
    with pytest.raises(DecalError, match="2 chains, 1 seeds"):
        mlx_lm.batch_kwargs(["min_p(0.1)"] * 2, seeds=[3])
    with pytest.raises(DecalError, match="2 chains, 2 seeds and 3 prompts"):
        mlx_lm.batch_kwargs(["min_p(0.1)"] * 2, 3)
    with pytest.raises(DecalError, match="follows one text, got 2 rows"):
        mlx_lm.logits_processor("min_p(0.1)")(np.array([1]), np.zeros((2, 5), np.float32))
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.delitem(sys.modules, "mlx")
    with pytest.raises(DecalError, match="needs mlx-lm"):
        mlx_lm.Live.start("model")
