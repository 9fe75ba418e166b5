"""decal against llama.cpp's own samplers, through llama-cpp-python, and where they differ on purpose.

llama.cpp works in float32, so tokens at the very threshold may differ: what it keeps must lie between our kept sets for the
parameter moved by 1e-4 of itself either way. Probabilities must agree to 1e-5 of themselves.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from against import alive, check_between, fresh_rows, fresh_texts
from torch import Tensor

import decal
from decal import History, parse

pytestmark = pytest.mark.llama_cpp

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@pytest.fixture(scope="module")
def lib() -> ModuleType:
    import llama_cpp

    return llama_cpp


class Result(NamedTuple):
    """What a sampler leaves of rows: logits, -inf where dropped, and the token it chose of each, if it is one that chooses."""

    logits: Tensor
    chosen: list[int]

    @property
    def kept(self) -> Tensor:
        return alive(self.logits)

    @property
    def p(self) -> Tensor:
        return self.logits.softmax(-1)


class Samplers:
    """A chain of llama.cpp's samplers."""

    def __init__(self, lib: ModuleType, *samplers: Any):
        self.lib = lib
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in samplers:
            assert sampler
            lib.llama_sampler_chain_add(self.chain, sampler)

    def __call__(self, z: Tensor, history: Tensor | None = None) -> Result:
        """Each row by itself; only tokens that are not at -inf are candidates, as after an earlier sampler."""
        rows, chosen = torch.full(z.shape, -torch.inf, dtype=torch.float64), []
        for number, row in enumerate(z):
            if history is not None:
                self.lib.llama_sampler_reset(self.chain)
                for token in history[number].tolist():
                    self.accept(token)
            ids = alive(row).nonzero()[:, 0]
            left, selected = self.apply(ids, row[ids])
            rows[number, torch.from_numpy(left["id"].astype(np.int64))] = torch.from_numpy(left["logit"].astype(np.float64))
            chosen.append(selected)
        return Result(rows, chosen)

    def apply(self, ids: Tensor, logits: Tensor) -> tuple[np.ndarray, int]:
        """The candidates that are left, and the one chosen, or -1."""
        table = np.zeros(len(ids), TOKEN)
        table["id"], table["logit"] = ids.numpy(), logits.float().numpy()
        start = table.ctypes.data_as(ctypes.POINTER(self.lib.llama_token_data))
        array = self.lib.llama_token_data_array(data=start, size=len(table), selected=-1, sorted=False)
        self.lib.llama_sampler_apply(self.chain, ctypes.byref(array))
        address = ctypes.addressof(array.data.contents)  # a sampler may move it
        left = np.frombuffer((ctypes.c_char * (array.size * TOKEN.itemsize)).from_address(address), TOKEN).copy()
        return left, int(left["id"][array.selected]) if array.selected >= 0 else -1

    def accept(self, token: int) -> None:
        self.lib.llama_sampler_accept(self.chain, token)

    def __del__(self) -> None:
        self.lib.llama_sampler_free(self.chain)


