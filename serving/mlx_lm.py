"""Chains in mlx-lm: for ``generate``, ``stream_generate``, ``generate_step`` and ``BatchGenerator``.

    mlx_lm.generate(model, tokenizer, prompt, **decal.serving.mlx_lm.generate_kwargs("temperature(1.3) | min_p(0.1)"))

    asked = decal.serving.mlx_lm.batch_kwargs(["min_p(0.1)", "dry(0.8) | mirostat(3.0)"], seeds=[17, 4])
    generator.insert(prompts, max_tokens=[40, 40], **asked)

Under these arguments the chain alone decides the distribution: a logits processor applies it to the model's logits and the
tokens so far, and a sampler draws from what it leaves, with MLX's generator. With a seed decal draws, the same tokens as in any
other engine, up to what the logits owe to the engine. mlx-lm hands each sequence of a batch to its own processors, one by one.

Chains run on the CPU, so every step waits for the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decal.samplers.chain import Chain
from decal.samplers.errors import DecalError
from decal.serving.batch import warm_up
from decal.serving.engine import Written
from decal.serving.request import Request, as_params
from decal.serving.single import Follower

BESIDE = ("sampler", "samplers", "temp", "top_p", "min_p", "top_k", "xtc_probability", "repetition_penalty", "logit_bias")
"""Arguments that would decide the distribution beside the chain, or are none of ``generate_step``'s."""


def _mlx() -> Any:
    try:
        import mlx.core
    except ImportError as error:
        raise DecalError(f"decal.serving.mlx_lm needs mlx-lm: {error}") from error
    return mlx.core


class Processor:
    """A logits processor of mlx-lm: applies a chain to the rows of one text; see `decal.serving.single.Follower`."""

    def __init__(self, request: Request):
        self.follower = Follower(request)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """The logits (1, V) of the next token, float32, with the chain applied.

        Args:
            tokens: (T,) the text so far, prompt included; an mlx array.
            logits: (1, V), an mlx array of any floating type.
        """
        if len(logits) != 1:
            raise DecalError(f"decal: a processor follows one text, got {len(logits)} rows; give each its own: batch_kwargs")
        text = np.array(tokens) if self.follower.reads_text else ()
        return _mlx().array(self.follower(_torch(logits), text).numpy())


class Sampler:
    """A sampler of mlx-lm: draws from a chain on log-probabilities, without knowing the tokens so far; see `sampler`."""

    def __init__(self, chain: Chain, seed: int | None, position: int):
        self._chain, self._seed, self._position = chain, seed, position

    def __call__(self, logprobs: Any) -> Any:
        """(B,) tokens drawn from log-probabilities (B, V), an mlx array."""
        rows = _torch(logprobs)
        if self._seed is None:
            return _draw(_mlx().array(self._chain(rows, check=False).numpy()))
        if len(rows) != 1:
            raise DecalError(f"decal: a sampler with a seed draws one text, got {len(rows)} rows; give each its own")
        token = self._chain.sample(rows, self._seed, self._position, check=False)
        self._position += 1
        return _mlx().array(token.numpy().astype(np.uint32))


def _torch(array: Any) -> Tensor:
    """As float32; numpy knows no bfloat16."""
    return torch.from_numpy(np.array(array.astype(_mlx().float32)))


def _draw(logits: Any) -> Any:
    return _mlx().random.categorical(logits)


def _only(logits: Any) -> Any:
    # decal has drawn already: one token is left.
    return _mlx().argmax(logits, axis=-1)


def logits_processor(
    chain: Chain | str,
    *,
    seed: int | None = None,
    answers: Iterable[str] | None = None,
    regex: str | None = None,
    tokenizer: Any = None,
) -> Processor:
    """A logits processor that applies ``chain``, for one text at a time. Without a sampler mlx-lm takes the most probable token
    of what it leaves, so use it with `generate_kwargs`, which has one.

    Args:
        seed: decal draws; see `decal.serving.request.KEYS`, as for ``answers``; ``regex`` is another way to give them.
        tokenizer: for answers: mlx-lm's, or a fast one of transformers.

    Raises:
        DecalError: the chain can't be run by an engine, a value isn't allowed, or answers without a tokenizer.
    """
    request = Request.of(as_params(chain, seed, answers, regex))
    assert request is not None
    if request.answers is not None:
        if tokenizer is None:
            raise DecalError("decal: answers need the model's tokenizer; pass tokenizer=")
        # mlx-lm wraps a tokenizer of transformers, which has an attribute of that name itself.
        own = hasattr(type(tokenizer), "backend_tokenizer")
        request = request.given(tokenizer if own else getattr(tokenizer, "_tokenizer", tokenizer))
    return Processor(request)


