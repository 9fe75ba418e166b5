"""lm-evaluation-harness with chains: its tasks of generated text, drawn by a chain in place of greedy decoding.

    python -m decal.serving.lm_eval --model decal --tasks gsm8k --batch_size 16 \\
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct "chain=temperature(1.3) | min_p(0.1)" seed=17

is the command ``lm_eval`` with the model ``decal``, which takes all arguments of the model ``hf`` besides its own. From Python:

    decal.serving.lm_eval.register()
    lm_eval.simple_evaluate("decal", model_args={"pretrained": ..., "chain": "xtc(0.1, 0.5) | min_p(0.02)"}, tasks=[...])

The arguments stand apart in the command line, as above, or behind one another, ``pretrained=...,chain=xtc(0.1, 0.5),seed=17``:
commas in brackets belong to the chain, here and in a text for ``simple_evaluate``. A chain may also be in its JSON form.

What tasks say of sampling gives way to the chain as follows. ``do_sample: false``, ``temperature: 0`` and settings that do
nothing, which nearly every task has, are overridden, with a warning that says so once, and a note in the results. Anything else
that reshapes the distribution (``temperature: 0.7``, ``top_p: 0.95``, from a task or ``--gen_kwargs``) is an error, unless
``override=True`` is among the arguments of the model: then that is overridden as well.

Each request has a seed of its own, from ``seed``, task, document and repeat. So scores depend neither on the batch size nor on
what else is evaluated, up to what the logits owe to the batch. Requests for log-likelihoods (multiple choice, perplexity) are
scored by the model itself: a chain has no part in them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from torch import Tensor

from decal.samplers.chain import Chain, from_json, parse
from decal.samplers.errors import DecalError

log = logging.getLogger(__name__)

SEED = 1234
"""The harness's own default for torch."""

