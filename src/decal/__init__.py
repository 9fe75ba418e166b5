"""Decoding strategies for language models, with exact measures of what each does to validity and diversity.

    from decal import min_p, flatten, temperature
    chain = temperature(1.4) | min_p(0.1) | flatten(0.7)
    model.generate(**inputs, **chain.generate_kwargs())

Every declared rule is an attribute of this package under its own name; ``decal.RULES`` lists them.

Layers, each knowing only those before it: ``decal.kernels`` (how things are computed), ``decal.samplers`` (what to keep and
how to reshape), ``decal.eval`` (what that does to validity and diversity; needs the extra ``decal[eval]``).
"""

from decal import samplers as samplers
from decal.samplers.chain import Chain as Chain
from decal.samplers.chain import from_json as from_json
from decal.samplers.chain import parse as parse
from decal.samplers.errors import DecalError as DecalError
from decal.samplers.row import Affine as Affine
from decal.samplers.row import Band as Band
from decal.samplers.rule import RULES as RULES
from decal.samplers.rule import Param as Param
from decal.samplers.rule import Rule as Rule
from decal.samplers.rule import rule as rule

__version__ = "0.1.0"


def __getattr__(name: str) -> Rule:
    if name in RULES:
        return RULES[name]
    raise AttributeError(f"module 'decal' has no attribute {name!r}; its rules are {', '.join(sorted(RULES))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *RULES])