@pytest.fixture(scope="module")
def vocabulary(lib: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three control tokens and the letters; DRY wants to know what tokens are written as."""
    from gguf import GGUFWriter

    path: Path = tmp_path_factory.mktemp("vocabulary") / "letters.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *LETTERS])
    writer.add_token_scores([0.0] * (3 + len(LETTERS)))
    writer.add_token_types([2, 3, 3] + [1] * len(LETTERS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, "llama.cpp can't read the vocabulary"
    yield lib.llama_model_get_vocab(model)
    lib.llama_model_free(model)


# ---- kept sets

CUTS: dict[str, tuple[float, ...]] = {
    "top_k": (1, 3, 50, 400),
    "top_p": (0.05, 0.5, 0.9, 0.99),
    "min_p": (0.001, 0.1, 0.5, 0.9),
    "typical": (0.05, 0.5, 0.9, 0.99),
    "top_n_sigma": (0.3, 1.0, 2.0),
    "xtc": (0.01, 0.05, 0.2, 0.3),
}
CASES = [(name, value) for name, chosen in CUTS.items() for value in chosen]


def theirs_of(lib: ModuleType, name: str, value: float) -> Samplers:
    make = {
        "top_k": lambda: lib.llama_sampler_init_top_k(int(value)),
        "top_p": lambda: lib.llama_sampler_init_top_p(value, 0),
        "min_p": lambda: lib.llama_sampler_init_min_p(value, 0),
        "typical": lambda: lib.llama_sampler_init_typical(value, 0),
        "top_n_sigma": lambda: lib.llama_sampler_init_top_n_sigma(value),
        "xtc": lambda: lib.llama_sampler_init_xtc(1.0, value, 0, 1),
    }
    return Samplers(lib, make[name]())


def ours_of(name: str, value: float) -> decal.Chain:
    return decal.xtc(value, probability=1.0) if name == "xtc" else decal.RULES[name](value)


def keep(chain: decal.Chain, z: Tensor) -> Tensor:
    return alive(chain.mask(z, history=History.of([[]] * len(z))))


@pytest.mark.parametrize(("name", "value"), CASES)
def test_kept_sets_differ_only_by_rounding(lib: ModuleType, name: str, value: float) -> None:
    z = fresh_rows(seed=31).float()
    theirs, ours = theirs_of(lib, name, value)(z), keep(ours_of(name, value), z)
    assert torch.equal(theirs.logits[theirs.kept], z.double()[theirs.kept])
    if name == "top_k":
        assert torch.equal(ours, theirs.kept)
    else:
        # Neighbours in the order of typical may change places, as that is by the distance to an entropy in float32.
        slack = 0.01 if name == "typical" else 1e-4
        check_between(ours, theirs.kept, *(keep(ours_of(name, value * factor), z) for factor in (1 - slack, 1 + slack)))
    assert (ours != alive(z)).any(), "the rule must do something in this test"


@pytest.mark.parametrize(("name", "value"), [("top_k", 2), ("top_p", 0.5), ("typical", 0.3), ("xtc", 0.2)])
def test_llama_cpp_splits_ties_by_sort_order_and_decal_keeps_them(lib: ModuleType, name: str, value: float) -> None:
    z = torch.tensor([[0.3, 0.1, 0.3, 0.3]], dtype=torch.float64).log().float()
    theirs, ours = theirs_of(lib, name, value)(z).kept, keep(ours_of(name, value), z)
    assert not (theirs & ~ours).any()
    assert theirs.sum() == {"top_k": 2, "top_p": 2, "typical": 2, "xtc": 2}[name]
    assert ours.sum() == {"top_k": 3, "top_p": 3, "typical": 3, "xtc": 4}[name]


def test_min_p_and_top_n_sigma_keep_ties_in_both(lib: ModuleType) -> None:
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0, -9.0]])
    for name, value in (("min_p", 0.3), ("top_n_sigma", 0.5)):
        theirs = theirs_of(lib, name, value)(z).kept
        assert torch.equal(theirs, keep(ours_of(name, value), z))


def test_typical_asks_for_more_than_the_mass_in_llama_cpp(lib: ModuleType) -> None:
    """Of four tokens of 1/4 two have half of the mass. decal asks for that much, which without ties is the same."""
    z = torch.zeros(1, 4)
    assert theirs_of(lib, "typical", 0.49)(z).kept.sum() == 2
    assert theirs_of(lib, "typical", 0.5)(z).kept.sum() == 3


def test_typical_after_top_n_sigma_has_no_entropy_in_llama_cpp(lib: ModuleType) -> None:
    """top_n_sigma leaves its tokens in the list at -inf, and 0 log 0 is NaN: what typical then keeps is not what is typical."""
    z = torch.tensor([[1.4, 0.02, 0.01, 0.0, -0.01, -0.02, -0.03, -20.0, -21.0]])
    chain = parse("top_n_sigma(1) | typical(0.3)")
    both = Samplers(lib, lib.llama_sampler_init_top_n_sigma(1.0), lib.llama_sampler_init_typical(0.3, 0))
    cut = chain.steps[0].rule(1.0).mask(z)
    assert alive(cut).tolist() == [[True] * 7 + [False] * 2]
    right = theirs_of(lib, "typical", 0.3)(cut).kept  # without the tokens at -inf
    assert torch.equal(keep(chain, z), right)
    assert not torch.equal(both(z).kept, right)


def test_xtc_thresholds_above_one_half_do_nothing_in_both(lib: ModuleType) -> None:
    z = torch.tensor([[0.8, 0.1, 0.1]]).log()
    assert theirs_of(lib, "xtc", 0.7)(z).kept.all()
    assert keep(ours_of("xtc", 0.7), z).all()


# ---- temperature


@pytest.mark.parametrize("t", [0.3, 0.8, 1.7])
def test_temperature(lib: ModuleType, t: float) -> None:
    z = fresh_rows(seed=32).float()
    theirs = Samplers(lib, lib.llama_sampler_init_temp(t))(z)
    torch.testing.assert_close(theirs.logits.float(), decal.temperature(t)(z), rtol=1e-6, atol=0)


def test_temperature_0_keeps_the_first_mode_in_llama_cpp_and_all_modes_in_decal(lib: ModuleType) -> None:
    z = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert Samplers(lib, lib.llama_sampler_init_temp(0.0))(z).kept.tolist() == [[False, True, False, False]]
    assert alive(decal.temperature(0)(z)).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("t", "spread", "exponent"), [(1.0, 0.5, 1.0), (0.8, 1.2, 1.0), (1.2, 0.4, 2.0), (1.2, 0.4, 0.5)])
def test_dynamic_temperature(lib: ModuleType, t: float, spread: float, exponent: float) -> None:
    z = fresh_rows(seed=33).float()
    theirs = Samplers(lib, lib.llama_sampler_init_temp_ext(t, spread, exponent))(z)
    ours = decal.dynamic_temperature(t, spread, exponent)(z.double())
    torch.testing.assert_close(theirs.p, ours.softmax(-1), rtol=1e-3, atol=1e-6)


def test_dynamic_temperature_counts_the_tokens_that_top_n_sigma_left_at_minus_infinity(lib: ModuleType) -> None:
    """decal divides by the entropy possible on what is kept, llama.cpp by that on its whole list."""
    z = fresh_rows(seed=34)[::2].float()
    both = Samplers(lib, lib.llama_sampler_init_top_n_sigma(1.0), lib.llama_sampler_init_temp_ext(1.0, 0.5, 1.0))(z)
    kept = decal.top_n_sigma(1.0)(z.double())
    p = kept.softmax(-1)
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    count = alive(kept).sum(-1, keepdim=True)
    for answer, size in (
        (both.p, torch.tensor(z.shape[1])),
        (parse("top_n_sigma(1) | dynamic_temperature")(z).softmax(-1), count),
    ):
        t = 0.5 + entropy / size.double().log().clamp(min=1e-12)
        torch.testing.assert_close(answer.double(), (kept / t).softmax(-1), rtol=1e-3, atol=1e-6)


# ---- the tokens so far


@pytest.mark.parametrize(
    ("r", "presence", "frequency", "window"),
    [(1.3, 0, 0, 1000), (1, 0.7, 0, 1000), (1, 0, 0.4, 1000), (1.2, 0.5, 0.3, 1000), (1.2, 0.5, 0.3, 8), (0.8, -0.5, -0.3, 20)],
)
def test_penalties(lib: ModuleType, r: float, presence: float, frequency: float, window: int) -> None:
    """llama.cpp counts prompt and answer alike."""
    z, ids = fresh_rows(seed=35).float(), fresh_texts(seed=35)
    theirs = Samplers(lib, lib.llama_sampler_init_penalties(z.shape[1], window, r, frequency, presence))(z, ids)
    chain = (
        decal.repetition_penalty(r, window=window, form="legacy")
        | decal.presence_penalty(presence, window=window, scope="all")
        | decal.frequency_penalty(frequency, window=window, scope="all")
    )
    ours = chain(z.double(), history=History.of(ids, prompt=10))
    torch.testing.assert_close(theirs.logits, ours, rtol=1e-5, atol=1e-5)
    assert ((ours != z) & alive(z)).any()


@pytest.mark.parametrize("breakers", ["", "c", "ce"])
@pytest.mark.parametrize(
    ("multiplier", "base", "allowed", "window"),
    [(0.8, 1.75, 2, 500), (0.8, 1.75, 1, 500), (2.0, 1.2, 3, 500), (0.8, 1.75, 2, 17)],
)
def test_dry(
    lib: ModuleType, vocabulary: Any, multiplier: float, base: float, allowed: int, window: int, breakers: str
) -> None:
    size = 3 + len(LETTERS)
    z = fresh_rows(seed=36, size=size).float()
    ids = fresh_texts(seed=36, length=60, size=size - 3, most=6) + 3
    strings = (ctypes.c_char_p * max(len(breakers), 1))(*(letter.encode() for letter in breakers))
    sampler = lib.llama_sampler_init_dry(vocabulary, multiplier, base, allowed, window, strings, len(breakers))
    theirs = Samplers(lib, sampler)(z, ids)
    tokens = tuple(3 + LETTERS.index(letter) for letter in breakers)
    ours = decal.dry(multiplier, base, allowed, window=window, breakers=tokens)(z.double(), history=History.of(ids))
    torch.testing.assert_close(theirs.logits, ours, rtol=1e-5, atol=1e-5)
    assert ((ours != z) & alive(z)).any(-1).sum() > 5


def test_dry_of_a_text_that_repeats_for_long_is_bounded_alike(lib: ModuleType, vocabulary: Any) -> None:
    """The exponent ends where float32 does, at 158 for the usual base."""
    z, ids = torch.zeros(1, 3 + len(LETTERS)), torch.full((1, 400), 5)
    sampler = lib.llama_sampler_init_dry(vocabulary, 0.8, 1.75, 2, 1000, (ctypes.c_char_p * 1)(), 0)
    theirs = Samplers(lib, sampler)(z, ids).logits
    ours = decal.dry(0.8, 1.75, 2)(z.double(), history=History.of(ids))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0)
    assert ours[0, 5] == pytest.approx(-0.8 * 1.75**158, rel=1e-9)


# ---- rules with a memory


def test_adaptive_p_over_many_steps(lib: ModuleType) -> None:
    z = decal.top_k(40)(fresh_rows(seed=37).float())
    theirs = Samplers(lib, lib.llama_sampler_init_adaptive_p(0.4, 0.8, 5))
    chain = decal.adaptive_p(0.4, 0.8)
    state = chain.init(1)
    for row in z:
        result = theirs(row[None])
        ours, seen = chain.apply(row[None].double(), state)
        torch.testing.assert_close(result.p, ours.softmax(-1), rtol=1e-3, atol=1e-6)
        theirs.accept(result.chosen[0])
        state = chain.observe(state, seen, torch.tensor(result.chosen))
    assert abs(float(state[0]["sum"] / state[0]["weight"]) - 0.4) > 0.05, "its memory must have moved in this test"


def surprise(z: Tensor, token: int) -> float:
    """In bits."""
    return float(-z.double().log_softmax(-1)[0, token] / math.log(2))


def test_mirostat_cuts_alike_and_takes_the_surprise_after_the_cut_in_llama_cpp(lib: ModuleType) -> None:
    tau, eta = 3.0, 0.3
    theirs = Samplers(lib, lib.llama_sampler_init_mirostat_v2(5, tau, eta))
    mu = 2 * tau
    chain = decal.mirostat(tau, eta)
    state, apart = chain.init(1), 0
    for row in fresh_rows(seed=38).float():
        z = row[None]
        result = theirs(z)
        # llama.cpp's mu is known from its formula, decal's from the state; each keeps what surprises by at most its own.
        check_between(result.kept, result.kept, *(keep(decal.epsilon(min(1, 2 ** -(mu * f))), z) for f in (1 - 1e-4, 1 + 1e-4)))
        ours, seen = chain.apply(z, state)
        assert torch.equal(alive(ours), keep(decal.epsilon(min(1, 2 ** -float(state[0]["mu"]))), z))
        mu -= eta * (surprise(result.logits, result.chosen[0]) - tau)
        before = float(state[0]["mu"])
        state = chain.observe(state, seen, torch.tensor(result.chosen))
        assert float(state[0]["mu"]) == pytest.approx(before - eta * (surprise(z, result.chosen[0]) - tau))
        apart += abs(float(state[0]["mu"]) - mu) > 0.1
    assert apart > 10, "the two ways must come apart in this test"


@pytest.mark.parametrize("mu", [1.0, 4.0, 8.0])
def test_mirostat_1_rounds_towards_0_in_llama_cpp_and_to_the_nearest_plus_1_in_decal(lib: ModuleType, mu: float) -> None:
    """The exponent comes from as many tokens in both if llama.cpp is told 101 instead of its usual 100."""
    z = fresh_rows(seed=39)[::2].float()
    theirs = torch.cat(
        [Samplers(lib, lib.llama_sampler_init_mirostat(z.shape[1], 5, mu / 2, 0.1, 101))(row[None]).kept for row in z]
    ).sum(-1)
    ours = keep(decal.mirostat_k(mu), z).sum(-1)
    head = z.double().sort(-1, descending=True).values[:, :101]
    t = torch.log1p(1 / torch.arange(1, 101, dtype=torch.float64))
    s = ((head[:, :-1] - head[:, 1:]) * t).sum(-1) / (t * t).sum()
    k = ((s - 1) * 2**mu / (1 - float(z.shape[1]) ** (1 - s))) ** (1 / s)
    clear = ((k - k.round()).abs() > 1e-3 * k) & ((k - k.floor() - 0.5).abs() > 1e-3 * k)
    assert clear.sum() > 10
    assert torch.equal(theirs[clear], k.floor().clamp(1, z.shape[1]).long()[clear])
    assert torch.equal(ours[clear], (k.round() + 1).clamp(1, z.shape[1]).long()[clear])


# ---- a pipeline


def test_settings_of_llama_cpp_as_a_chain(lib: ModuleType) -> None:
    z, ids = fresh_rows(seed=40).float(), fresh_texts(seed=40)
    theirs = Samplers(
        lib,
        lib.llama_sampler_init_penalties(z.shape[1], 64, 1.1, 0.1, 0.2),
        lib.llama_sampler_init_top_k(40),
        lib.llama_sampler_init_typical(0.97, 0),
        lib.llama_sampler_init_top_p(0.95, 0),
        lib.llama_sampler_init_min_p(0.05, 0),
        lib.llama_sampler_init_xtc(1.0, 0.1, 0, 1),
        lib.llama_sampler_init_temp_ext(0.8, 0.0, 1.0),
    )(z, ids)
    chain, report = decal.from_llama_cpp(
        {
            "repeat_penalty": 1.1,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.2,
            "typical_p": 0.97,
            "xtc_probability": 1.0,
        }
    )
    assert str(chain).endswith("top_k(40) | typical(0.97) | top_p(0.95) | min_p(0.05) | xtc(0.1, 1.0, 0) | temperature(0.8)")
    assert all("tied" in line for line in report)
    ours = chain(z.double(), history=History.of(ids))
    assert torch.equal(alive(ours), theirs.kept)
    torch.testing.assert_close(theirs.p, ours.softmax(-1), rtol=1e-4, atol=1e-7)
