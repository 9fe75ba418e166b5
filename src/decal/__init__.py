"""Decoding strategies for language models, with exact measures of what each does to validity and diversity.

    from decal import min_p, flatten, temperature
    chain = temperature(1.4) | min_p(0.1) | flatten(0.7)
    model.generate(**inputs, **chain.generate_kwargs())

Every declared rule is an attribute of this package under its own name; ``decal.RULES`` lists them.

Layers, each knowing only those before it: ``decal.kernels`` (how things are computed), ``decal.samplers`` (what to keep and
how to reshape), ``decal.serving`` (chains in serving engines), ``decal.eval`` (what that does to validity and diversity; needs
the extra ``decal[eval]``).
"""

from decal import samplers as samplers
from decal.samplers import calibrated as calibrated
from decal.samplers.chain import Chain as Chain
from decal.samplers.chain import from_json as from_json
from decal.samplers.chain import parse as parse
from decal.samplers.context import History as History
from decal.samplers.errors import DecalError as DecalError
from decal.samplers.presets import from_llama_cpp as from_llama_cpp
from decal.samplers.presets import from_mlx_lm as from_mlx_lm
from decal.samplers.presets import from_text_generation_webui as from_text_generation_webui
from decal.samplers.presets import from_transformers as from_transformers
from decal.samplers.presets import from_vllm as from_vllm
from decal.samplers.presets import preset as preset
from decal.samplers.presets import tokens_with as tokens_with
from decal.samplers.row import Affine as Affine
from decal.samplers.row import Band as Band
from decal.samplers.row import Keep as Keep
from decal.samplers.row import Map as Map
from decal.samplers.row import Row as Row
from decal.samplers.rule import RULES as RULES
from decal.samplers.rule import Choice as Choice
from decal.samplers.rule import Feedback as Feedback
from decal.samplers.rule import Numbers as Numbers
from decal.samplers.rule import Param as Param
from decal.samplers.rule import Rule as Rule
from decal.samplers.rule import Tokens as Tokens
from decal.samplers.rule import load_plugins as _load_plugins
from decal.samplers.rule import rule as rule
from decal.samplers.valid_set import ValidSet as ValidSet
from decal.samplers.views import Prompts as Prompts

__version__ = "0.1.0"


def __getattr__(name: str) -> Rule:
    if name in RULES:
        return RULES[name]
    if name == "serving":
        raise AttributeError("decal.serving has a module for each engine: import decal.serving.vllm, for one")
    raise AttributeError(f"module 'decal' has no attribute {name!r}; its rules are {', '.join(sorted(RULES))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *RULES])


_load_plugins()  # last, because they import this package

__all__ = [name for name in __dir__() if not name.startswith("_") and name not in ("samplers", "calibrated")]
