"""Chains in SGLang, per request: as a custom logit processor, and as a sampling backend that also draws.

    python -m sglang.launch_server --model-path MODEL --enable-custom-logit-processor --disable-overlap-schedule

    requests.post(url + "/generate", json={"text": ..., **request_fields("temperature(1.3) | min_p(0.1)")})

decal must be installed where the server runs. ``--enable-custom-logit-processor`` makes SGLang unpickle what clients send under
``custom_logit_processor``: whoever can reach such a server can run any code on it, so keep it behind something that admits only
those who may. decal's own string names a class and nothing else. With the plug-in below any other string is refused before it
is unpickled, unless requests come in by SGLang's Rust front end (``SGLANG_RUST_SERVER``), which asks no plug-in.

The chain alone decides the distribution of its request. Settings of SGLang that would reshape it too (temperature, top_p,
top_k, min_p, penalties) end the request with status 400, unless they are at values that do nothing. OpenAI-compatible
endpoints take such settings from the model's generation config if the request has none: start the server with
``--sampling-defaults openai``, or send them. What bans or demands tokens (``logit_bias``, ``min_new_tokens``, structured
outputs) comes before the chain, which sees what is left. The processor learns of a bad request when its first token is due, so
the prompt has been read by then; the plug-in refuses it before. Beams (``beam_width``) are searched for without any processor:
only the plug-in refuses them.

While SGLang overlaps scheduling with the model, its requests are a token behind when a processor runs. Chains of the logits
alone don't mind, and neither do seeds. One that reads the text or remembers ends with status 400 at its second token, unless
the server runs with ``--disable-overlap-schedule``, with ``SGLANG_ENABLE_DELAY_SAMPLE=1`` in its environment, or with
``--sampling-backend decal``, which knows what it drew.

Speculative decoding: EAGLE, NGRAM, STANDALONE and their like verify drafts without logit processors, so requests with a chain
are refused under them. DFLASH and DSPARK run them on every draft, but don't say which tokens the drafts are: under these,
chains of the logits alone are done, and those that read the text, remember, or have a seed are refused.

As a plug-in (``examples/sglang_plugin`` is the whole of it) that `register` makes:

    python -m sglang.launch_server --model-path MODEL --enable-custom-logit-processor --sampling-backend decal

decal then draws for every request with a chain, in the step that applies it; requests are refused when they are admitted; and
they need no ``custom_logit_processor``, only their ``custom_params``. Log-probabilities that SGLang returns are the chain's.
Other requests are sampled by SGLang's ``pytorch`` backend.

With ``decal_seed`` decal draws the tokens itself in either way, so that they are the same in any batch and in any engine, up to
what the logits owe to the batch.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from http import HTTPStatus
from typing import Any

import torch
from torch import Tensor

from decal.samplers.chain import Chain
from decal.samplers.context import History
from decal.samplers.errors import DecalError
from decal.serving import request as asking
from decal.serving.batch import Group, Member, grouped, histories, process, warm_up
from decal.serving.engine import Written, http
from decal.serving.request import Request, as_params, refuse_beside

log = logging.getLogger(__name__)

PROCESSOR = json.dumps({"callable": b"cdecal.serving.sglang\nProcessor\n.".hex()})
"""What a request sends as ``custom_logit_processor``: a pickle of a class by its name, the same in every version of Python."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {**asking.NEUTRAL, "top_k": (-1, 1 << 30), "beam_width": (1,)}
"""SGLang's own settings that reshape the distribution, and their values that don't; the first is the one to send."""

FOLLOWS_DRAFTS = frozenset({"DFLASH", "DSPARK"})
"""Kinds of speculative decoding that run custom logit processors on their drafts."""

DROPPED = -1e30
"""SGLang's log-probabilities are at least the lowest float32, also where a token can't be drawn."""


def request_fields(
    chain: Chain | str, *, seed: int | None = None, answers: Iterable[str] | None = None, regex: str | None = None
) -> dict[str, Any]:
    """Fields of a request to ``/generate``, or arguments of ``Engine.generate``, under which the chain alone decides the
    distribution. Needs neither SGLang nor dill; add yours to its ``sampling_params`` (``max_new_tokens``).

    Args:
        seed: decal draws; see `decal.serving.request.KEYS`, as for ``answers``; ``regex`` is another way to give them.

    Raises:
        DecalError: the chain can't be run by an engine.
    """
    return {"custom_logit_processor": PROCESSOR, "sampling_params": _sampling_params(as_params(chain, seed, answers, regex))}


