"""Chains in vLLM, per request: offline, on a server, and as a plug-in; for both interfaces of logits processors that vLLM has.

    LLM(model, logits_processors=["decal.serving.vllm:Processor"])
    vllm serve MODEL --logits-processors decal.serving.vllm:Processor

    llm.generate(prompts, decal.serving.vllm.sampling_params("temperature(1.3) | min_p(0.1)", max_tokens=20))
    {"model": ..., "prompt": ..., "temperature": 1, "vllm_xargs": {"decal": "temperature(1.3) | min_p(0.1)"}}

The chain alone decides the distribution of its request. Settings of vLLM that would reshape it too (temperature, top_p, top_k,
min_p, penalties) are refused when the request is admitted, which over HTTP is status 400, unless they are at values that do
nothing. A server takes such settings from the model's generation config if the request has none: start it with
``--generation-config vllm``, or send them. What bans or demands tokens (``logit_bias``, ``bad_words``, ``allowed_token_ids``,
``min_tokens``, structured outputs) comes before the chain, which sees what is left; ``thinking_token_budget`` comes behind it,
and is refused. vLLM's beam search makes requests of its own, without their chains.

With ``decal_seed`` decal draws the tokens itself, so that they are the same in any batch and in any engine, up to what the
logits owe to the batch. Without it vLLM draws, with its own ``seed`` if there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from decal.samplers.chain import Chain
from decal.samplers.context import History
from decal.samplers.errors import DecalError
from decal.serving.batch import Group, Member, Rested, grouped, histories, process, warm_up
from decal.serving.engine import Written, http
from decal.serving.request import NEUTRAL, Request, as_params, ending, refuse_beside

log = logging.getLogger(__name__)

_working: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""The processor that applies chains, by the identity of its engine's configuration."""


def _bases() -> tuple[type, ...]:
    """The abstract classes of the interfaces that the installed vLLM has: of its first model runner, and of its second."""
    from vllm.v1.sample.logits_processor import LogitsProcessor as First

    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Second
    except ImportError:  # before 0.31
        return (First,)
    return First, Second


def sampling_params(
    chain: Chain | str,
    *,
    seed: int | None = None,
    answers: Iterable[str] | None = None,
    regex: str | None = None,
    **kwargs: Any,
) -> Any:
    """``SamplingParams`` under which the chain alone decides the distribution. ``kwargs`` are added (``max_tokens=20``).

    Args:
        seed: decal draws; see `decal.serving.request.KEYS`, as for ``answers``; ``regex`` is another way to give them.

    Raises:
        DecalError: the chain can't be run by an engine, or a keyword would act beside it.
    """
    from vllm import SamplingParams

    asked = as_params(chain, seed, answers, regex)
    kwargs["extra_args"] = {**(kwargs.get("extra_args") or {}), **asked}
    params = SamplingParams(**{name: off[0] for name, off in NEUTRAL.items()} | kwargs)
    _Processor.validate_params(params)
    return params


def request_fields(
    chain: Chain | str, *, seed: int | None = None, answers: Iterable[str] | None = None, regex: str | None = None
) -> dict[str, Any]:
    """Fields of a request to vLLM's server under which the chain alone decides the distribution; for the OpenAI client they are
    ``extra_body``. Needs no vLLM. Arguments and errors as in `sampling_params`."""
    return {**{name: off[0] for name, off in NEUTRAL.items()}, "vllm_xargs": as_params(chain, seed, answers, regex)}


