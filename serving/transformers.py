"""Chains in transformers as it serves: continuous batching, generation configs, hub-style generate functions, pipelines.

Continuous batching (``model.generate_batch``, ``generate(cache_implementation="paged")``) takes no logits processors: those
given to ``generate`` are dropped without a word, and so is what the generation config asks for and it can't do. So ask here,
with one chain for all prompts or one for each:

    outputs = generate_batch(model, prompts, ["min_p(0.1)", "dry(0.8) | mirostat(3.0)"], seeds=[17, 4], max_new_tokens=40)

    with continuous_batching(model, tokenizer) as manager:  # requests that come one by one
        manager.add_request(ids, max_new_tokens=40, decal="temperature(1.3) | min_p(0.1)", decal_seed=17)

Settings for stacks that read a ``generation_config.json``, and a folder for ``generate(custom_generate=folder)``:

    generation_config(decal.parse("temperature(0.7) | top_p(0.9)")).save_pretrained(folder)
    save_custom_generate(folder, decal.parse("min_p(0.02) | mirostat(3.0)"))

Pipelines pass on to ``generate`` what they don't know, so arguments for it work there as they are:

    pipe = pipeline("text-generation", model, tokenizer=tokenizer)
    pipe(prompts, batch_size=len(prompts), **chain.generate_kwargs(seeds=seeds, pad_token_id=tokenizer.pad_token_id))

A pipeline calls ``generate`` once for each batch of ``batch_size`` prompts (1 unless given) with the same arguments. So seeds,
and parameters by row, are for one batch: make ``batch_size`` the number of prompts, or call it once for each prompt. Rules of
the tokens so far want ``pad_token_id`` where prompts of different lengths share a batch, and a tokenizer that pads on the left.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from decal.samplers.chain import Chain, from_json, parse
from decal.samplers.context import History
from decal.samplers.errors import DecalError
from decal.samplers.presets import from_transformers
from decal.samplers.rule import Step
from decal.serving.batch import Group, Member, grouped, histories, process, warm_up
from decal.serving.engine import Written
from decal.serving.request import KEYS, Request

PAGE = 16
"""Tokens of a page where decal chooses the cache."""

# ---- continuous batching

LOST: Mapping[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": ([], ""),
    "bad_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "begin_suppress_tokens": ([],),
    "watermarking_config": (),
    "token_healing": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (0,),
    "assistant_early_exit": (0,),
    "use_mtp": (False,),
}
"""Settings of ``generate`` that continuous batching does not follow, and their values that ask for nothing."""

ROWWISE = ("SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor")
"""The engine's own processors that read nothing but the row, so that they are right where it gives them no text."""


class Admitted:
    """A request on its way through the engine, which copies what it is given."""

    def __init__(self, member: Member):
        self.member = member

    def __deepcopy__(self, memo: Any) -> Admitted:
        return self


class _Processor:
    """Applies the chain of each request to its row. All but its base class, which is transformers'.

    The engine tells which requests the rows are of just before a step, and asks for the scores within it.
    """

    supported_kwargs: ClassVar = {"decal": Admitted}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._states: list[Any] = []
        self._groups: tuple[list[Member | None], list[Group]] = [], []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing goes through the engine's tensor of arguments."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Learn which requests the next rows are of."""
        self._states = [request.state for request in requests_with_new_token]
        admitted = [state.logit_processor_kwargs.get("decal") for state in self._states]
        members = [one and one.member for one in admitted]
        if members != self._groups[0]:
            self._groups = members, grouped(members)
        return torch.zeros(len(members), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(N, V), the rows of requests that only take in more of their prompt behind the others."""
        return process(scores, self._groups[1], self._lengths, self._histories)

    @property
    def names(self) -> list[str]:
        """Of the requests that the rows are of."""
        return [state.request_id for state in self._states]

    def _lengths(self, group: Group) -> Tensor:
        states = [self._states[row] for row in group.rows.tolist()]
        return torch.tensor([[len(state.initial_tokens) + len(state.generated_tokens)] for state in states])

    def _histories(self, group: Group) -> History:
        return histories(group, [_text(self._states[row]) for row in group.rows.tolist()])


def _text(state: Any) -> tuple[list[int], list[int]]:
    """Prompt and output of a request. One that was paused has been made to begin with all it had."""
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return state.initial_tokens[:prompt], [*state.initial_tokens[prompt:], *state.generated_tokens]


class _Manager:
    """Admits requests with the keys of `decal.serving.request.KEYS`. All but its base class, which is transformers'."""

    tokenizer: Any = None

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        **asked: Any,
    ) -> str | None:
        """Add a request, whose number comes back. See ``ContinuousBatchingManager.add_request`` of transformers.

        Args:
            input_ids: the prompt, at least one token.
            max_new_tokens: that of the generation config if None; without one there as well, there is no limit.
            eos_token_id: that of the generation config if None; of a chain that follows answers, what ends them.
            asked: keys of `decal.serving.request.KEYS`; ``decal`` may be a chain as well. Without any, tokens are drawn from
                the model's own distribution.

        Raises:
            DecalError: an unknown key, or a request that can't be done.
        """
        manager: Any = self
        limit = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        request = _request(asked, self.tokenizer)
        tokens = _admit(manager.model, input_ids, limit, request)
        if eos_token_id is None and request is not None and request.chain.guide is not None and request.chain.guide.stop:
            eos_token_id = list(request.chain.guide.stop)
        own = {} if request is None else {"decal": Admitted(Member.of(request))}
        parent: Any = super()
        return parent.add_request(tokens, request_id, max_new_tokens, streaming, record_timestamps, eos_token_id, **own)