def _sampling_params(asked: Mapping[str, Any]) -> dict[str, Any]:
    off = {name: values[0] for name, values in NEUTRAL.items() if name != "beam_width"}
    return {**off, "custom_params": dict(asked)}


def refuse(request: Request, settings: Any) -> None:
    """Raise DecalError if SGLang's own settings of a request, an object or a mapping, would act beside its chain."""
    get = settings.get if isinstance(settings, Mapping) else lambda name: getattr(settings, name, None)
    try:
        refuse_beside(request, settings, NEUTRAL)
    except DecalError as error:
        # What SGLang makes of a temperature of 0.
        raise DecalError(f"{error} A temperature of 0 is a top_k of 1 to SGLang.") if get("top_k") == 1 else error from None
    request.refuse_copies(get("n") or 1)


def register(backend: str = "decal", *, others: bool = False) -> None:
    """Make ``--sampling-backend decal`` known to SGLang, and have requests checked when they are admitted.

    Call it from a plug-in, an entry point of the group ``sglang.srt.plugins``: SGLang runs that in each of its processes.

    Args:
        backend: its name; "pytorch" on a CPU, where SGLang asks for that whatever it was told.
        others: also let custom logit processors other than decal's be unpickled.

    Raises:
        DecalError: SGLang isn't here.
    """
    try:
        from sglang.srt.layers.sampler import register_sampler_backend
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError as error:
        raise DecalError(f"decal.serving.sglang.register needs SGLang 0.5.23 or newer: {error}") from error
    register_sampler_backend(backend, _sampler)
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}._validate_one_request", partial(_admit, others), HookType.BEFORE)


def _sampler() -> Any:
    warm_up("cuda" if torch.cuda.is_available() else "cpu")
    made: Any = globals().get("Sampler") or __getattr__("Sampler")
    return made()


def _admit(others: bool, manager: Any, asked: Any, *rest: Any) -> None:
    """Refuse a request that has come in; an error here is status 400."""
    string = getattr(asked, "custom_logit_processor", None)
    if string is not None and string != PROCESSOR and not others:
        raise DecalError("decal: this server runs no custom logit processor but decal's; see decal.serving.sglang.register")
    settings = {**(getattr(manager, "preferred_sampling_params", None) or {}), **(asked.sampling_params or {})}
    request = Request.of(settings.get("custom_params"))
    if request is None:
        return
    if string is not None and string != PROCESSOR:
        raise DecalError("decal: another custom logit processor would act instead of the chain; send decal's or none")
    refuse(request, settings)
    _refuse_of_engine(request)
    asked.custom_logit_processor = PROCESSOR


def _refuse_of_engine(request: Request) -> None:
    """Raise DecalError if the way this process's SGLang was started doesn't go with a chain."""
    from sglang.srt.runtime_context import get_disagg, get_spec

    drafts = get_spec().speculative_algorithm
    if drafts is not None and str(drafts).upper() not in FOLLOWS_DRAFTS:
        raise DecalError(f"decal: under speculative decoding by {drafts} SGLang applies no logit processors to its drafts")
    if drafts is not None and (request.seed is not None or request.chain.needs):
        raise DecalError(
            f"decal: under speculative decoding by {drafts} SGLang doesn't tell logit processors the drafted tokens, which"
            f" {request.chain}{' with a seed' if request.seed is not None else ''} depends on"
        )
    mode = get_disagg().disaggregation_mode
    if mode not in (None, "null") and "state" in request.chain.needs:
        raise DecalError(f"decal: {request.chain} remembers, and can't pass from a server for prompts to one for decoding")


# ---- what a processor knows of the batch


@dataclass(eq=False)
class _Member(Member):
    """A request; ``drawn`` is the length of its text when `Sampler` last drew for it, that batch's tokens, and its place."""

    drawn: tuple[int, Tensor, int] | None = None


@dataclass(eq=False)
class _Row:
    """A row to process: SGLang's request, decal's, and its text as (prompt, output) and in tokens, if either matters."""

    asked: Any
    member: _Member
    length: int = 0
    text: tuple[Sequence[int], Sequence[int]] = ((), ())