class _Processor:
    """See `Processor`; all but its base classes, which need vLLM."""

    def __init__(self, vllm_config: Any, *rest: Any):
        # The first interface gives device and is_pin_memory, the second what it knows of requests.
        self._requests = rest[0] if len(rest) == 1 else None
        self._config = vllm_config.model_config
        if self._requests is None and vllm_config.scheduler_config.async_scheduling and not self._config.logits_processors:
            raise DecalError(
                "decal: vLLM tells a plug-in of its first model runner nothing of the tokens drawn while it schedules"
                " asynchronously; start it with --logits-processors decal.serving.vllm:Processor, or --no-async-scheduling"
            )
        self._members: dict[int, Member] = {}
        self._texts: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self._rested = Rested(self._members)
        self._groups: tuple[bytes, list[Group]] | None = None
        self._came = 0
        # A plug-in and --logits-processors both bring the class, and a chain must not be applied twice.
        self._config_of = vllm_config
        _working.setdefault(id(vllm_config), self)
        warm_up(rest[0].device if self._requests is not None else rest[0])

    @property
    def _idle(self) -> bool:
        """Whether another one applies the chains of this engine."""
        return _working.setdefault(id(self._config_of), self) is not self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request that asks for something that can't be done. Raises DecalError, a ValueError."""
        request = Request.of(sampling_params.extra_args)
        if request is None:
            return
        refuse_beside(request, sampling_params)
        request.refuse_copies(getattr(sampling_params, "n", None) or 1)
        if getattr(sampling_params, "thinking_token_budget", None) is not None:
            raise DecalError(f"decal: thinking_token_budget forces tokens behind the chain {request.chain}; leave it out")
        if request.answers is not None and getattr(sampling_params, "min_tokens", None):
            least = sampling_params.min_tokens
            raise DecalError(f"decal: min_tokens={least} bans the end of answers that {request.chain} follows; leave it out")

    def is_argmax_invariant(self) -> bool:
        """Whether greedy requests could do without; a chain may change which token is the most probable."""
        return False

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from vllm.tokenizers.registry import cached_tokenizer_from_config
        except ImportError:  # before 0.12
            from vllm.transformers_utils.tokenizer import cached_tokenizer_from_config
        return cached_tokenizer_from_config(self._config)

    def _member(self, params: Any) -> Member | None:
        request = Request.of(params.extra_args)
        if request is None:
            return None
        # Ranks that share a model must toss the same coins, and see requests come in the same order.
        self._came += 1
        number = self._came if params.seed is None else params.seed
        if request.answers is None:
            return Member.of(request, number)
        try:
            given = request.given(self._tokenizer)
            width = self._config.get_vocab_size()
            if given.chain.guide is not None and given.chain.guide.largest >= width:
                raise DecalError(f"they have the token {given.chain.guide.largest}, the model {width} tokens")
            return Member.of(given, number)
        except Exception as error:  # too late to refuse it, and others must not stop for it
            log.error("decal: a request ends without a word, as its answers can't be followed: %s", error)
            return Member.of(ending(getattr(self._config.hf_text_config, "eos_token_id", None)))

    def _leave(self, slot: int) -> None:
        member = self._members.pop(slot, None)
        self._texts.pop(slot, None)
        if member is not None:
            self._rested.keep(member)

    # ---- the first interface: slots are rows of the batch, and vLLM tells of all that come, go and move.

    def update_state(self, batch_update: Any) -> None:
        """Follow the changes of the batch."""
        if batch_update is None or self._idle:
            return
        for slot in batch_update.removed:
            self._leave(slot)
        for slot, params, prompt, output in batch_update.added:
            self._leave(slot)
            member = self._member(params)
            if member is not None:
                self._members[slot], self._texts[slot] = member, (prompt or (), output)
        for one, other, direction in batch_update.moved:
            swap = direction.name == "SWAP"
            if not swap:
                self._leave(other)  # vLLM doesn't name it among the removed if another takes its place at once
            for held in (self._members, self._texts):
                _move(held, one, other, swap=swap)
        self._groups = None

    def _first(self, logits: Tensor) -> Tensor:
        if not self._members:
            return logits
        if self._groups is None:
            self._groups = b"", grouped(self._members, self._rested)
        return process(logits, self._groups[1], self._lengths, self._histories)

    def _lengths(self, group: Group) -> Tensor:
        return torch.tensor([[sum(map(len, self._texts[row]))] for row in group.rows.tolist()])

    def _histories(self, group: Group) -> History:
        return histories(group, [self._texts[row] for row in group.rows.tolist()])

    # ---- the second interface: slots are places in vLLM's tables, and rows are in any order, several a request with drafts.

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request has entered the batch. Whether its logits are changed."""
        if self._idle:
            return False
        self._leave(req_idx)
        self._groups = None
        member = self._member(sampling_params)
        if member is None:
            return False
        self._members[req_idx] = member
        return True

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def _second(self, logits: Tensor, context: Any) -> Tensor:
        slots = context.idx_mapping_np
        if not any(slot in self._members for slot in slots.tolist()):
            return logits
        if len(slots) != len(logits):  # drafts: which rows are whose is known on the device alone
            slots = context.expanded_idx_mapping.cpu().numpy()
        key = slots.tobytes()
        if self._groups is None or self._groups[0] != key:
            self._groups = key, grouped([self._members.get(slot) for slot in slots.tolist()], self._rested)
        lengths = context.pos.long()[:, None] + 1

        def history(group: Group) -> History:
            rows = group.index(logits.device)
            return _history(self._requests, context, rows, lengths[rows], group.number.to(logits.device))

        return process(logits, self._groups[1], lambda group: lengths[group.index(logits.device)], history)

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """The batch's logits with every request's chain applied to its rows."""
        return self._first(logits) if context is None else self._second(logits, context)


def _history(requests: Any, context: Any, rows: Tensor, length: Tensor, number: Tensor) -> History:
    """Of rows of the second interface: committed tokens are in its tables, drafts among the step's inputs."""
    slots = context.expanded_idx_mapping[rows].long()
    longest = int(length.max())
    place = length - longest + torch.arange(longest, device=length.device)
    tokens = requests.all_token_ids.gpu[slots[:, None], place.clamp(min=0)].long()
    # A row's own input and those of the rows before it, back to the first of its request.
    local = context.expanded_local_pos.long()
    for back in range(int(local[rows].max()) + 1):
        reached = (local[rows] >= back) & (length[:, 0] > back)
        drafted = context.input_ids[(rows - back).clamp(min=0)].long()
        tokens[:, longest - 1 - back] = torch.where(reached, drafted, tokens[:, longest - 1 - back])
    prompt = requests.prompt_len.gpu[slots].long()[:, None]
    return History(tokens, length, prompt, number)