class _Several:
    """Calls the processors one after the other. All but its base class, which is transformers'.

    Attributes:
        told: if there is one, the log-probabilities that tokens are drawn from go there, by request.
    """

    told: dict[str, list[Tensor]] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        parent: Any = super()
        scores = parent.__call__(input_ids, scores, logits_processor_args)
        if self.told is not None:
            names = next(one for one in self.logits_processor if isinstance(one, _Processor)).names  # type: ignore[attr-defined]
            for name, row in zip(names, scores[: len(names)].float().log_softmax(-1).cpu(), strict=True):
                self.told.setdefault(name, []).append(row)
        return scores


@cache
def _classes() -> tuple[type, type, type]:
    """A processor, a list of processors and a manager. Raises DecalError if the installed transformers has no such bases."""
    try:
        from transformers.generation.continuous_batching import cb_logits_processors as processors
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

        one, several = processors.ContinuousBatchingLogitsProcessor, processors.ContinuousBatchingLogitsProcessorList
    except (ImportError, AttributeError) as error:
        raise DecalError(
            f"continuous batching with chains needs a transformers whose continuous batching has processors by request, such as"
            f" 5.23; {version('transformers')} is installed: {error}"
        ) from error
    return (
        type("Processor", (_Processor, one), {}),
        type("Processors", (_Several, several), {}),
        type("Manager", (_Manager, ContinuousBatchingManager), {}),
    )


def _request(asked: Mapping[str, Any], tokenizer: Any) -> Request | None:
    """What keys ask for, ``decal`` being a text or a chain."""
    unknown = [key for key in asked if not key.startswith("decal")]
    if unknown:
        raise DecalError(
            f"{', '.join(unknown)}: no key of decal's (known are {', '.join(KEYS)}); what would reshape the distribution beside"
            " the chain belongs into it"
        )
    chain = asked.get("decal")
    if not isinstance(chain, Chain):
        request = Request.of(asked)
        if request is None or request.answers is None:
            return request
        if tokenizer is None:
            raise DecalError("decal_answers need the tokenizer: continuous_batching(model, tokenizer)")
        return request.given(tokenizer)
    if chain.per_row is not None:
        raise DecalError(f"a request has one value for each parameter, got a list of {chain.per_row} in {chain}")
    if "prompts" in chain.needs:
        raise DecalError(f"{chain} reads other prompts, which continuous batching leaves no room for; use model.generate")
    for one in chain.missing.values():
        raise DecalError(f"the chain {chain} {one.missing}")
    # A chain in hand has its answers with it; the rest is as in a text.
    return Request(chain, Request.of({**asked, "decal": "temperature(1)"}).seed)  # type: ignore[union-attr]