def _end(asked: Any, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
    """Have SGLang end one request with an error. An exception would end its scheduler, and so every request."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    kind = "BadRequestError" if status == HTTPStatus.BAD_REQUEST else "InternalServerError"
    log.error("request %s: %s", asked.rid, message)
    asked.to_finish = FINISH_ABORT(message, status, kind)


def _member(asked: Any, params: Mapping[str, Any]) -> _Member | None:
    """decal's part of a request, which is kept with SGLang's, as batches and processors come and go."""
    if hasattr(asked, "decal_member"):
        known: _Member | None = asked.decal_member
        return known
    member: _Member | None = None
    try:
        request = Request.of(params)
        if request is not None:
            refuse(request, asked.sampling_params)
            _refuse_of_engine(request)
            if request.answers and asked.tokenizer is None:
                raise DecalError(f"decal: {request.chain} needs the tokenizer; start SGLang without --skip-tokenizer-init")
            # Every process of a tensor-parallel server must toss the same coins.
            own = int.from_bytes(blake2b(asked.rid.encode(), digest_size=8).digest(), "little") >> 1
            seed = asked.sampling_params.sampling_seed
            member = _Member.of(request.given(asked.tokenizer), own if seed is None else seed)
    except DecalError as error:
        _end(asked, str(error))
    except Exception as error:
        log.exception("decal: request %s", asked.rid)
        _end(asked, f"decal: {error!r}", HTTPStatus.INTERNAL_SERVER_ERROR)
    asked.decal_member = member
    return member


def _row(params: Mapping[str, Any] | None, several: bool, draws: bool) -> _Row | None:
    """What is to be done for a row, or None for one that stays as it is."""
    if not params or not any(str(key).startswith("decal") for key in params):
        return None
    asked = params.get("__req__")
    if asked is None:
        raise DecalError("decal.serving.sglang needs SGLang 0.5.23 or newer, which tells processors of their requests")
    member = _member(asked, params)
    if member is None or asked.to_finish is not None or asked.finished():
        return None
    if not (draws or member.reads_text or member.request.seed is not None):
        return _Row(asked, member)
    if several:
        _end(asked, f"decal: the tokens of drafts, which {member.request.chain} depends on, aren't told to logit processors")
        return None
    prompt, output = asked.origin_input_ids, asked.output_ids
    length = asked.kv.kv_committed_len
    late = length - len(prompt) - len(output)
    if late < 0:  # A part of a long prompt; nothing is drawn from its row.
        return None
    if late and member.reads_text:
        if late > 1 or member.drawn is None or member.drawn[0] != length - 1:
            _end(
                asked,
                f"decal: {member.request.chain} reads the text, whose last token SGLang doesn't tell while it overlaps its"
                " scheduling with the model; start it with --disable-overlap-schedule, with SGLANG_ENABLE_DELAY_SAMPLE=1 in its"
                " environment, or use decal's sampling backend",
            )
            return None
        output = [*output, int(member.drawn[1][member.drawn[2]])]
    return _Row(asked, member, length, (prompt, output))


class _Processor:
    """See `Processor`; all but its base class, which needs SGLang."""

    def __init__(self) -> None:
        self._groups: tuple[list[tuple[int, Member]], list[Group]] | None = None

    @classmethod
    def to_str(cls) -> str:
        """`PROCESSOR`, so that requests of all clients are one group to SGLang."""
        return PROCESSOR

    def __call__(self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any] | None] | None = None) -> Tensor:
        """What the chains make of the rows (R, V), which may be changed in place."""
        return self.apply(logits, self.rows(custom_param_list or ()))

    def rows(self, params: Sequence[Mapping[str, Any] | None], *, draws: bool = False) -> dict[int, _Row]:
        """The rows to process, of requests with these ``custom_params``."""
        times = Counter(map(id, params))
        found = ((row, _row(own, times[id(own)] > 1, draws)) for row, own in enumerate(params))
        return {row: one for row, one in found if one is not None}

    def apply(self, logits: Tensor, rows: Mapping[int, _Row], *, draws: bool | None = None) -> Tensor:
        """What the chains make of ``rows`` of the logits (R, V), which may be changed in place.

        Args:
            draws: whether decal draws; unless given, for requests with a seed.
        """
        if not rows:
            return logits
        key: list[tuple[int, Member]] = [(row, one.member) for row, one in rows.items()]
        if self._groups is None or self._groups[0] != key:
            self._groups = key, grouped(dict(key))

        def lengths(group: Group) -> Tensor:
            return torch.tensor([[rows[row].length] for row in group.rows.tolist()])

        def texts(group: Group) -> History:
            return histories(group, [rows[row].text for row in group.rows.tolist()])

        for group in self._groups[1]:
            group.draws = group.members[0].request.seed is not None if draws is None else draws
            try:
                logits = process(logits, [group], lengths, texts)
            except Exception:
                log.exception("decal: %d rows together", len(group.members))
                for row, member in zip(group.rows.tolist(), group.members, strict=True):
                    alone = Group([row], [member])
                    alone.draws = group.draws
                    try:
                        logits = process(logits, [alone], lengths, texts)
                    except Exception as error:
                        status = HTTPStatus.BAD_REQUEST if isinstance(error, DecalError) else HTTPStatus.INTERNAL_SERVER_ERROR
                        _end(rows[row].asked, f"decal: {member.request.chain}: {error}", status)
        return logits


class _Sampler:
    """See `Sampler`; all but its base class, which needs SGLang."""

    def forward(self, logits_output: Any, sampling_info: Any, return_logprob: bool, *rest: Any, **more: Any) -> Tensor:
        """(B,) the next tokens: drawn by decal for requests with a chain, by SGLang for others."""
        sample: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        entries = sampling_info.custom_logit_processor or {} if sampling_info.has_custom_logit_processor else {}
        ours = [entry for entry in entries.values() if isinstance(entry.processor, _Processor)]
        if not ours:
            return sample(logits_output, sampling_info, return_logprob, *rest, **more)
        logits = logits_output.next_token_logits
        told = logits.clone() if return_logprob else None
        drawn: list[tuple[int, _Row]] = []
        for entry in ours:
            rows = entry.processor.rows([sampling_info.custom_params[row] for row in entry.rows], draws=True)
            if told is not None:
                scores = entry.processor.apply(told.index_select(0, entry.indices), rows, draws=False)
                told.index_copy_(0, entry.indices, scores.to(told.dtype))
            # One token left is drawn for certain, and all that SGLang does with what is drawn stays as it is.
            own = entry.processor.apply(logits.index_select(0, entry.indices), rows, draws=True)
            logits.index_copy_(0, entry.indices, own.to(logits.dtype))
            drawn += [(entry.rows[row], one) for row, one in rows.items()]
        others = {key: entry for key, entry in entries.items() if not isinstance(entry.processor, _Processor)}
        info = replace(sampling_info, custom_logit_processor=others or None, has_custom_logit_processor=bool(others))
        if told is not None:
            more["logprob_logits"] = told
        tokens = sample(logits_output, info, return_logprob, *rest, **more)
        for row, one in drawn:
            one.member.drawn = one.length, tokens, row
        return tokens

    def _sample_from_probs(self, *args: Any, **kwargs: Any) -> Any:
        from sglang.srt.runtime_context import get_exec

        # SGLang looks up how to sample by the backend's name, and knows its own.
        with get_exec().kernel.override(sampling_backend="pytorch"):
            return super()._sample_from_probs(*args, **kwargs)  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    # The classes are made when they are asked for, as their bases are SGLang's.
    if name not in ("Processor", "Sampler"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import sglang.srt.managers.schedule_batch
        import sglang.srt.runtime_context  # noqa: F401

        if name == "Processor":
            from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor as Base

            own: type = _Processor
        else:
            from sglang.srt.layers.sampler import Sampler as Base

            own = _Sampler
    except ImportError as error:
        raise DecalError(f"decal.serving.sglang.{name} needs SGLang 0.5.23 or newer: {error}") from error
    docs = {
        "Processor": "A custom logit processor of SGLang that applies the chain of each request; see `decal.serving.sglang`.",
        "Sampler": "A sampler of SGLang that draws with decal for requests with a chain; see `decal.serving.sglang`.",
    }
    made = type(name, (own, Base), {"__doc__": docs[name], "__module__": __name__})
    globals()[name] = made
    return made


# ---- a running engine


class Live:
    """A running SGLang, for `decal.serving.verify`."""

    name = "sglang"
    takes_seeds = True

    def __init__(
        self,
        ask: Callable[[dict[str, Any]], Any],
        info: Mapping[str, Any],
        version: str,
        tokenizer: Any,
        vocabulary: int,
        close: Callable[[], None] = lambda: None,
    ):
        self._ask, self._info, self._vocabulary, self._close = ask, info, vocabulary, close
        self.version, self.tokenizer = version, tokenizer

    @classmethod
    def start(cls, model: str, **kwargs: Any) -> Live:
        """In this process and its children, with ``sglang.Engine`` and its arguments.

        Raises:
            DecalError: SGLang isn't here.
        """
        try:
            import sglang
        except ImportError as error:
            raise DecalError(f"decal.serving.sglang.Live needs SGLang 0.5.23 or newer: {error}") from error
        settings = {"enable_custom_logit_processor": True, "disable_overlap_schedule": True, "log_level": "error", **kwargs}
        engine = sglang.Engine(model_path=model, **settings)

        def ask(body: dict[str, Any]) -> Any:
            try:
                return engine.generate(**body)
            except ValueError as error:
                raise DecalError(str(error)) from error

        tokenizer, vocabulary = _of_model(settings.get("tokenizer_path") or model, model)
        return cls(ask, engine.get_server_info(), sglang.__version__, tokenizer, vocabulary, engine.shutdown)

    @classmethod
    def connect(cls, url: str, model: str | None = None) -> Live:
        """To a server at ``url``.

        Args:
            model: where this machine has its config and tokenizer; where the server says it has them, unless given.

        Raises:
            DecalError: there is no server.
        """
        url = url.rstrip("/")
        info, about = http(f"{url}/server_info"), http(f"{url}/model_info")
        tokenizer, vocabulary = _of_model(model or about["tokenizer_path"], model or about["model_path"])
        return cls(lambda body: http(f"{url}/generate", body), info, info["version"], tokenizer, vocabulary)

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, V) log-probabilities of the model behind each text."""
        # SGLang takes the logarithm of probabilities where anything is sampled, which loses the least probable tokens.
        found = self._generate(texts, {"temperature": 1, "top_k": 1, "max_new_tokens": 1}, True)
        return torch.cat([laws for _, laws in found if laws is not None])

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """See `decal.serving.engine.Engine.write`."""
        params = {**_sampling_params(asked), "max_new_tokens": length}
        return [Written(*one) for one in self._generate(prompts, params, laws, custom_logit_processor=PROCESSOR)]

    def _generate(
        self, prompts: Sequence[Sequence[int]], params: dict[str, Any], laws: bool, **more: Any
    ) -> list[tuple[list[int], Tensor | None]]:
        body = {"sampling_params": params, **more}
        if laws:
            body |= {"return_logprob": True, "top_logprobs_num": self._vocabulary, "logprob_start_len": -1}
        # The whole vocabulary at every step of a large batch would be gigabytes.
        size = 8 if laws else max(len(prompts), 1)
        answers = []
        for start in range(0, len(prompts), size):
            answers += self._ask({**body, "input_ids": [list(prompt) for prompt in prompts[start : start + size]]})
        return [(one["output_ids"], self._laws(one["meta_info"]) if laws else None) for one in answers]

    def _laws(self, told: Mapping[str, Any]) -> Tensor:
        steps = told["output_top_logprobs"]
        laws = torch.full((len(steps), self._vocabulary), -torch.inf)
        for law, step in zip(laws, steps, strict=True):
            law[torch.tensor([token for _, token, *_ in step])] = torch.tensor([value for value, *_ in step])
        return laws.masked_fill_(laws <= DROPPED, -torch.inf)

    def notes(self) -> list[str]:
        """What of the server's configuration may act beside a chain."""
        info = self._info
        found = []
        if not info.get("enable_custom_logit_processor"):
            found.append("it runs no custom logit processors: start it with --enable-custom-logit-processor")
        if not info.get("disable_overlap_schedule") and info.get("sampling_backend") != "decal":
            found.append("it overlaps scheduling: chains that read the text need --disable-overlap-schedule or decal's backend")
        if info.get("speculative_algorithm"):
            found.append(f"it decodes speculatively by {info['speculative_algorithm']}, see decal.serving.sglang")
        if info.get("sampling_defaults", "model") == "model":
            found.append("its OpenAI endpoints take settings that aren't sent from the model's generation config")
        if info.get("preferred_sampling_params"):
            found.append(f"it adds settings to requests: {info['preferred_sampling_params']}")
        return found

    def close(self) -> None:
        """Stop the engine, if it was started for this. SGLang ends all children of the process with it."""
        self._close()


def _of_model(tokenizer: str, model: str) -> tuple[Any, int]:
    """Tokenizer, and number of tokens that the model's logits have."""
    from transformers import AutoConfig, AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer), AutoConfig.from_pretrained(model).get_text_config().vocab_size