def _move(held: dict[int, Any], one: int, other: int, *, swap: bool) -> None:
    first, second = held.pop(one, None), held.pop(other, None)
    if first is not None:
        held[other] = first
    if swap and second is not None:
        held[one] = second


class Live:
    """A running vLLM for `decal.serving.verify`: one started here, which tells all, or a server, which tells tokens."""

    name = "vLLM"
    takes_seeds = True
    llm: Any = None
    """The ``LLM``, if it was started here."""

    def __init__(self, write: Any, rows: Any, tokenizer: Any, version: str, notes: Sequence[str], close: Any):
        self._write, self._rows, self._notes, self._close = write, rows, notes, close
        self.tokenizer, self.version = tokenizer, version

    @classmethod
    def start(cls, model: str, **kwargs: Any) -> Live:
        """Load a model, with decal's processor; ``kwargs`` are arguments of ``LLM``."""
        import vllm

        given = {"logits_processors": ["decal.serving.vllm:Processor"], "generation_config": "vllm", "enforce_eager": True}
        engine = vllm.LLM(model, logprobs_mode="processed_logits", max_logprobs=-1, **(given | kwargs))

        width = engine.llm_engine.model_config.get_vocab_size()

        def ask(prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, told: int) -> list[Written]:
            neutral = {name: off[0] for name, off in NEUTRAL.items()}
            laws = {"logprobs": -1 if told == width else told, "flat_logprobs": True} if told else {}
            params = vllm.SamplingParams(**neutral, max_tokens=length, extra_args=dict(asked) or None, detokenize=False, **laws)
            texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            try:
                outputs = [one.outputs[0] for one in engine.generate(texts, params, use_tqdm=False)]
            except _refusals() as error:
                raise DecalError(str(error)) from error
            return [Written(list(one.token_ids), _laws(one.logprobs, width) if told else None) for one in outputs]

        def write(prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
            # A whole law takes vLLM a tenth of a second to tell, and few chains keep so many tokens.
            told = min(SOME, width) if laws else 0
            written = ask(prompts, asked, length, told)
            if told < width and any(one.laws is not None and int(one.laws.isfinite().sum(-1).max()) >= told for one in written):
                return ask(prompts, asked, length, width)
            return written

        def rows(texts: Sequence[Sequence[int]]) -> Tensor:
            return torch.cat([one.laws for one in ask(texts, {}, 1, width) if one.laws is not None])

        live = cls(write, rows, engine.get_tokenizer(), vllm.__version__, (), engine.llm_engine.engine_core.shutdown)
        live.llm = engine
        return live

    @classmethod
    def connect(cls, url: str, tokenizer: Any = None, model: str | None = None) -> Live:
        """A server at ``url``, such as ``http://localhost:8000``. It tells nothing of its laws.

        Args:
            tokenizer: of its model; loaded by the name of the model if not given.
            model: its name there, if it serves several.

        Raises:
            DecalError: there is no server.
        """
        served = http(f"{url}/v1/models")["data"]
        model = model or served[0]["id"]
        if tokenizer is None:
            from transformers import AutoTokenizer

            root = next((one.get("root") for one in served if one["id"] == model), None)
            tokenizer = AutoTokenizer.from_pretrained(root or model)

        def write(prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
            fields = {name: off[0] for name, off in NEUTRAL.items()}
            body = {"model": model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": length, **fields}
            found = http(f"{url}/v1/completions", {**body, "vllm_xargs": dict(asked), "return_token_ids": True})
            choices = sorted(found["choices"], key=lambda one: one["index"])
            return [Written(list(one["token_ids"]), None) for one in choices]

        return cls(write, lambda texts: None, tokenizer, http(f"{url}/version")["version"], (), lambda: None)

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """See `decal.serving.engine.Engine`."""
        return self._rows(texts)

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """See `decal.serving.engine.Engine`."""
        return self._write(prompts, asked, length, laws)

    def notes(self) -> list[str]:
        """See `decal.serving.engine.Engine`."""
        return list(self._notes)

    def close(self) -> None:
        """Stop it, if it was started for this."""
        self._close()


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it doesn't admit."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:  # before 0.12
        return (ValueError,)
    return ValueError, VLLMValidationError


SOME = 2048
"""So many of the most probable tokens are asked for at first."""


def _laws(flat: Any, width: int) -> Tensor:
    """(tokens, width) out of vLLM's flat log-probabilities, where each token's are in no order; -inf for what isn't there."""
    laws = torch.full((len(flat.start_indices), width), -torch.inf)
    for law, start, end in zip(laws, flat.start_indices, flat.end_indices, strict=True):
        law[torch.tensor(flat.token_ids[start:end])] = torch.tensor(flat.logprobs[start:end])
    return laws


def __getattr__(name: str) -> Any:
    # The class is made when it is asked for, as its bases are vLLM's.
    if name != "Processor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        bases = _bases()
    except ImportError as error:
        raise DecalError(f"decal.serving.vllm.Processor needs vLLM: {error}") from error
    doc = "A logits processor of vLLM that applies the chain of each request; see `decal.serving.vllm`."
    made = type(name, (_Processor, *bases), {"__doc__": doc, "__module__": __name__})
    globals()[name] = made
    return made