def _admit(model: Any, input_ids: Any, max_new_tokens: Any, request: Request | None) -> list[int]:
    """The prompt as a list. Raises DecalError unless the request can be done on the model."""
    tokens = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    vocabulary = model.config.get_text_config().vocab_size
    if not tokens or not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise DecalError(f"a prompt is a list of at least one token id below {vocabulary}, got {reprlib.repr(tokens)}")
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise DecalError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
    if request is None:
        return tokens
    guide, weights = request.chain.guide, request.chain.weights
    if guide is not None and guide.largest >= vocabulary:
        raise DecalError(f"the answers have the token {guide.largest}, the model {vocabulary} tokens: another tokenizer's?")
    if guide is not None and max_new_tokens is not None and max_new_tokens < guide.longest:
        raise DecalError(f"the longest answer takes {guide.longest} tokens, got max_new_tokens={max_new_tokens}")
    if weights is not None and len(weights.head) != vocabulary:
        raise DecalError(f"the chain's model has {len(weights.head)} output embeddings, this one {vocabulary} tokens")
    return tokens


def _settings(model: Any, given: Mapping[str, Any]) -> Any:
    """The generation config for a manager: the model's own, with all that reshapes the distribution switched off."""
    from decal.samplers.generate import NEUTRAL

    beside = sorted(set(given) & {*NEUTRAL, "logits_processor", "generation_config", "do_sample", "max_length"})
    if beside:
        raise DecalError(f"{', '.join(beside)} would act beside the chains, or not at all; put it into them")
    config = deepcopy(model.generation_config)
    neutral = {name: value for name, value in NEUTRAL.items() if hasattr(config, name)}
    unknown = config.update(**neutral, **given, do_sample=True, renormalize_logits=False)
    if unknown:
        raise DecalError(f"{', '.join(unknown)}: no setting of generation")
    values = {name: getattr(config, name, None) for name in LOST}
    lost = [f"{name}={value!r}" for name, value in values.items() if value is not None and value not in LOST[name]]
    if lost:
        raise DecalError(
            f"continuous batching would not follow {', '.join(lost)}; use model.generate, or switch it off in the model's"
            " generation config. Several texts of a prompt are several requests."
        )
    return config


def _processors(model: Any, config: Any) -> list[Any]:
    """What the generation config still asks for, before the chains."""
    own = list(model._get_logits_processor(config, device=model.device))
    unfit = [name for name in (type(one).__name__ for one in own) if name not in ROWWISE]
    if unfit:
        raise DecalError(f"continuous batching can't do {', '.join(unfit)}, which the generation config asks for")
    return own


def _batching(given: Any) -> Any:
    """The continuous batching config, without what runs a recorded step again instead of the step."""
    from transformers import ContinuousBatchingConfig

    config = deepcopy(given) if given is not None else ContinuousBatchingConfig()
    graphs = config.use_cuda_graph if isinstance(config.use_cuda_graph, tuple) else (config.use_cuda_graph,)
    wrong = [name for name in ("use_async_batching", "varlen_compile_config", "decode_compile_config") if getattr(config, name)]
    wrong += ["use_cuda_graph"] if any(graphs) else []
    wrong += ["default_compile_level"] if config.default_compile_level else []
    if wrong:
        raise DecalError(
            f"{', '.join(wrong)}: a chain of a request is chosen anew in each step, so steps can't be recorded, compiled or"
            " prepared ahead of the tokens of the last one"
        )
    config.use_cuda_graph = config.use_async_batching = False
    return config


def _manager(model: Any, tokenizer: Any, batching: Any, hints: Any, settings: Mapping[str, Any]) -> Any:
    processor, several, manager = _classes()
    if getattr(model, "_device_mesh", None) is not None:
        raise DecalError("continuous batching with chains runs on one device, and this model is spread over several")
    config, batching = _settings(model, settings), _batching(batching)
    if config.eos_token_id is None:
        config.eos_token_id = -1  # none, as the engine says it
    own = _processors(model, config)
    made = manager(model=model, generation_config=config, continuous_batching_config=batching, workload_hints=hints)
    resolved = made.continuous_batching_config
    if resolved.varlen_compile_config is not None or resolved.decode_compile_config is not None:
        raise DecalError("the model's config has a compile_config, and steps with chains can't be compiled; set it to None")
    # It is handed to the loop that generates when that starts.
    made.logit_processor = several([*own, processor()])
    made.logit_processor.tensors_required = 1
    made.tokenizer = tokenizer
    warm_up(model.device)
    return made