WARPERS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that do nothing in greedy decoding."""


class Context(str):
    """A prompt, with the seed of its request, which the harness sorts and splits into batches."""

    seed: int

    @classmethod
    def of(cls, text: str, seed: int) -> Context:
        made = cls(text)
        made.seed = seed
        return made


class _LM:
    """The model ``decal`` of the harness. All but its base class, which is the harness's model ``hf``.

    Args:
        chain: text, JSON form, or a chain.
        seed: a whole number, from which every request has its own.
        override: whether a task's settings that reshape the distribution give way to the chain, too.
        kwargs: those of ``HFLM`` (``pretrained``, ``batch_size``, ``device``, ``dtype``, ...).

    Raises:
        DecalError: there is no chain, or none that can be run here; or a seed or ``override`` is something else.
    """

    def __init__(self, *args: Any, chain: Any = None, seed: Any = SEED, override: Any = False, **kwargs: Any):
        if chain is None:
            raise DecalError("lm_eval: the model decal needs a chain, such as chain=temperature(1.3) | min_p(0.1)")
        odd = [name for name in kwargs if not name.isidentifier()]
        if odd:
            raise DecalError(f"lm_eval: {', '.join(map(repr, odd))} is no argument; pass model_args as a dict")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise DecalError(f"lm_eval: seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
        if not isinstance(override, bool):
            raise DecalError(f"lm_eval: override must be True or False, got {override!r}")
        own = _chain(chain)
        parent: Any = super()
        parent.__init__(*args, **kwargs)
        model: Any = self
        self.chain = own.for_model(model.model) if "model" in own.needs else own
        self.seed, self.override = seed, override
        self.overridden: dict[str, list[Any]] = {}
        self._seeds: list[int] | None = None
        self._told = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """From ``key=value,...``, where commas in brackets belong to the value."""
        from lm_eval.utils import handle_arg_string

        pairs = [part.partition("=") for part in _split(arg_string)]
        given = {key.strip(): value if key.strip() == "chain" else handle_arg_string(value) for key, _, value in pairs}
        return cls(**given, **{key: value for key, value in (additional_config or {}).items() if value is not None})

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raises DecalError: the harness's cache knows an answer by prompt and task alone, not by model, chain or seed."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise DecalError(
                "lm_eval: --use_cache finds answers by prompt and task settings alone, whatever chain and seed they were drawn"
                " with, and one answer for all repeats; leave it out"
            )
        parent: Any = super()
        parent.set_cache_hook(cache_hook)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts of requests, drawn by the chain. Raises DecalError if a task's settings would act beside it."""
        counts: Counter[tuple[Any, ...]] = Counter()
        tagged, said = [], {}
        for request in requests:
            text, settings = request.args
            place = request.task_name, request.doc_id, request.idx
            seed = self._seed(*place, counts[place])
            counts[place] += 1
            kept, gone = self._without_sampling(settings, request.task_name)
            tagged.append(replace(request, arguments=(Context.of(text, seed), kept)))
            said.update({(request.task_name, name): value for name, value in gone.items()})
        for (task, name), value in said.items():
            if value not in self.overridden.setdefault(name, []):
                self.overridden[name].append(value)
                log.warning("%s: %s=%r gives way to the chain %s", task, name, value, self.chain)
        parent: Any = super()
        return parent.generate_until(tagged, disable_tqdm=disable_tqdm)

    def _seed(self, *place: Any) -> int:
        """Of a request, from what tells it from others."""
        digest = blake2b(repr((self.seed, *place)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _without_sampling(self, settings: Mapping[str, Any], task: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A task's settings without those of sampling, and those among them that meant something."""
        from decal.samplers.generate import NEUTRAL

        given = {name: value for name, value in settings.items() if name in NEUTRAL and value is not None}
        said = {name: value for name, value in given.items() if value != NEUTRAL[name]}
        # As the harness has it: a temperature is what asks for sampling, unless the task says.
        greedy = not settings.get("do_sample", settings.get("temperature"))
        beside = {name: value for name, value in said.items() if name not in (WARPERS if greedy else ())}
        if beside.get("temperature") == 0:
            del beside["temperature"]
        if beside and not self.override:
            named = ", ".join(f"{name}={value!r}" for name, value in beside.items())
            raise DecalError(
                f"lm_eval: {task} asks for {named} beside the chain {self.chain}; put it into the chain, or pass override=True"
                " to let the chain replace it"
            )
        if settings.get("do_sample") is False:
            said["do_sample"] = False
        return {name: value for name, value in settings.items() if name not in NEUTRAL and name != "do_sample"}, said

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """See ``HFLM``. Notes whose prompts the next batch has."""
        self._seeds = [one.seed for one in strings if isinstance(one, Context)]
        parent: Any = super()
        return parent.tok_batch_encode([str(one) for one in strings], *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        seeds, self._seeds = self._seeds, None
        if seeds is None or len(seeds) != len(context):
            raise DecalError(
                "lm_eval: a batch of prompts without seeds; this version of the harness builds batches another way"
            )
        # The harness has made greedy decoding of what says nothing of sampling.
        rest = {name: value for name, value in generation_kwargs.items() if name not in ("do_sample", "temperature")}
        parent: Any = super()
        # Told by the attention mask where a prompt begins, as some models' padding also begins texts.
        return parent._model_generate(context, max_length, stop, **self.chain.generate_kwargs(seeds=seeds, direct=True, **rest))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """See ``HFLM``; says once that the chain has no part in it."""
        self._tell()
        parent: Any = super()
        return parent.loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """See ``HFLM``; says once that the chain has no part in it."""
        self._tell()
        parent: Any = super()
        return parent.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _tell(self) -> None:
        if not self._told:
            log.warning("log-likelihoods are the model's own: the chain %s has no part in them", self.chain)
        self._told = True

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model: the chain, its seed, and the settings of tasks that gave way to it."""
        parent: Any = super()
        return {
            **parent.get_model_info(),
            "decal_chain": str(self.chain),
            "decal_seed": self.seed,
            "decal_overridden": {name: list(values) for name, values in self.overridden.items()},
        }


def _chain(given: Any) -> Chain:
    """A chain that is a text, the JSON form, what a command line made of that, or a chain."""
    if isinstance(given, Mapping):
        given = json.dumps(given)
    if isinstance(given, str):
        given = from_json(given) if given.lstrip().startswith("{") else parse(given)
    if not isinstance(given, Chain):
        raise DecalError(f"lm_eval: the chain is a text such as 'temperature(1.3) | min_p(0.1)', got {given!r}")
    if given.per_row is not None:
        raise DecalError(f"lm_eval: all requests have one chain, got a list of {given.per_row} in {given}")
    for need, one in given.missing.items():
        if need == "ends":
            raise DecalError(f"lm_eval: {given} reads {one.what}; write their ids into it, such as ends=(2, 198)")
        if need != "model":
            raise DecalError(f"lm_eval: {given} reads {one.what}, which tasks of the harness don't give")
    return given


def _split(text: str) -> list[str]:
    """``text`` at its commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in map(str.strip, parts) if part]


def register() -> None:
    """Make the model ``decal`` known to the harness. Raises DecalError if that is not installed."""
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise DecalError(f"decal.serving.lm_eval needs lm-evaluation-harness (pip install lm_eval[hf]): {error}") from error
    if "decal" not in model_registry:
        model_registry.register("decal", target=f"{__spec__.name if __spec__ else __name__}:LM")


def main() -> None:
    """The command ``lm_eval``, with the model ``decal``."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def __getattr__(name: str) -> Any:
    # The class is made when it is asked for, as its base is the harness's.
    if name != "LM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise DecalError(f"decal.serving.lm_eval.LM needs lm-evaluation-harness: {error}") from error
    made = type(name, (_LM, HFLM), {"__doc__": _LM.__doc__, "__module__": __name__})
    globals()[name] = made
    return made


if __name__ == "__main__":
    main()
