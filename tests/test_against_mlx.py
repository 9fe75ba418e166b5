"""decal against the samplers of mlx-lm, and where they differ on purpose: ties.

mlx-lm works in float32, so tokens at the very threshold may differ: what it keeps must lie between our kept sets for the
parameter moved by 1e-4 of itself either way. XTC there asks for more than the threshold, which is no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from against import alive, check_between, fresh_rows, fresh_texts
from torch import Tensor

import decal
from decal import History

pytestmark = pytest.mark.mlx

CUTS: dict[str, tuple[float, ...]] = {
    "top_k": (1, 3, 50, 400),
    "top_p": (0.05, 0.5, 0.9, 0.99),
    "min_p": (0.001, 0.1, 0.5, 0.9),
    "xtc": (0.01, 0.05, 0.2, 0.3),
}
CASES = [(name, value) for name, chosen in CUTS.items() for value in chosen]


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    import mlx.core as mx
    from mlx_lm import sample_utils

    mx.disable_compile()  # on a CPU it would call a C++ compiler
    return SimpleNamespace(mx=mx, utils=sample_utils)


def theirs_of(lib: SimpleNamespace, name: str, value: float) -> Callable[[Tensor], Tensor]:
    """mlx-lm's filter, which takes log-probabilities."""
    arguments: dict[str, tuple[Any, ...]] = {"top_k": (int(value),), "xtc": (1.0, value, [])}

    def apply(z: Tensor) -> Tensor:
        answer = getattr(lib.utils, f"apply_{name}")(lib.mx.array(z.log_softmax(-1).numpy()), *arguments.get(name, (value,)))
        return alive(torch.from_numpy(np.array(answer)))

    return apply


def ours_of(name: str, value: float) -> decal.Chain:
    return decal.xtc(value, probability=1.0) if name == "xtc" else decal.RULES[name](value)


def keep(chain: decal.Chain, z: Tensor) -> Tensor:
    return alive(chain.mask(z, history=History.of([[]] * len(z))))


@pytest.mark.parametrize(("name", "value"), CASES)
def test_kept_sets_differ_only_by_rounding(lib: SimpleNamespace, name: str, value: float) -> None:
    z = fresh_rows(seed=51).float()
    theirs, ours = theirs_of(lib, name, value)(z), keep(ours_of(name, value), z)
    if name == "top_k":
        assert torch.equal(ours, theirs & alive(z))
    else:
        check_between(ours, theirs, *(keep(ours_of(name, value * factor), z) for factor in (1 - 1e-4, 1 + 1e-4)))
    assert (ours != alive(z)).any(), "the rule must do something in this test"


def test_mlx_splits_ties_of_top_k_and_decal_keeps_them(lib: SimpleNamespace) -> None:
    z = torch.tensor([[0.3, 0.1, 0.3, 0.3]]).log()
    theirs = theirs_of(lib, "top_k", 2)(z)
    assert theirs.sum() == 2
    assert keep(decal.top_k(2), z).tolist() == [[True, False, True, True]]


def test_top_p_and_min_p_keep_ties_in_both(lib: SimpleNamespace) -> None:
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0, -9.0]])
    for name, value in (("top_p", 0.6), ("min_p", 0.3)):
        assert theirs_of(lib, name, value)(z).tolist() == [[True, True, True, True, False]]
        assert keep(ours_of(name, value), z).tolist() == [[True, True, True, True, False]]


def test_xtc_spares_the_same_tokens(lib: SimpleNamespace) -> None:
    z = fresh_rows(seed=52)[:30]
    special = z.topk(2, -1).indices.flatten().unique().tolist()[::2]
    theirs = alive(
        torch.from_numpy(np.array(lib.utils.apply_xtc(lib.mx.array(z.log_softmax(-1).float().numpy()), 1.0, 0.05, special)))
    )
    ours = keep(decal.xtc(0.05, probability=1.0, spared=tuple(special)), z)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, keep(decal.xtc(0.05, probability=1.0), z)), "they must matter in this test"


@pytest.mark.parametrize("window", [1000, 7])
def test_penalties(lib: SimpleNamespace, window: int) -> None:
    """They count prompt and answer alike, the last 20 tokens unless told otherwise."""
    z, ids = fresh_rows(seed=53).float(), fresh_texts(seed=53)
    processors = lib.utils.make_logits_processors(
        repetition_penalty=1.2,
        repetition_context_size=window,
        presence_penalty=0.5,
        presence_context_size=window,
        frequency_penalty=0.3,
        frequency_context_size=window,
    )
    theirs = []
    for row, text in zip(z, ids, strict=True):
        logits, tokens = lib.mx.array(row[None].numpy()), lib.mx.array(text.numpy())
        for processor in processors:
            logits = processor(tokens, logits)
        theirs.append(torch.from_numpy(np.array(logits)))
    chain = (
        decal.repetition_penalty(1.2, window=window, form="legacy")
        | decal.presence_penalty(0.5, window=window, scope="all")
        | decal.frequency_penalty(0.3, window=window, scope="all")
    )
    ours = chain(z.double(), history=History.of(ids, prompt=10))
    torch.testing.assert_close(torch.cat(theirs).double(), ours, rtol=1e-5, atol=1e-5)


def test_settings_of_mlx_as_a_chain(lib: SimpleNamespace) -> None:
    """top_p, min_p, xtc, top_k, and the temperature last; what it draws is what the chain keeps."""
    z = fresh_rows(seed=54)
    settings = {"temp": 0.7, "top_p": 0.95, "min_p": 0.02, "top_k": 20, "xtc_probability": 1.0, "xtc_threshold": 0.1}
    chain = decal.from_mlx_lm(settings).chain
    assert str(chain) == "top_p(0.95) | min_p(0.02) | xtc(0.1, 1.0, 0) | top_k(20) | temperature(0.7)"
    lib.mx.random.seed(0)
    sampler = lib.utils.make_sampler(**settings)
    kept = keep(chain, z)
    logprobs = lib.mx.array(z.log_softmax(-1).float().numpy())
    drawn = np.stack([np.array(sampler(logprobs)) for _ in range(200)])
    rows = torch.arange(len(z)).expand(200, -1)
    assert kept[rows, torch.from_numpy(drawn.astype(np.int64))].all()
    few = kept.sum(-1) <= 5
    seen = torch.zeros_like(kept)
    seen[rows, torch.from_numpy(drawn.astype(np.int64))] = True
    p = chain(z, history=History.of([[]] * len(z))).softmax(-1)
    assert few.sum() > 10
    assert (seen | (p < 0.1))[few].all()