@contextmanager
def continuous_batching(
    model: Any, tokenizer: Any = None, *, continuous_batching_config: Any = None, workload_hints: Any = None, **settings: Any
) -> Iterator[Any]:
    """A running ``ContinuousBatchingManager`` of transformers, whose requests have chains of their own.

    Its ``add_request`` takes the keys of `decal.serving.request.KEYS`. Requests of the same rules are processed together; rules
    of the tokens so far, with a memory, and seeds work, whoever comes and goes. All of the model's generation config that
    reshapes the distribution is switched off. CUDA graphs and asynchronous batching are off as well.

    While it runs, use the model elsewhere only within ``with manager.pause()``: a step of the engine makes the attention of all
    the model's passes look ahead, for as long as it takes, unless it is flash attention.

    Args:
        model: a causal language model of transformers, on one device.
        tokenizer: its tokenizer, for requests with ``decal_answers``.
        continuous_batching_config, workload_hints: see transformers. On a CPU its cache takes 0.6 of the free memory unless
            ``num_blocks`` and ``max_batch_tokens`` are given.
        settings: of generation (``eos_token_id``, ``suppress_tokens``, ``max_new_tokens``).

    Raises:
        DecalError: a setting would act beside the chains, or would not be followed; or transformers is too old.
    """
    manager = _manager(model, tokenizer, continuous_batching_config, workload_hints, settings)
    done = False
    try:
        with torch.no_grad():
            manager.start()
            yield manager
            done = True
    finally:
        manager.stop(hard_stop=not done)
        manager.destroy()


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    chains: Chain | str | Sequence[Chain | str],
    *,
    seeds: Sequence[int] | None = None,
    max_new_tokens: int = 20,
    continuous_batching_config: Any = None,
    **settings: Any,
) -> list[Any]:
    """What ``model.generate_batch`` does, with the chain of each request: a ``GenerationOutput`` for each prompt, in order.

    Args:
        inputs: prompts, lists of at least one token id.
        chains: one for all, or one for each prompt; as text, or as a chain, which may have embeddings (`for_model`) or answers
            (`for_answers`), but no parameters by row and no other prompts.
        seeds: one whole number for each prompt. Tokens are then drawn by decal, as in ``generate_kwargs(seeds=...)``: the same
            text alone, in any batch, and in ``model.generate``, up to what its logits owe to the batch.
        max_new_tokens: of each prompt.
        continuous_batching_config, settings: as in `continuous_batching`.

    Raises:
        DecalError: as in `continuous_batching`; or chains, seeds and prompts don't go together; or a request can't be done.
        RuntimeError: the engine failed, with its words.
    """
    if isinstance(inputs, Mapping) or any(isinstance(row, (str, int)) for row in inputs):
        raise DecalError(
            "generate_batch takes a list of prompts, each a list of token ids, such as tokenizer(texts)['input_ids'] without"
            f" padding, got {reprlib.repr(inputs)}"
        )
    if seeds is not None and not isinstance(seeds, (Sequence, Tensor)):
        raise DecalError(f"seeds are a list of whole numbers, one for each prompt, got {seeds!r}")
    inputs = [row.tolist() if isinstance(row, Tensor) else list(row) for row in inputs]
    each = [chains] * len(inputs) if isinstance(chains, (Chain, str)) else list(chains)
    # Texts name no answers here, so a chain that follows some has to bring them.
    each = [parse(chain) if isinstance(chain, str) and "answers" in parse(chain).needs else chain for chain in each]
    for name, given in (("chains", each), *((("seeds", seeds),) if seeds is not None else ())):
        if len(given) != len(inputs):
            raise DecalError(f"there are {len(inputs)} prompts and {len(given)} {name}; give one for each")
    asked = [{"decal": chain} | ({} if seeds is None else {"decal_seed": seeds[i]}) for i, chain in enumerate(each)]
    for ids, one in zip(inputs, asked, strict=True):
        _admit(model, ids, max_new_tokens, _request(one, None))
    if not inputs:
        return []
    from transformers.generation.continuous_batching.utils import WorkloadHints

    hints = WorkloadHints(
        max_prompt_length=max(map(len, inputs)), max_generated_length=max_new_tokens, num_requests=len(inputs)
    )
    batch = continuous_batching(model, continuous_batching_config=continuous_batching_config, workload_hints=hints, **settings)
    with batch as manager:
        names = [manager.add_request(ids, max_new_tokens=max_new_tokens, **one) for ids, one in zip(inputs, asked, strict=True)]
        return _collect(manager, names)