def sampler(chain: Chain | str, *, seed: int | None = None, position: int = 0) -> Sampler:
    """A sampler that draws from ``chain``, for chains that read nothing but logits, beside logits processors of other kinds.

    Args:
        seed: decal draws, for one text. Without one MLX draws, for any number of texts.
        position: of the first token drawn, the number of tokens in the prompt; with it the seed gives what it gives elsewhere.

    Raises:
        DecalError: as `logits_processor`; or the chain reads the tokens so far, which a sampler doesn't know.
    """
    request = Request.of(as_params(chain, seed))
    assert request is not None
    if request.chain.needs:
        raise DecalError(
            f"decal: {request.chain} reads the tokens so far, which mlx-lm gives to its logits processors alone; use"
            " generate_kwargs"
        )
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise DecalError(f"position must be a number of tokens, got {position!r}")
    return Sampler(request.chain, seed, position)


def generate_kwargs(
    chain: Chain | str,
    *,
    seed: int | None = None,
    answers: Iterable[str] | None = None,
    regex: str | None = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Arguments of mlx-lm's ``generate``, ``stream_generate`` and ``generate_step`` under which the chain alone decides the
    distribution, for one text.

    Args:
        seed, answers, regex, tokenizer: as in `logits_processor`.
        kwargs: are added (``max_tokens=20``). Logits processors among them come before decal's. With answers ``max_tokens`` is
            what the longest takes, unless given. A ``prompt_cache`` must be empty for chains that read the text: mlx-lm shows
            what it holds to no processor. So must there be no ``draft_model``, with which it shows none of the prompt.

    Raises:
        DecalError: as `logits_processor`; a keyword would act beside the chain, or hide the text; or the longest answer takes
            more than ``max_tokens``.
    """
    made = logits_processor(chain, seed=seed, answers=answers, regex=regex, tokenizer=tokenizer)
    _refuse(chain, kwargs)
    if made.follower.reads_text:
        _refuse_hidden_text(chain, kwargs)
    guide = made.follower.request.chain.guide
    if guide is not None:
        given = kwargs.setdefault("max_tokens", guide.longest)
        if 0 <= given < guide.longest:
            raise DecalError(f"decal: the longest answer takes {guide.longest} tokens, got max_tokens={given}")
    processors = [*(kwargs.pop("logits_processors", None) or ()), made]
    return {**kwargs, "logits_processors": processors, "sampler": _draw if seed is None else _only}


def batch_kwargs(
    chains: Chain | str | Sequence[Chain | str],
    prompts: int | None = None,
    *,
    seeds: Sequence[int | None] | None = None,
    answers: Iterable[str] | None = None,
    regex: str | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Arguments of ``BatchGenerator.insert`` under which a chain of its own decides the distribution of each prompt.

    Args:
        chains: one for each prompt, or one for all of so many ``prompts``.
        seeds: one for each prompt, or None for those that MLX draws for.
        answers, regex, tokenizer: as in `logits_processor`, for all.

    Raises:
        DecalError: as `logits_processor`; or the numbers of chains, prompts and seeds differ.
    """
    if isinstance(chains, (Chain, str)):
        if prompts is None:
            raise DecalError("decal: one chain for several prompts needs their number")
        chains = [chains] * prompts
    seeds = [None] * len(chains) if seeds is None else seeds
    if len(seeds) != len(chains) or prompts not in (None, len(chains)):
        raise DecalError(f"decal: there are {len(chains)} chains, {len(seeds)} seeds and {prompts} prompts")
    given = {"answers": answers, "regex": regex, "tokenizer": tokenizer}
    processors = [[logits_processor(chain, seed=seed, **given)] for chain, seed in zip(chains, seeds, strict=True)]
    return {"logits_processors": processors, "samplers": [_draw if seed is None else _only for seed in seeds]}


def _refuse(chain: Chain | str, kwargs: Mapping[str, Any]) -> None:
    acting = [name for name in BESIDE if kwargs.get(name) is not None]
    if acting:
        raise DecalError(f"decal: {', '.join(acting)} would act beside the chain {chain}; put it into the chain")


def _refuse_hidden_text(chain: Chain | str, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("draft_model") is not None:
        raise DecalError(
            f"decal: {chain} reads the text (or has a seed), but with a draft_model mlx-lm shows its processors nothing of the"
            " prompt but its last token; leave it out"
        )
    if any(getattr(one, "offset", 0) for one in kwargs.get("prompt_cache") or ()):
        raise DecalError(
            f"decal: {chain} reads the text (or has a seed), but mlx-lm shows its processors nothing of what a prompt_cache"
            " holds; pass the whole text without one"
        )
    if kwargs.get("input_embeddings") is not None:
        raise DecalError(f"decal: {chain} reads the text (or has a seed), which input_embeddings aren't")


class Live:
    """A model in mlx-lm, as `decal.serving.engine.Engine`: all prompts in one ``BatchGenerator``, which tells its laws."""

    name = "mlx-lm"
    takes_seeds = True

    def __init__(self, model: Any, tokenizer: Any, version: str):
        self._model, self.tokenizer, self.version = model, tokenizer, version
        self._seen: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def start(cls, model: str, *, compile: bool = False) -> Live:
        """Load a folder, or a model from the hub.

        Args:
            compile: let MLX compile functions, for which it needs a C++ compiler where there is no GPU.
        """
        mx = _mlx()
        import mlx_lm

        warm_up()
        if not compile:
            mx.disable_compile()
        loaded, tokenizer = mlx_lm.load(str(model))[:2]
        return cls(loaded, tokenizer._tokenizer, str(mlx_lm.__version__))

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, V) the model's logits behind each text: those last drawn from there, or else with the text as a prompt."""
        return torch.cat([self._row(tuple(text)) for text in texts])

    def _row(self, text: tuple[int, ...]) -> Tensor:
        if text not in self._seen:
            self._seen[text] = _torch(self._model(_mlx().array([text]))[:, -1])
        return self._seen[text]

    def _see(self, tokens: Any, logits: Any) -> Any:
        self._seen[tuple(np.array(tokens).tolist())] = _torch(logits)
        return logits

    def notes(self) -> list[str]:
        """See `decal.serving.engine.Engine`."""
        return []

    def close(self) -> None:
        """Nothing runs between calls."""

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """Continue every prompt by at most ``length`` tokens; see `decal.serving.engine.Engine`."""
        from mlx_lm.generate import BatchGenerator

        request = Request.of(asked)
        count = len(prompts)
        kwargs: dict[str, Any] = {"samplers": [_draw] * count, "logits_processors": [[] for _ in prompts]}
        if request is not None:
            given = {"answers": asked.get("decal_answers"), "tokenizer": self.tokenizer}
            kwargs = batch_kwargs(asked["decal"], count, seeds=[request.seed] * count, **given)
        if laws:
            self._seen.clear()
        kwargs["logits_processors"] = [[self._see, *those] for those in kwargs["logits_processors"]]
        generator = BatchGenerator(self._model, stop_tokens=[[self.tokenizer.eos_token_id]])
        numbers = generator.insert([list(prompt) for prompt in prompts], max_tokens=[length] * count, **kwargs)
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        rows: dict[int, list[Tensor]] = {number: [] for number in numbers}
        try:
            while found := generator.next_generated():
                for one in found:
                    tokens[one.uid].append(int(one.token))
                    rows[one.uid].append(_torch(one.logprobs))
        finally:
            generator.close()
        return [Written(tokens[n], torch.stack(rows[n]) if laws and rows[n] else None) for n in numbers]