def _collect(manager: Any, names: Sequence[str]) -> list[Any]:
    """The outputs of requests once all are done. Raises RuntimeError if one failed."""
    found: dict[str, Any] = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            found[result.request_id] = result
        elif result is None and not manager.is_running():
            break
    for place, name in enumerate(names):
        if name not in found or found[name].error is not None:
            error = found[name].error if name in found else manager.background_thread_status.fatal_error
            raise RuntimeError(f"continuous batching failed at prompt {place}: {error}")
    return [found[name] for name in names]


# ---- generation configs

NATIVE: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "repetition_penalty": ("repetition_penalty", "r", {"form": "legacy", "window": 0, "scope": "all"}),
    "no_repeat_ngram": ("no_repeat_ngram_size", "n", {}),
    "temperature": ("temperature", "t", {}),
    "top_h": ("top_h", "alpha", {"variant": "cumulative"}),
    "top_k": ("top_k", "k", {}),
    "top_p": ("top_p", "p", {}),
    "min_p": ("min_p", "p", {}),
    "typical": ("typical_p", "p", {}),
    "epsilon": ("epsilon_cutoff", "eps", {}),
    "eta": ("eta_cutoff", "eps", {}),
}
"""Rules that ``generate`` has itself, in the order in which it applies them: the setting, the parameter it holds, and what
the others have to be."""


def generation_config(chain: Chain | str) -> Any:
    """A ``GenerationConfig`` under which ``generate`` without decal does what the chain does: the inverse of
    `decal.from_transformers`.

    Save it (``save_pretrained(folder)``) as a preset for any stack that reads a ``generation_config.json``. It differs from the
    chain in ties: top-p keeps only some of the tokens tied at its cutoff, and greedy decoding, which is what a last
    ``temperature(0)`` becomes, the first of several most probable tokens; and where ``no_repeat_ngram`` bans every token,
    transformers keeps none. Passed to the ``generate`` of a model whose own config has a ``sequence_bias``, a
    ``guidance_scale``, a ``top_h`` or an ``exponential_decay_length_penalty``, that comes on top.

    Raises:
        DecalError: a step is none of `NATIVE` with those values, stands twice, or before one that transformers applies earlier;
            it names all such steps.
    """
    from transformers import GenerationConfig

    from decal.samplers.generate import NEUTRAL

    if isinstance(chain, str):
        chain = parse(chain)
    steps = [step for step in chain.steps if not step.is_off]
    wrong = [f"{step}: {why}" for step, why in ((step, _foreign(step)) for step in steps) if why]
    order = list(NATIVE)
    for number, step in enumerate(steps):
        before = steps[number - 1] if number else None
        if before is None or before.rule.name not in order or step.rule.name not in order:
            continue
        if before.rule is step.rule:
            wrong.append(f"{step}: transformers has one of them")
        elif order.index(before.rule.name) > order.index(step.rule.name):
            wrong.append(f"{before} before {step}: transformers applies {step.rule.name} first")
        elif before.rule.name == "temperature" and before.values["t"] == 0:
            wrong.append(f"{step} after {before}: transformers decodes greedily, and cuts nothing")
    if wrong:
        raise DecalError(f"no settings of transformers are {chain}: {'; '.join(wrong)}. It applies {', '.join(order)}")
    settings = {NATIVE[step.rule.name][0]: step.values[NATIVE[step.rule.name][1]] for step in steps}
    if settings.get("temperature") == 0:
        # Sampling's settings beside greedy decoding are an error to transformers.
        made = GenerationConfig(do_sample=False, **{name: value for name, value in settings.items() if name != "temperature"})
    else:
        known = GenerationConfig()
        neutral = {name: value for name, value in NEUTRAL.items() if hasattr(known, name) and value is not None}
        made = GenerationConfig(do_sample=True, **neutral | {"min_p": 0.0} | settings)
    again = [step for step in from_transformers(made).chain.steps if not step.is_off]
    assert list(map(str, again)) == list(map(str, steps)), (again, steps)
    return made


def _foreign(step: Step) -> str | None:
    """Why transformers can't do a step, or None if it can."""
    if step.rule.name not in NATIVE:
        return "not in transformers"
    if step.per_row is not None:
        return "a config has one value for all rows"
    _, param, others = NATIVE[step.rule.name]
    for name, wanted in others.items():
        if step.values[name] != wanted:
            return f"transformers has it with {name}={wanted}"
    value: Any = step.values[param]
    if step.rule.name in ("top_h", "top_p", "typical", "epsilon", "eta") and not 0 < value < 1:
        return f"transformers needs a value between 0 and 1 for it, got {value}"
    return None


# ---- generate functions in a folder

CODE = '''"""Text generation through a chain of decal.

    model.generate(**inputs, custom_generate=..., trust_remote_code=True, seeds=[17, 4])

``seeds``, one whole number for each prompt, may be left out. Settings that reshape the distribution are refused.
"""

from decal.serving.transformers import custom_generate

CHAIN = {chain!r}


def generate(model, seeds=None, **kwargs):
    return custom_generate(model, CHAIN, seeds, kwargs)
'''
"""What `save_custom_generate` writes: the chain is its JSON, and all else is the same for every chain."""


def save_custom_generate(folder: str | Path, chain: Chain | str) -> Path:
    """Write ``custom_generate/generate.py`` and ``requirements.txt`` into a folder, for a hub repository or as it is.

    ``model.generate(**inputs, custom_generate=folder, trust_remote_code=True)`` then draws through the chain, which is told of
    each token as soon as it is drawn (``generate_kwargs(direct=True)``), and takes ``seeds``. Embeddings, for chains that read
    them, are those of the model that generates.

    Returns:
        The written ``generate.py``.

    Raises:
        DecalError: the chain follows answers, reads other prompts, or has to be told what ends a text: that isn't in its JSON
            form, but a parameter ``ends=(2, 198)`` is.
    """
    if isinstance(chain, str):
        chain = parse(chain)
    unfit = chain.needs & {"answers", "prompts", "ends"}
    if unfit:
        raise DecalError(f"{chain} reads {' and '.join(sorted(unfit))}, which a saved chain doesn't carry")
    written = Path(folder) / "custom_generate" / "generate.py"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(CODE.format(chain=chain.to_json()), encoding="utf-8")
    written.with_name("requirements.txt").write_text(f"decal>={version('decal')}\n", encoding="utf-8")
    return written


def custom_generate(model: Any, chain: str, seeds: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a folder of `save_custom_generate` runs: ``model.generate`` with the chain (JSON) and the caller's arguments.

    Raises:
        DecalError: as `Chain.generate_kwargs` with ``direct=True``.
    """
    own = from_json(chain)
    if "model" in own.needs:
        own = own.for_model(model)
    # generate hands on all of its parameters, most of which nobody gave; None elsewhere means something.
    parameters = inspect.signature(type(model).generate).parameters
    given = {name: value for name, value in kwargs.items() if value is not None or name not in parameters}
    return model.generate(**own.generate_kwargs(seeds=seeds, direct=True, **given))


# ---- verification


class Live:
    """transformers with a model in this process, for `decal.serving.verify`. See `decal.serving.engine.Engine`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        batching: ``"generate"`` writes by ``model.generate``, in one batch with padding; ``"continuous"`` by `generate_batch`.
        continuous_batching_config: for the latter; by default its cache has room for the prompts at hand.

    Raises:
        DecalError: another way of batching.
    """

    name = "transformers"
    takes_seeds = True

    def __init__(self, model: Any, tokenizer: Any, batching: str = "generate", continuous_batching_config: Any = None):
        if batching not in ("generate", "continuous"):
            raise DecalError(f"batching must be generate or continuous, got {batching!r}")
        if batching == "continuous":
            self.name = "transformers, continuous batching"
        self.model, self.tokenizer, self.batching, self._config = model, tokenizer, batching, continuous_batching_config
        self.version = version("transformers")

    @classmethod
    def start(cls, model: str, batching: str = "generate", **kwargs: Any) -> Live:
        """With a model of the hub or a folder, in float32 unless ``dtype`` is given; ``kwargs`` are for ``from_pretrained``."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32} | kwargs)
        return cls(loaded.eval(), AutoTokenizer.from_pretrained(model), batching)

    @torch.no_grad()
    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, V) logits behind each text; texts that continue one another are read in one pass."""
        found: dict[tuple[int, ...], Tensor] = {}
        longest: tuple[int, ...] = ()
        # In this order every text stands right before one that continues it, if there is any.
        for text in sorted({tuple(text) for text in texts}, reverse=True):
            if longest[: len(text)] != text:
                longest = text
                passed = self.model(torch.tensor([text], device=self.model.device), use_cache=False).logits[0].float().cpu()
            found[text] = passed[len(text) - 1]
        return torch.stack([found[tuple(text)] for text in texts])

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """See `decal.serving.engine.Engine`."""
        request = _request(asked, self.tokenizer) or Request(parse("temperature(1)"))
        # Room for a whole answer is asked of users; here the rest of it is left out.
        guide = request.chain.guide
        room = length if guide is None else max(length, guide.longest)
        written = (self._continuous if self.batching == "continuous" else self._generate)(prompts, request, room, laws)
        return [Written(tokens[:length], None if law is None else law[:length]) for tokens, law in written]

    def _generate(self, prompts: Sequence[Sequence[int]], request: Request, length: int, laws: bool) -> list[Written]:
        # A token that no prompt begins with, so that padding is known from text.
        begin = {prompt[0] for prompt in prompts}
        pad = next(token for token in range(len(begin) + 1) if token not in begin)
        longest = max(map(len, prompts))
        ids = torch.tensor([[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts], device=self.model.device)
        real = torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]).to(ids)
        seeds = None if request.seed is None else [request.seed] * len(prompts)
        kwargs = request.chain.generate_kwargs(
            seeds=seeds, max_new_tokens=length, pad_token_id=pad, return_dict_in_generate=True, output_scores=laws
        )
        out = self.model.generate(ids, attention_mask=real, **kwargs)
        ends = kwargs.get("eos_token_id", self.model.generation_config.eos_token_id)
        scores = torch.stack(out.scores, 1).float().log_softmax(-1).cpu() if laws else None
        written = []
        for row, new in enumerate(out.sequences[:, longest:].tolist()):
            tokens = _until(new, ends)
            written.append(Written(tokens, None if scores is None else scores[row, : len(tokens)]))
        return written

    def _continuous(self, prompts: Sequence[Sequence[int]], request: Request, length: int, laws: bool) -> list[Written]:
        config = self._config or self._room(prompts, length)
        with continuous_batching(self.model, continuous_batching_config=config) as manager:
            told: dict[str, list[Tensor]] = {}
            if laws:
                manager.logit_processor.told = told
            asked = {"decal": request.chain} | ({} if request.seed is None else {"decal_seed": request.seed})
            names = [manager.add_request(list(prompt), max_new_tokens=length, **asked) for prompt in prompts]
            outputs = _collect(manager, names)
        tokens = [list(output.generated_tokens) for output in outputs]
        return [
            Written(one, torch.stack(told[name])[: len(one)] if laws else None) for name, one in zip(names, tokens, strict=True)
        ]

    def _room(self, prompts: Sequence[Sequence[int]], length: int) -> Any:
        """A cache for the prompts at hand, where the engine would take most of the memory; elsewhere its own choice."""
        from transformers import ContinuousBatchingConfig

        if self.model.device.type != "cpu":
            return None
        blocks = sum((len(prompt) + length) // PAGE + 2 for prompt in prompts)
        longest = max(map(len, prompts))
        return ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=max(256, longest, len(prompts)))

    def notes(self) -> list[str]:
        """What of the model's generation config is done beside a chain, as it bans or demands tokens."""
        config = self.model.generation_config
        found = {name: getattr(config, name, None) for name in ("suppress_tokens", *LOST)}
        return [
            f"the model's generation config has {name}={value!r}"
            for name, value in found.items()
            if value is not None and value not in LOST.get(name, ([],))
        ]

    def close(self) -> None:
        """Nothing runs between calls."""


def _until(tokens: Sequence[int], ends: Any) -> list[int]:
    """Up to the first end token, and that."""
    stop = {ends} if isinstance(ends, int) else set(ends or ())
    return list(tokens[: next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))])
