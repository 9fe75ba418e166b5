"""Each rule against its formula, written out from the paper in numpy and float64, with nothing of the product's: `formulas`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from formulas import (
    FORMULAS,
    Answer,
    adaptive_p,
    bregman_divergence,
    bregman_law,
    entropy,
    log_probabilities,
    mirostat,
    mirostat_update,
    probabilities,
    singular_directions,
    zipf_sizes,
)
from scipy import stats

import decal
from decal.eval import models
from decal.samplers.context import Weights
from decal.samplers.guided import Guide

SIZES = [1, 2, 7, 64, 1000, 32000, 151936]

# Parameters besides the defaults, which are tried as well. Of large rows only every other is.
CASES: dict[str, list[dict[str, Any]]] = {
    "top_k": [{"k": k} for k in (1, 2, 5, 50, 1000, 10**6)],
    "top_p": [{"p": p} for p in (0.0, 0.1, 0.5, 0.9, 0.95, 0.999)],
    "min_p": [{"p": p} for p in (1e-6, 0.01, 0.1, 0.5, 1.0)],
    "top_n_sigma": [{"n": n} for n in (0.0, 0.3, 1.0, 1.7, 3.0)],
    "epsilon": [{"eps": eps} for eps in (1e-6, 3e-4, 9e-4, 0.02, 0.3, 1.0)],
    "eta": [{"eps": eps} for eps in (1e-6, 3e-4, 2e-3, 0.02, 0.3, 1.0)],
    "top_a": [{"a": a} for a in (1e-4, 0.02, 0.2, 1.0)],
    "typical": [{"p": p} for p in (0.0, 0.1, 0.5, 0.9, 0.95, 0.999)],
    "p_less": [{"k": k} for k in (0.01, 0.2, 0.7)],
    "p_less_norm": [{"k": k} for k in (0.01, 0.2, 0.7)],
    "tail_free": [{"z": z} for z in (0.0, 0.2, 0.5, 0.9, 0.98, 0.9999)],
    "top_h": [{"alpha": a, "variant": v} for v in ("paper", "cumulative") for a in (0.0, 0.1, 0.4, 0.7, 0.9)],
    "min_k": [{"tau": tau} for tau in (0.0, 1.0, 30.0, 1000.0)],
    "ees": [{"c": c} for c in (0.25, 0.5, 0.9, 1.1, 1.5)],
    "mirostat_k": [{"mu": mu} for mu in (0.0, 1.0, 3.0, 6.0, 14.0)],
    "temperature": [{"t": t} for t in (0.0, 1e-3, 0.3, 0.7, 1.4, 5.0, 1e4)],
    "flatten": [{"strength": s} for s in (0.1, 0.5, 0.9, 1.0)],
    "dynamic_temperature": [
        {"t": t, "spread": s, "exponent": e}
        for t, s, e in ((1, 0.3, 1), (1.5, 0.5, 0.4), (0.5, 0.8, 2), (1.3, 0, 1), (1, 1, 0))
    ],
    "split_temperature": [
        {"t": t, "end": end, "ends": ends}
        for t, end, ends in ((5.0, 0.3, ()), (0.5, 1.0, (0,)), (1.0, 2.0, (1, 2, 5)), (0.01, 1e-3, ()), (100.0, 50.0, (3, 1)))
    ],
    "edt": [{"t": t, "theta": th, "n": n} for t, th, n in ((1, 0.1, 0.8), (0.8, 1.5, 0.8), (2, 0.7, 0.3), (1.2, 0, 0.8))],
    "quadratic": [{"factor": f, "curve": c} for f, c in ((0.05, 1), (0.2, 1.7), (1.0, 2.3), (0.3, 3))],
    "target_entropy": [
        *({"h": h, "unit": "fraction"} for h in (0.0, 0.05, 0.3, 0.9, 1.0, 1.3)),
        *({"h": h, "unit": "nats"} for h in (0.1, 0.7, 2.5, 6.0)),
    ],
    "cap": [{"p": p} for p in (0.0, 1e-5, 0.01, 0.1, 0.3, 0.9)],
    "power_law": [{"target": t} for t in (0.0, 0.1, 0.8)],
    "skew": [{"s": s} for s in (-3.0, -0.5, 0.25, 1.0, 2.5)],
    "sparsemax": [{"gamma": g} for g in (0.01, 0.5, 3.0, 16.0)],
    "entmax": [{"alpha": a} for a in (1.01, 1.1, 1.3, 1.75, 2.0)],
    "l0_bregman": [{"lam": lam, "alpha": a} for a in ("1", "1.5", "2") for lam in (1e-4, 2e-3, 0.02, 0.3)],
    "best_of_k": [
        {"samples": 1},
        {"samples": 4, "t": 1.0, "coverage": 1.0, "kl": 0.2, "top": 3},
        {"samples": 64, "coverage": 0.0, "diversity": 0.5, "gap": 0.7},
        {
            "samples": 8,
            "js": 0.3,
            "entropy": 0.2,
            "kl": 0.0,
            "coverage": 0.2,
            "diversity": 0.3,
            "lam": 2.0,
            "rate": 0.3,
            "steps": 25,
        },
        {"js": 1.0, "kl": 0.0, "coverage": 0.0},
        {"coverage": 0.0, "kl": 1.0},
        {"coverage": 0.0, "kl": 0.0, "entropy": 0.7, "lam": 3.0},
        {"coverage": 0.0, "kl": 0.4, "entropy": 0.6, "t": 2.0},
    ],
    "repetition_penalty": [
        {"r": r, "window": w, "scope": s, "form": f}
        for f in ("normalised", "legacy")
        for r, w, s in ((1.3, 0, "all"), (0.7, 5, "all"), (2.0, 0, "generated"), (1.2, 3, "generated"))
    ],
    "presence_penalty": [
        {"a": a, "window": w, "scope": s} for a, w, s in ((1.5, 0, "all"), (-0.5, 4, "generated"), (0.3, 6, "all"))
    ],
    "frequency_penalty": [
        {"a": a, "window": w, "scope": s} for a, w, s in ((1.5, 0, "all"), (-0.5, 4, "generated"), (0.3, 6, "all"))
    ],
    "adapt": [{"first": a, "rest": b} for a, b in ((2.0, 0.5), (0.0, 3.0), (1.0, 0.0), (5.0, 1.0))],
    "no_repeat_ngram": [{"n": n} for n in (1, 2, 4)],
    "dry": [
        {"multiplier": 0.3, "base": 2.0, "allowed_length": 1},
        {"allowed_length": 3, "window": 12},
        {"allowed_length": 1, "breakers": (1,)},
        {"base": 1.0, "window": 7, "breakers": (0, 2), "allowed_length": 1},
    ],
    "xtc": [
        {"threshold": t, "probability": p, "spared": s}
        for t, p, s in ((0.02, 1, ()), (0.3, 1, ()), (0.1, 1e-300, ()), (0.05, 1, (0, 3)), (1e-9, 1, (1,)), (0, 1, ()))
    ],
    "mirostat": [{"tau": tau, "version": v} for v in ("1", "2") for tau in (0.0, 0.5, 2.0, 5.0)],
    "adaptive_p": [{"target": t, "decay": d} for t, d in ((0.0, 0.5), (0.3, 0.0), (0.9, 0.99))],
    "min_validity": [
        *({"level": level} for level in (1e-9, 0.02, 0.5, 0.9, 0.999, 1.0)),
        {"level": 0.4, "offset": -1.0, "gap": 2.0, "entropy": 0.3, "peak": 0.5, "spread": -0.2},
    ],
    "risk_budget": [
        *({"risk": risk, "share": share} for risk, share in ((0.0, 1), (0.1, 0.5), (0.5, 1), (0.99, 0.3), (1, 1))),
        {"risk": 0.6, "share": 0.7, "offset": 0.5, "gap": 1.0, "entropy": 0.1, "peak": 0.5, "spread": 0.3},
    ],
    "conformal_nucleus": [
        {"p": (0.3,), "edges": ()},
        {"p": (0.999, 0.0), "edges": (0.7,)},
        {"p": (0.9, 0.5, 0.2, 0.99), "edges": (0.01, 2.0, 5.0)},
    ],
    "calibrated_top_k": [
        {"k": (3,), "edges": ()},
        {"k": (1000, 1), "edges": (0.5,)},
        {"k": (50, 7.9, 3, 1), "edges": (0.05, 0.3, 0.9)},
    ],
    "top_w": [
        {"beta": b, "lam": lam, "geometry": g, "pool": p, "rounds": r}
        for b, lam, g, p, r in (
            (2.8, 2.2, 0.6, 10, 9),
            (3.5, 2.2, 3.0, 1200, 1),
            (6.0, 1.0, 5.0, 30, 4),
            (2.0, 2.2, 0.6, 1200, 9),
            (3.0, 0.05, 5.0, 1200, 9),  # geometry says anything only where the set reaches beyond 0.999 of the mass
            (3.0, 0.05, 9.0, 1200, 3),
        )
    ],
    "basis_aware": [{"eps": e, "rank": r, "tries": t} for e, r, t in ((0.02, 2, 5), (0.1, 4, 40), (0.3, 3, 40), (0.1, 40, 10))],
    "guided": [{"strength": s} for s in (0.0, 1e-9, 0.3, 0.9)],
    "ensemble": [{"weight": w, "form": f} for f in ("mean", "least") for w in (0.3, 1.0)],
    "contrast": [{"strength": s} for s in (0.1, 1.0, 2.0)],
}
DEFAULTS: dict[str, dict[str, Any]] = {"xtc": {"probability": 1}}
LARGEST = {"l0_bregman": 1000, "top_w": 1000, "basis_aware": 64, **dict.fromkeys(("target_entropy", "cap", "best_of_k"), 32000)}
DOUBT = {"top_w": 0.2, "basis_aware": 0.1}  # two sets can be as good, and the solver has its tolerance


def test_every_rule_has_a_formula_here() -> None:
    assert set(CASES) == set(FORMULAS) == set(decal.RULES)


class Scene(NamedTuple):
    """What rules look at besides the logits."""

    texts: Sequence[Sequence[int]]
    prompts: Sequence[int]
    embedding: np.ndarray
    head: np.ndarray
    known: dict[int, np.ndarray]
    others: np.ndarray
    answers: Sequence[tuple[int, ...]]
    ends: Sequence[int]

    def directions(self, rank: int) -> np.ndarray:
        """The same ones for every row."""
        if rank not in self.known:
            self.known[rank] = singular_directions(self.head, rank)
        return self.known[rank]

    @property
    def history(self) -> decal.History:
        return decal.History.of(self.texts, prompt=torch.tensor(self.prompts))

    @property
    def weights(self) -> Weights:
        return Weights(torch.from_numpy(self.embedding), torch.from_numpy(self.head))

    @property
    def guide(self) -> Guide:
        return Guide(tiny.trie_of(self.answers, self.ends))

    def logits(self, kind: str, history: decal.History) -> torch.Tensor:
        """Behind other prompts, (rows, 2, V)."""
        return torch.from_numpy(self.others[: len(history)])

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], prompts: Sequence[int], embedding: np.ndarray, head: np.ndarray) -> Scene:
        """With answers that go on where some of the texts are, or end there, and made-up logits behind other prompts."""
        size = len(embedding)
        rng = np.random.default_rng([size, len(texts)])
        others = rng.normal(size=(len(texts), 2, size)) * rng.choice([0.1, 3.0, 30.0], size=(len(texts), 1, 1))
        ends = [size - 1, 0][: (size - 1) // 3]
        free = [token for token in range(min(size, 300)) if token not in ends]
        answers: dict[tuple[int, ...], None] = {}
        for text, prompt in list(zip(texts, prompts, strict=True))[::2]:
            so_far = tuple(text[prompt:])
            if not free or any(token >= size or token in ends for token in so_far):
                continue
            answers |= dict.fromkeys([so_far] if so_far and ends else [])
            answers |= dict.fromkeys((*so_far, *rng.choice(free, rng.integers(1, 4)).tolist()) for _ in range(30))
        return cls(texts, prompts, embedding, head, {}, others, list(answers) or [(0,)], ends)


def scene(count: int, size: int, seed: int = 0) -> Scene:
    """Texts of few words, so that they repeat themselves; some of the words aren't in the vocabulary if that is small."""
    rng = np.random.default_rng([count, size, seed])
    texts = [rng.integers(rng.integers(1, 8), size=rng.integers(41)).tolist() for _ in range(count)]
    prompts = [int(rng.integers(len(text) + 1)) for text in texts]
    width = 6 if size <= 1000 else 1
    return Scene.of(texts, prompts, rng.normal(size=(size, width)), rng.normal(size=(size, width)))


def rows(size: int, seed: int = 0) -> np.ndarray:
    """Rows of several scales and shapes, half of them with dropped tokens."""
    rng = np.random.default_rng([size, seed])
    count = 2 if size > 100_000 else 6 if size > 10_000 else 12
    scales = rng.permutation([0.01, 0.3, 1.0, 3.0, 10.0, 30.0] * 2)[:count, None]
    z = rng.normal(size=(count, size)) * scales + rng.normal(size=(count, 1)) * 50
    z[::3] = -(rng.exponential(size=z[::3].shape) ** 1.5) * scales[::3]  # a steep head and a long tail
    z[1::4] = np.round(z[1::4])  # many ties
    dead = rng.random(z.shape) < rng.choice([0.1, 0.9], size=(count, 1))
    dead[::2] = False
    dead[np.arange(count), rng.integers(size, size=count)] = False
    return np.where(dead, -np.inf, z)


def odd_rows(size: int = 40) -> np.ndarray:
    """Rows that no bell curve gives."""
    rng = np.random.default_rng(8)
    line, none = np.arange(size, dtype=float), -np.inf
    found = [
        np.zeros(size),
        np.full(size, 7.3),
        np.where(line == 3, 0.0, -1000.0),
        np.where(line == 3, 0.0, -40.0),
        np.where(line == 3, 0.0, -20.0 - line / 7),
        np.where(line < 2, 5.0, -3.0),
        np.where(line == 5, 2.0, none),
        np.where(line == 5, 2.0, np.where(line == 9, 1.0, none)),
        np.where(line < 3, 2.0, none),
        np.where(line < 3, 100.0 - line, none),
        np.where(line % 2 == 0, -line, none),
        -line,
        -line * 500,
        -np.log1p(line),
        -2 * np.log1p(line) + 1e5,
        rng.normal(size=size) * 1e4,
        rng.normal(size=size) * 1e-7,
        rng.integers(-2, 3, size=size).astype(float),
        np.where(line < 5, 9.0, rng.normal(size=size)),
        np.where(line < size - 1, 3.0, -50.0),
    ]
    return np.array(found)


def values_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    params = decal.RULES[name].params
    whole = {key for key, param in params.items() if getattr(param, "integer", False)}
    return {**{key: int(param.default) if key in whole else param.default for key, param in params.items()}, **given}


def processed(name: str, values: Mapping[str, Any], z: np.ndarray, around: Scene) -> np.ndarray:
    """What decal makes of the rows."""
    chain = decal.RULES[name](**values)
    needs = chain.needs
    given = {"model": "weights", "answers": "guide", "ends": "ends"}
    chain = replace(chain, **{given[need]: getattr(around, given[need]) for need in needs & set(given)})
    if "prompts" in needs:
        chain = replace(chain, views=around)
    history = around.history if needs & {"history", "chance"} else None
    return chain(torch.from_numpy(z), history=history, state=chain.init(len(z)) if "state" in needs else None).numpy()


def wanted(name: str, values: Mapping[str, Any], row: np.ndarray, place: int, around: Scene) -> Answer:
    """What the formula says."""
    v = dict(values)
    needs = decal.RULES[name].needs
    if name == "xtc":  # the coin isn't the formula's affair, so it is forced
        return FORMULAS[name](row, threshold=v["threshold"], happens=v["probability"] == 1, spared=v["spared"])
    if name == "mirostat":
        return FORMULAS[name](row, mu=2 * v["tau"], version=v["version"])
    if name in ("adaptive_p", "risk_budget"):
        return FORMULAS[name](row, drawn=(), **v)
    if name in ("ensemble", "contrast"):
        return FORMULAS[name](row, others=around.others[place], **v)
    if name == "guided":
        v |= {"answers": around.answers, "ends": around.ends}
    if "history" in needs:
        v |= {"text": around.texts[place], "prompt": around.prompts[place]}
    if name == "split_temperature":
        v["ends"] = v["ends"] or around.ends
    if name == "top_w":
        v["embedding"] = around.embedding
    if name == "basis_aware":
        v["basis"] = around.directions(v.pop("rank"))
    return FORMULAS[name](row, **v)


def compare(what: str, got: np.ndarray, answer: Answer) -> None:
    """Fails if the law or the kept set is another one."""
    kept, right = np.isfinite(got), np.isfinite(answer.log_q)
    gone = np.zeros(len(got), bool) if answer.gone is None else answer.gone
    wrong = np.flatnonzero((kept != right) & ~answer.close & ~gone)
    assert not len(wrong), f"{what}: token {wrong[:5]}, kept {kept[wrong[:5]]}, {kept.sum()} of {right.sum()} kept"
    if not ((kept != right) & ~gone).any():
        both = kept & right & ~(answer.close & (answer.absolute > 0))
        ours, theirs = log_probabilities(got)[both], answer.log_q[both]
        same = np.abs(ours - theirs) <= answer.relative * (1 + np.abs(theirs))
        same |= np.abs(np.exp(ours) - np.exp(theirs)) <= answer.absolute
        bad = np.flatnonzero(~same)
        assert not len(bad), f"{what}: log q {ours[bad[:5]]}, not {theirs[bad[:5]]}"


def check(name: str, z: np.ndarray, around: Scene, cases: Sequence[Mapping[str, Any]], doubt: float) -> None:
    excluded = 0
    for given in cases:
        values = values_of(name, given)
        got = processed(name, values, z, around)
        for i, row in enumerate(z):
            answer = wanted(name, values, row, i, around)
            compare(f"{name} {given}, row {i}", got[i], answer)
            excluded += len(np.unique(row[answer.close]))  # tied tokens are one question
    doubt = DOUBT.get(name, doubt)
    assert excluded <= max(3, doubt * z.size * len(cases)), f"{excluded} tokens were too close to tell"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_rule_is_its_formula(name: str, size: int) -> None:
    if size > LARGEST.get(name, size):
        return
    cases = [DEFAULTS.get(name, {}), *CASES[name]]
    z = rows(size)
    if name == "l0_bregman" and size > 100:
        z, cases = z[3:6], cases[3::5]
    check(name, z, scene(len(z), size), cases[:: 4 if size > 10_000 else 1], doubt=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_rule_is_its_formula_on_odd_rows(name: str) -> None:
    z = odd_rows() if name != "l0_bregman" else odd_rows()[::2]
    check(name, z, scene(len(z), z.shape[1], seed=1), [DEFAULTS.get(name, {}), *CASES[name]], doubt=1e-2)


def test_large_support_of_l0_bregman_is_the_best_one() -> None:
    """Where not every size can be tried: the size chosen against others near and far."""
    z = np.concatenate([rows(32000)[:4], rows(1000)[1:6:2].repeat(32, 1)])
    for alpha in ("1", "1.5", "2"):
        for lam in (1e-5, 1e-3):
            got = decal.RULES["l0_bregman"](lam=lam, alpha=alpha)(torch.from_numpy(z)).numpy()
            for row, size in zip(z, np.isfinite(got).sum(1), strict=True):
                p = np.sort(probabilities(row))[::-1]

                def loss(k: int, p: np.ndarray = p, alpha: str = alpha, lam: float = lam) -> float:
                    q = np.zeros(len(p))
                    q[:k] = bregman_law(p[:k], float(alpha))
                    return bregman_divergence(q, p, float(alpha)) + lam * k

                tied = int((p == p[size - 1]).sum())  # within a tie any size may be the best
                chosen = min(loss(int(size)), loss(int(size) - tied + 1), loss(int(size) - tied // 2))
                for k in {size + 1, size + 3, size - tied, size - tied - 2, 2 * size, size // 2, 10 * size, size // 10}:
                    if 1 <= k <= (p > 0).sum():
                        assert loss(int(k)) >= chosen - 1e-12 - lam * tied, (alpha, lam, size, k)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_p", 0.8), ("top_p", 0.9), ("min_p", 0.1), ("typical", 0.5), ("typical", 0.9), ("top_n_sigma", 1.1)),
        *(("tail_free", 0.9), ("top_h", 0.5), ("ees", 1.0), ("min_k", 3.0), ("mirostat_k", 1.0), ("p_less_norm", 0.5)),
        *(("sparsemax", 1.0), ("entmax", 1.5), ("l0_bregman", 0.02)),
    ],
)
def test_a_threshold_can_fall_anywhere(name: str, value: float) -> None:
    """Many rows of a handful of tokens, where each cut lands at another place."""
    rng = np.random.default_rng(5)
    z = rng.normal(size=(1000 if name == "l0_bregman" else 4000, 4)) * 2
    values = values_of(name, {next(iter(decal.RULES[name].params)): value})
    got = processed(name, values, z, scene(1, 4))
    for i, (row, now) in enumerate(zip(z, got, strict=True)):
        compare(f"{name}, row {i}", now, FORMULAS[name](row, **values))
    assert len(set(np.isfinite(got).sum(1))) >= (2 if name in ("tail_free", "top_h") else 3)


# ---- what was drawn before


@pytest.mark.parametrize("version", ["1", "2"])
def test_mirostat_follows_what_is_drawn(version: str) -> None:
    """Rows, and tokens drawn from what mirostat left of them, with mu computed apart."""
    rng = np.random.default_rng(12)
    taus, eta = (1.0, 3.0, 6.0), 0.4
    chain = decal.RULES["mirostat"](tau=torch.tensor(taus)[:, None], eta=eta, version=version)
    state, mu = chain.init(3), [2 * tau for tau in taus]
    sizes = set()
    for _ in range(40):
        z = rng.normal(size=(3, 300)) * rng.choice([0.5, 2, 4])
        got, seen = chain.apply(torch.from_numpy(z), state)
        tokens = []
        for i, row in enumerate(z):
            compare(f"mu {mu[i]}", got[i].numpy(), mirostat(row, mu[i], version))
            tokens.append(int(rng.choice(300, p=probabilities(got[i].numpy()))))
            mu[i] = mirostat_update(row, mu[i], tokens[i], taus[i], eta)
            sizes.add(int(got[i].isfinite().sum()))
        state = chain.observe(state, seen, torch.tensor(tokens))
        np.testing.assert_allclose(state[0]["mu"][:, 0], mu, rtol=1e-9)  # type: ignore[index]
    assert len(sizes) > 20


def test_mirostat_brings_the_average_surprise_to_its_target() -> None:
    rng = np.random.default_rng(13)
    z = torch.from_numpy(np.sort(rng.normal(size=(1, 500)) * 2))
    chain = decal.RULES["mirostat"](tau=3.0, eta=0.2)
    state, surprises = chain.init(1), []
    for _ in range(1500):
        got, seen = chain.apply(z, state)
        token = int(rng.choice(500, p=probabilities(got[0].numpy())))
        surprises.append(-math.log2(probabilities(z[0].numpy())[token]))
        state = chain.observe(state, seen, torch.tensor([token]))
    assert abs(np.mean(surprises[100:]) - 3.0) < 0.1


@pytest.mark.parametrize(("target", "decay"), [(0.3, 0.9), (0.6, 0.5), (0.05, 0.99), (1.0, 0.0)])
def test_adaptive_p_follows_what_is_drawn(target: float, decay: float) -> None:
    rng = np.random.default_rng(14)
    chain = decal.RULES["adaptive_p"](target=target, decay=decay)
    state = chain.init(2)
    drawn: list[list[float]] = [[], []]
    for _ in range(30):
        z = rng.normal(size=(2, 12)) * 2
        got, seen = chain.apply(torch.from_numpy(z), state)
        tokens = []
        for i, row in enumerate(z):
            compare(f"after {drawn[i]}", got[i].numpy(), adaptive_p(row, target, drawn[i], decay))
            tokens.append(int(rng.choice(12, p=probabilities(got[i].numpy()))))
            drawn[i].append(float(probabilities(row)[tokens[i]]))
        state = chain.observe(state, seen, torch.tensor(tokens))


# ---- the coin of xtc. Seeds are fixed, so nothing here is flaky; of seeds as good as these one in 10^4 would fail a test.

FALSE_ALARM = 1e-4


def coins(seed: int, probability: float, requests: int, positions: int) -> np.ndarray:
    """(requests, positions) whether xtc struck, in texts of those lengths."""
    chain = decal.RULES["xtc"](threshold=0.1, probability=probability, seed=seed)
    z = torch.tensor([[1.0, 0.0, -0.5]], dtype=torch.float64).expand(requests, 3)
    struck = []
    for length in range(1, positions + 1):
        got = chain(z, history=decal.History.of(torch.zeros(requests, length, dtype=torch.long), request=range(requests)))
        assert ((got.isfinite().sum(1) == 1) | (got == z).all(1)).all()
        struck.append((got.isfinite().sum(1) == 1).numpy())
    return np.stack(struck, 1)


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.5, 0.9])
def test_xtc_strikes_as_often_as_it_should(probability: float) -> None:
    struck = coins(3, probability, 1000, 60)
    assert stats.binomtest(int(struck.sum()), struck.size, probability).pvalue > FALSE_ALARM
    for axis in (0, 1):  # along every position and every request the right share, and no more even than chance is
        counts, n = struck.sum(axis), struck.shape[axis]
        statistic = ((counts - n * probability) ** 2 / (n * probability * (1 - probability))).sum()
        assert FALSE_ALARM / 2 < stats.chi2.sf(statistic, len(counts)) < 1 - FALSE_ALARM / 2


def test_coins_of_xtc_know_nothing_of_each_other() -> None:
    """Neighbouring positions, requests and seeds."""
    struck, other = coins(0, 0.4, 1000, 40), coins(1, 0.4, 1000, 40)
    for a, b in ((struck[:, 1:], struck[:, :-1]), (struck[1:], struck[:-1]), (struck, other)):
        table = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
        assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_coin_of_xtc_is_one_uniform_number() -> None:
    """The probabilities at which a step strikes are an interval from 1 down, and its end is uniform."""
    levels = np.linspace(0, 1, 11)[1:-1]
    struck = np.stack([coins(7, float(level), 2000, 3) for level in levels])
    assert (struck[1:] >= struck[:-1]).all()
    bins = np.bincount(struck.sum(0).ravel(), minlength=10)
    assert stats.chisquare(bins).pvalue > FALSE_ALARM
    assert np.array_equal(coins(7, 0.5, 2000, 3), coins(7, 0.5, 2000, 3))


# ---- worked by hand, so that a shared misreading of a formula can't hide

HALVES = [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("top_k(1)", 1),
        ("top_k(3)", 4),  # two tokens tie for the third place
        ("top_p(0.49)", 1),
        ("top_p(0.51)", 2),
        ("top_p(0.76)", 4),
        ("min_p(0.51)", 1),
        ("min_p(0.49)", 2),
        ("min_p(0.24)", 4),
        ("epsilon(0.9)", 1),
        ("epsilon(0.2)", 2),
        ("epsilon(0.1)", 4),
        ("eta(0.5)", 2),  # H = 1.75 ln 2, so sqrt(.5) exp(-H) = 0.2102
        ("eta(0.16)", 4),  # sqrt(.16) exp(-H) = 0.1189
        ("eta(0.9)", 1),  # sqrt(.9) exp(-H) = 0.2820
        ("top_a(0.9)", 2),  # 0.9 * 0.25
        ("top_a(1.0)", 2),
        ("top_a(0.49)", 4),  # 0.1225
        ("p_less(1.0)", 1),  # sum of squares = 0.34375
        ("p_less(0.7)", 2),  # 0.2406
        ("p_less(0.36)", 4),  # 0.12375
        ("p_less_norm(0.99)", 4),  # (4 * 0.34375 - 1) / 3 = 0.125
        ("top_n_sigma(0.5)", 1),  # logits in units of ln 2: 0, -1, -2, -2; sd 0.829
        ("top_n_sigma(1.3)", 2),
        ("top_n_sigma(2.5)", 4),
        ("tail_free(0.49)", 1),  # second differences 0.125, 0.125: half of the bend each, at the second and third token
        ("tail_free(0.51)", 2),
        ("tail_free(0.99)", 2),
        ("top_h(0.4)", 1),  # entropies of the prefixes, in bits: 0, 0.9183, 1.3788, 1.75
        ("top_h(0.53)", 2),  # 0.9183 / 1.75 = 0.5247
        ("top_h(0.78)", 2),
        ("top_h(0.79)", 4),  # 1.3788 / 1.75 = 0.7879; the fourth ties with the third
        ("top_h(0.28, variant='cumulative')", 1),  # -p log2 p: 0.5, 0.5, 0.375, 0.375; even the first is over 0.49
        ("top_h(0.4, variant='cumulative')", 1),  # running sums over 1.75: 0.2857, 0.5714, 0.7857, 1
        ("top_h(0.58, variant='cumulative')", 2),
        ("top_h(0.79, variant='cumulative')", 4),
        ("min_k(0.0)", 1),  # falls 1, 1, 0 (times ln 2) over ranks 1, 2, 3
        ("min_k(2.7)", 1),  # 2.7 / (2 ln 2) = 1.95
        ("min_k(2.8)", 2),  # 2.02
        ("min_k(4.2)", 4),  # 3.03
        ("ees(1.0)", 2),  # H / log k: 0.9183, 0.8699, 0.875; mass 0.75, 0.875, 1
        ("ees(0.99)", 4),  # 0.8699 >= 0.866, and the fourth ties
        ("ees(1.23)", 1),  # 0.9183 < 0.9225
        ("ees(1.22)", 2),
    ],
)
def test_worked_example(text: str, kept: int) -> None:
    masked = decal.parse(text).mask(torch.tensor([HALVES], dtype=torch.float64).log() + 2.5)
    assert masked.isfinite().tolist() == [[i < kept for i in range(4)]]


def test_typical_worked_example() -> None:
    """H = 1.75 ln 2; the surprises 1, 2, 3, 3 (times ln 2) are 0.75, 0.25, 1.25, 1.25 away."""
    z = torch.tensor([HALVES], dtype=torch.float64).log()
    for mass, kept in ((0.2, [False, True, False, False]), (0.6, [True, True, False, False]), (0.8, [True] * 4)):
        assert decal.RULES["typical"](mass).mask(z).isfinite().tolist() == [kept]


@pytest.mark.parametrize(
    ("exponent", "mu", "kept"),
    [
        (1, 1.0, 2),  # (2 / ln 4)^1 = 1.44, rounded 1, and 1
        (1, 2.0, 4),  # 2.89
        (2, 0.0, 2),  # sqrt(1 / (1 - 1/4)) = 1.15
        (2, 1.0, 3),  # 1.63
        (2, 2.0, 3),  # 2.31
    ],
)
def test_mirostat_k_worked_example(exponent: float, mu: float, kept: int) -> None:
    """A row that is Zipf's law has its exponent."""
    z = -exponent * torch.arange(1, 5, dtype=torch.float64).log()[None]
    assert decal.RULES["mirostat_k"](mu)(z).isfinite().sum() == kept


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("dynamic_temperature(1.0, 0.5)", np.array(HALVES) ** (1 / 1.375)),  # evenness 1.75 / 2, so T = 0.5 + 0.875
        ("dynamic_temperature(1.0, 2.0, 2.0)", np.array(HALVES) ** (1 / 2.296875)),  # 0 + 3 * 0.875^2
        ("edt(1.5, 0.7, 0.8)", np.array(HALVES) ** (1 / (1.5 * 0.8 ** (0.7 / 1.2130076)))),  # H = 1.75 ln 2
        ("quadratic(0.3)", np.exp(-0.3 * np.log(2) ** 2 * np.array([0, 1, 4, 4]))),
        (
            "quadratic(0.3, 2.0)",
            np.exp(-0.15 * np.log(2) ** 2 * np.array([0, 1, 4, 4]) - 0.15 * np.log(2) ** 3 * np.array([0, 1, 8, 8])),
        ),
        ("target_entropy(0.875)", HALVES),
        ("target_entropy(1.75, unit='nats')", [1, 1, 1, 1]),  # more than four tokens can have
        ("cap(0.4)", [0.4, 0.3, 0.15, 0.15]),  # the rest times 1.2
        ("cap(0.3)", [0.3, 0.3, 0.2, 0.2]),  # 1.4 would lift the second to 0.35
        ("cap(0.2)", [1, 1, 1, 1]),
        ("skew(0.6931471805599453)", [0.25, 0.3125, 0.21875, 0.21875]),  # F^2 = 0.25, 0.5625, 1
        ("power_law(0.5)", np.exp([0, -10 * (5 / 6) ** 2 / (11 / 6), -10 * 1.25**2 / 2.25, -10 * 1.25**2 / 2.25])),
        ("best_of_k(coverage=0.0, kl=1.0, t=1.0)", np.array(HALVES) ** 2),  # log q = log p + z
        ("best_of_k(coverage=0.0, kl=0.0, entropy=1.0, t=0.5)", np.array(HALVES) ** 2),
        # One step from p with w = 1 on the first: g = z + 2 (1 - 0.5), 0 elsewhere.
        (
            "best_of_k(samples=2, t=1.0, kl=0.0, coverage=1.0, top=1, rate=1.0, steps=1)",
            np.array(HALVES) ** 2 * np.exp([1, 0, 0, 0]),
        ),
        ("l0_bregman(0.05, alpha='1')", HALVES),
        ("l0_bregman(0.3, alpha='1')", [2, 1, 0, 0]),  # log(1.5) = 0.41 > 0.3 > log(7 / 6) = 0.15
    ],
)
def test_worked_law(text: str, law: Sequence[float]) -> None:
    q = decal.parse(text)(torch.tensor([HALVES], dtype=torch.float64).log() - 1.5).softmax(-1)[0]
    np.testing.assert_allclose(q, np.array(law) / np.sum(law), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "law"),
    [
        # D falls by (1 - S + k p)^2 / (2 k (k + 1)) with the next token: 0.2025, 0.0408, 0.0067.
        ("l0_bregman(0.01, alpha='2')", [0.4333333333, 0.3333333333, 0.2333333333, 0]),
        ("l0_bregman(0.03, alpha='2')", [0.4333333333, 0.3333333333, 0.2333333333, 0]),
        ("l0_bregman(0.05, alpha='2')", [0.55, 0.45, 0, 0]),
        ("l0_bregman(0.21, alpha='2')", [1, 0, 0, 0]),
        # sqrt q = sqrt p + nu, 3 nu^2 + 2 nu 1.62739 = 0.1.
        ("l0_bregman(0.03, alpha='1.5')", [0.43871, 0.33365, 0.22764, 0]),
        ("l0_bregman(0.2, alpha='1')", [4 / 9, 3 / 9, 2 / 9, 0]),  # log(9 / 7) = 0.25 > 0.2 > log(10 / 9)
    ],
)
def test_l0_bregman_worked_example(text: str, law: Sequence[float]) -> None:
    q = decal.parse(text)(torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()).softmax(-1)[0]
    np.testing.assert_allclose(q, law, atol=6e-6)


@pytest.mark.parametrize(
    ("text", "z", "law"),
    [
        ("sparsemax", [1.0, 0.5, 0.0], [0.75, 0.25, 0]),  # tau = 0.25
        ("sparsemax(2.0)", [1.0, 0.5, 0.0], [7 / 12, 4 / 12, 1 / 12]),  # of halves: tau = -1 / 12
        ("entmax", [2.0, 0.0], [1, 0]),
        # (1/2 - tau)^2 + tau^2 = 1, so tau = (1 - sqrt 7) / 4.
        ("entmax", [1.0, 0.0], [((1 + math.sqrt(7)) / 4) ** 2, ((math.sqrt(7) - 1) / 4) ** 2]),
        ("entmax(2.0)", [1.0, 0.5, 0.0], [0.75, 0.25, 0]),
    ],
)
def test_projection_worked_example(text: str, z: Sequence[float], law: Sequence[float]) -> None:
    q = decal.parse(text)(torch.tensor([z], dtype=torch.float64) + 30).softmax(-1)[0]
    np.testing.assert_allclose(q, law, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("chain", "text", "prompt", "change"),
    [
        ("repetition_penalty(2.0)", [0], 1, [math.log(0.5), 0, 0, 0]),  # p^2
        ("repetition_penalty(2.0, scope='generated')", [0, 1], 1, [0, math.log(0.25), 0, 0]),
        ("repetition_penalty(2.0, 1)", [0, 1], 1, [0, math.log(0.25), 0, 0]),
        ("presence_penalty(0.5)", [0, 1, 1, 1], 1, [0, -0.5, 0, 0]),
        ("presence_penalty(0.5, scope='all')", [0, 1, 1, 1], 1, [-0.5, -0.5, 0, 0]),
        ("frequency_penalty(0.5)", [0, 1, 1, 3], 1, [0, -1.0, 0, -0.5]),
        ("frequency_penalty(0.5, 2, scope='all')", [0, 1, 1, 3], 1, [0, -0.5, 0, -0.5]),
        ("no_repeat_ngram(1)", [2, 0], 0, [-math.inf, 0, -math.inf, 0]),
        ("no_repeat_ngram(2)", [1, 1], 0, [0, -math.inf, 0, 0]),  # overlapping
        ("no_repeat_ngram(2)", [1, 2, 1], 0, [0, 0, -math.inf, 0]),
        ("no_repeat_ngram(3)", [1, 2, 1], 0, [0, 0, 0, 0]),
        ("no_repeat_ngram(1)", [0, 1, 2, 3], 0, [0, 0, 0, 0]),  # nothing would be left
        ("dry", [1, 2, 3, 1, 2], 0, [0, 0, 0, -0.8]),
        ("dry", [0, 1, 2, 3, 0, 1, 2], 0, [0, 0, 0, -0.8 * 1.75]),
        ("dry", [2, 3, 2], 0, [0, 0, 0, 0]),  # one token is allowed
        ("dry(allowed_length=1)", [2, 3, 2], 0, [0, 0, 0, -0.8]),
        ("dry", [1, 2, 3, 1, 2, 0, 1, 2], 0, [-0.8, 0, 0, -0.8]),
        ("dry(window=5)", [1, 2, 3, 1, 2, 0, 1, 2], 0, [-0.8, 0, 0, 0]),
        ("dry(breakers=(1,))", [0, 1, 2, 3, 0, 1, 2], 0, [0, 0, 0, 0]),
        ("dry(breakers=(3,))", [1, 2, 3, 1, 2], 0, [0, 0, 0, 0]),
        ("dry(allowed_length=1)", [3, 3, 3], 0, [0, 0, 0, -0.8 * 1.75]),  # two 3s stand before a 3 already
        ("xtc(0.2, 1.0)", [], 0, [-math.inf, 0, 0, 0]),
        ("xtc(0.1, 1.0)", [], 0, [-math.inf, -math.inf, 0, 0]),  # both of the least probable stay
        ("xtc(0.3, 1.0)", [], 0, [0, 0, 0, 0]),
        ("xtc(0.1, 1.0, spared=(0,))", [], 0, [0, -math.inf, 0, 0]),
    ],
)
def test_worked_change(chain: str, text: Sequence[int], prompt: int, change: Sequence[float]) -> None:
    z = torch.tensor([HALVES], dtype=torch.float64).log()
    got = decal.parse(chain)(z, history=decal.History.of([text], prompt=prompt))
    np.testing.assert_allclose(got - z, [change], atol=1e-12)


def test_legacy_repetition_penalty_worked_example() -> None:
    z = torch.tensor([[2.0, -2.0, 1.0, -1.0]], dtype=torch.float64)
    got = decal.parse("repetition_penalty(2.0, form='legacy')")(z, history=decal.History.of([[0, 1]]))
    assert got.tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_mirostat_worked_example() -> None:
    """mu = 2.2, so p >= 0.218; a token of 2 bits takes it to 2.2 - 0.5 * 0.9 = 1.75, 0.297; one of 1 bit to 1.8."""
    z = torch.tensor([HALVES], dtype=torch.float64).log()
    chain = decal.parse("mirostat(1.1, 0.5)")
    state = chain.init(1)
    for kept, token, mu in ((2, 1, 1.75), (1, 0, 1.8)):
        got, seen = chain.apply(z, state)
        assert got.isfinite().sum() == kept
        state = chain.observe(state, seen, torch.tensor([token]))
        np.testing.assert_allclose(state[0]["mu"], mu)  # type: ignore[index]


def test_adaptive_p_worked_example() -> None:
    """The average of 10 tokens' worth at 0.5 becomes (0.25 + 0.9 * 5) / (1 + 0.9 * 10) = 0.475, so the aim 0.525."""
    z = torch.tensor([HALVES], dtype=torch.float64).log()
    chain = decal.parse("adaptive_p(0.5, 0.9)")
    state = chain.init(1)
    got, seen = chain.apply(z, state)
    torch.testing.assert_close(got.softmax(-1), decal.parse("power_law(0.5)")(z).softmax(-1))
    got, _ = chain.apply(z, chain.observe(state, seen, torch.tensor([1])))
    torch.testing.assert_close(got.softmax(-1), decal.parse("power_law(0.525)")(z).softmax(-1))


def with_weights(text: str, weights: Sequence[Sequence[float]]) -> decal.Chain:
    table = torch.tensor(weights, dtype=torch.float64)
    return decal.Chain(decal.parse(text).steps, Weights(table, table))


def test_basis_aware_worked_example() -> None:
    """An unlikely token whose embedding is a likelier one's can be that one's error; one with its own direction can't."""
    z = torch.tensor([[0.6, 0.35, 0.03, 0.02]], dtype=torch.float64).log()
    # t = sqrt(0.05) exp(-H) = 0.097; the first may take up 0.03 or 0.02 more, 0.6 / (1 - t) = 0.664.
    chain = with_weights("basis_aware(0.05, 2)", [[1, 0], [-1, 0], [1, 0], [0, 1]])
    assert chain.mask(z).isfinite().tolist() == [[True, True, False, True]]


def test_top_w_worked_example() -> None:
    """Without geometry and entropy it is the whole pool; with beta no larger than lambda a single token; the pool bounds it."""
    z = torch.tensor([HALVES], dtype=torch.float64).log()
    eye = np.eye(4).tolist()
    assert with_weights("top_w(2.0, 0.0, 0.0)", eye).mask(z).isfinite().all()
    assert with_weights("top_w(1.0, 2.0, 0.0)", eye).mask(z).isfinite().tolist() == [[True, False, False, False]]
    assert with_weights("top_w(2.0, 0.0, 0.0, 3)", eye).mask(z).isfinite().tolist() == [[True, True, True, False]]


# ---- the laws that docstrings claim


@pytest.fixture(scope="module")
def bells() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(20).normal(size=(20, 500)) * 3)


def test_flatten_counts_the_tokens_left_by_the_cut(bells: torch.Tensor) -> None:
    chain = decal.parse("min_p(0.05) | flatten(0.6)")
    for row, got in zip(bells.numpy(), chain(bells).numpy(), strict=True):
        p = probabilities(row)
        kept = p >= 0.05 * p.max()
        log_p = np.log(p[kept] / p[kept].sum())
        right = np.exp(0.4 * log_p - 0.6 * np.log(kept.sum()))
        np.testing.assert_allclose(probabilities(got)[kept], right / right.sum(), rtol=1e-9)
        assert np.isinf(got[~kept]).all()


def test_flatten_interpolates_log_probabilities(bells: torch.Tensor) -> None:
    """The scores themselves, not only the law they give."""
    got = decal.parse("flatten(0.3)")(bells).numpy()
    for row, now in zip(bells.numpy(), got, strict=True):
        log_z = row.max() + np.log(np.exp(row - row.max()).sum())
        np.testing.assert_allclose(now - log_z, 0.7 * (row - log_z) - 0.3 * np.log(500), rtol=1e-9, atol=1e-9)


def test_flatten_is_a_temperature_after_the_cut(bells: torch.Tensor) -> None:
    flat = decal.parse("top_k(9) | flatten(0.6)")(bells).softmax(-1)
    torch.testing.assert_close(flat, decal.parse(f"top_k(9) | temperature({1 / 0.4!r})")(bells).softmax(-1))


def test_temperature_divides_the_logits() -> None:
    z = rows(1000)
    np.testing.assert_allclose(decal.RULES["temperature"](0.7)(torch.from_numpy(z)).numpy(), z / 0.7, rtol=1e-12)


def test_temperature_zero_leaves_the_modes() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [-5.0, -6.0, -7.0, -8.0]])
    right = torch.tensor([[-torch.inf, 3.0, 3.0, -torch.inf], [-5.0, -torch.inf, -torch.inf, -torch.inf]])
    assert torch.equal(decal.RULES["temperature"](0)(z), right)


def test_min_p_after_a_temperature_is_a_smaller_min_p_before_it(bells: torch.Tensor) -> None:
    """p^(1/t) >= q max p^(1/t) is p >= q^t max p."""
    after = decal.parse("temperature(1.7) | min_p(0.1)").mask(bells)
    assert torch.equal(after, decal.parse(f"min_p({0.1**1.7!r})").mask(bells))


def test_top_n_sigma_does_not_see_the_temperature(bells: torch.Tensor) -> None:
    alone = decal.parse("top_n_sigma(1.1)").mask(bells)
    assert torch.equal(decal.parse("temperature(1.7) | top_n_sigma(1.1)").mask(bells), alone)


def test_cliff_of_min_k_does_not_see_the_temperature(bells: torch.Tensor) -> None:
    alone = decal.parse("min_k(0.0)").mask(bells)
    assert torch.equal(decal.parse("temperature(1.7) | min_k(0.0)").mask(bells), alone)


def test_p_less_norm_is_p_less_at_a_real_vocabulary() -> None:
    z = torch.from_numpy(np.random.default_rng(21).normal(size=(8, 32000)) * np.linspace(3, 6, 8)[:, None])
    assert torch.equal(decal.parse("p_less_norm").mask(z), decal.parse("p_less").mask(z))


def test_mirostat_2_at_a_fixed_mu_is_epsilon(bells: torch.Tensor) -> None:
    for tau in (0.7, 2.3, 4.1):
        chain = decal.RULES["mirostat"](tau=tau, eta=0.0)
        state = chain.init(len(bells))
        got, seen = chain.apply(bells, state)
        assert torch.equal(got, decal.RULES["epsilon"](2 ** (-2 * tau))(bells))
        unmoved = chain.observe(state, seen, got.argmax(-1))
        assert torch.equal(unmoved[0]["mu"], state[0]["mu"])  # type: ignore[index]


def test_mirostat_1_at_its_beginning_is_mirostat_k(bells: torch.Tensor) -> None:
    chain = decal.parse("mirostat(2.2, version='1')")
    assert torch.equal(chain.mask(bells, state=chain.init(len(bells))), decal.parse("mirostat_k(4.4)").mask(bells))


def test_zipf_size_is_that_of_the_law_it_fits() -> None:
    """Under Zipf's law itself about as many tokens are kept as have a surprise of at most mu bits."""
    z = -1.3 * torch.arange(1, 30001, dtype=torch.float64).log()[None]
    p = probabilities(z[0].numpy())
    for mu in (5.0, 8.0, 11.0):
        kept = int(decal.RULES["mirostat_k"](mu)(z).isfinite().sum())
        assert 0.7 < kept / (-np.log2(p) <= mu).sum() < 1.5
        assert kept == zipf_sizes(z[0].numpy(), mu)[0]


def test_adaptive_p_without_memory_is_power_law(bells: torch.Tensor) -> None:
    chain = decal.parse("adaptive_p(0.2)")
    got = chain(bells, state=chain.init(len(bells)))
    torch.testing.assert_close(got, decal.parse("power_law(0.2)")(bells))


def test_entmax_at_2_is_sparsemax(bells: torch.Tensor) -> None:
    two, sparse = decal.parse("entmax(2.0)")(bells).softmax(-1), decal.parse("sparsemax")(bells).softmax(-1)
    torch.testing.assert_close(two, sparse, rtol=1e-9, atol=1e-12)


def test_sparsemax_is_the_nearest_point_of_the_simplex(bells: torch.Tensor) -> None:
    """The condition for it: for every law r, <z / gamma - q, r - q> <= 0; a corner r is enough."""
    x = bells / 3.0
    q = decal.parse("sparsemax(3.0)")(bells).softmax(-1)
    inner = (x - q) - ((x - q) * q).sum(-1, keepdim=True)
    assert (inner < 1e-9).all()


def test_entmax_tends_to_softmax(bells: torch.Tensor) -> None:
    z = bells / 3
    gaps = [(decal.RULES["entmax"](1 + step)(z).softmax(-1) - z.softmax(-1)).abs().max() for step in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-4
    torch.testing.assert_close(decal.RULES["entmax"](1.0)(z), z)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_entmax_maximises_expected_logit_plus_tsallis_entropy(bells: torch.Tensor, alpha: float) -> None:
    """Where it keeps a token the marginal value of probability is the same, elsewhere no larger."""
    q = decal.RULES["entmax"](alpha)(bells).softmax(-1)
    marginal = bells - (q ** (alpha - 1)) / (alpha - 1)
    level = marginal.masked_fill(q == 0, -torch.inf).amax(-1, keepdim=True)
    assert ((marginal - level).abs()[q > 1e-6] < 1e-6).all()
    assert (marginal[q == 0] <= level.expand_as(q)[q == 0] + 1e-6).all()


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3])
def test_cap_never_exceeds_and_keeps_ratios_below(bells: torch.Tensor, p: float) -> None:
    q, before = decal.RULES["cap"](p)(bells).softmax(-1), bells.softmax(-1)
    assert (q <= p * (1 + 1e-9)).all()
    below = q < p * (1 - 1e-9)
    for now, then, free in zip(q, before, below, strict=True):
        factor = now[free] / then[free]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    torch.testing.assert_close(
        decal.RULES["cap"](0.001)(bells).softmax(-1), torch.full_like(bells, 1 / 500, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("h", "unit"), [(0.1, "fraction"), (0.7, "fraction"), (0.99, "fraction"), (0.5, "nats"), (4.0, "nats")]
)
def test_target_entropy_reaches_its_target(bells: torch.Tensor, h: float, unit: str) -> None:
    q = decal.RULES["target_entropy"](h, unit)(bells).softmax(-1)
    aim = h * math.log(500) if unit == "fraction" else h
    for row, law in zip(bells.numpy(), q.numpy(), strict=True):
        assert entropy(law) == pytest.approx(aim, abs=1e-9)
        used = law > 1e-12  # and by a temperature: log q is affine in z
        slope, offset = np.polyfit(row[used], np.log(law[used]), 1)
        np.testing.assert_allclose(slope * row[used] + offset, np.log(law[used]), atol=1e-6)


def test_skew_is_what_a_bent_uniform_number_draws() -> None:
    """u^exp(-s) through the inverse of the cumulative distribution over the ranking, on a fine grid of u."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    for s in (-1.0, 0.7):
        u = ((np.arange(10**6) + 0.5) / 10**6) ** math.exp(-s)
        drawn = np.bincount(np.searchsorted(p.cumsum(), u).clip(max=3), minlength=4) / 10**6
        q = decal.RULES["skew"](s)(torch.from_numpy(p).log()[None]).softmax(-1)[0]
        np.testing.assert_allclose(q, drawn, atol=3e-6)


def test_best_of_k_closed_form_is_where_the_ascent_ends(bells: torch.Tensor) -> None:
    """A trace of coverage makes it iterate."""
    values = {"kl": 0.7, "entropy": 0.3, "t": 2.0}
    closed = decal.RULES["best_of_k"](coverage=0.0, **values)(bells).softmax(-1)
    ascent = decal.RULES["best_of_k"](coverage=1e-12, rate=0.5, steps=200, **values)(bells).softmax(-1)
    torch.testing.assert_close(closed, ascent, rtol=1e-6, atol=1e-9)


def test_best_of_k_ascends(bells: torch.Tensor) -> None:
    """More steps, a larger objective, to a point where the gradient is level over what is used."""

    def objective(q: np.ndarray, row: np.ndarray) -> float:
        w = (np.argsort(np.argsort(-row)) < 8) / math.sqrt(8)
        kl = (q[q > 0] * (np.log(q[q > 0]) - log_probabilities(row)[q > 0])).sum()
        return float((q * row / 2).sum() - 0.5 * kl + 0.5 * (w * (1 - (1 - q) ** 16)).sum())

    laws = [decal.RULES["best_of_k"](t=2.0, steps=n)(bells).softmax(-1).numpy() for n in (1, 5, 20, 100)]
    for i, row in enumerate(bells.numpy()):
        found = [objective(law[i], row) for law in laws]
        assert found == sorted(found)
        nearby = laws[-1][i] * np.exp(np.random.default_rng(i).normal(size=500) * 0.1)
        assert objective(nearby / nearby.sum(), row) < found[-1] + 1e-3


def test_normalised_repetition_penalty_does_not_see_a_constant(bells: torch.Tensor) -> None:
    history = decal.History.of([[1, 5, 9, 5]] * len(bells))
    for form, same in (("normalised", True), ("legacy", False)):
        chain = decal.RULES["repetition_penalty"](1.4, form=form)
        q, moved = (chain(z, history=history).softmax(-1) for z in (bells, bells + 11))
        assert torch.allclose(q, moved, rtol=1e-9) is same


def test_frequency_penalty_is_presence_penalty_once(bells: torch.Tensor) -> None:
    history = decal.History.of([[1, 5, 9]] * len(bells), prompt=0)
    once, often = decal.parse("presence_penalty(0.7)"), decal.parse("frequency_penalty(0.7)")
    assert torch.equal(once(bells, history=history), often(bells, history=history))


def test_eta_is_epsilon_where_entropy_is_low() -> None:
    """exp(-H) >= sqrt(eps) makes eps the smaller of the two."""
    z = torch.from_numpy(np.random.default_rng(22).normal(size=(10, 300)) * 12)
    assert torch.equal(decal.parse("eta(0.001)").mask(z), decal.parse("epsilon(0.001)").mask(z))


# ---- rows of a real model

PROMPTS = (
    "The capital of France is the city of Paris, which lies on the river",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a small dragon who",
    "aaaa bbbb aaaa bbbb aaaa",
)


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, Scene]:
    """Logits at the middle and at the end of each prompt, and the text up to there."""
    if os.environ.get("DECAL_OFFLINE", "0") != "0" and not models.is_cached("smollm2"):
        pytest.skip("smollm2 is not in the cache and DECAL_OFFLINE is set")
    loaded = models.load("smollm2", progress=False)
    found, texts = [], []
    for prompt in PROMPTS:
        ids = loaded.tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([ids])).logits[0].double()
        for place in (len(ids) // 2, len(ids) - 1):
            found.append(logits[place].numpy())
            texts.append(ids[: place + 1])
    weights = Weights.of(loaded.model)
    embedding, head = (table.double().numpy() for table in (weights.embedding, weights.head))
    return np.stack(found), Scene.of(texts, [len(text) // 3 for text in texts], embedding, head)


@pytest.mark.model
@pytest.mark.parametrize("name", sorted(set(CASES) - {"basis_aware"}))
def test_rule_is_its_formula_on_real_rows(name: str, real: tuple[np.ndarray, Scene]) -> None:
    z, around = real
    cases = [DEFAULTS.get(name, {}), *CASES[name][:: max(1, len(CASES[name]) // 3)]]
    if name == "top_w":
        z, cases = z[::3], [*cases[:1], CASES[name][2]]
    check(name, z, around, cases, doubt=1e-5)
    if decal.RULES[name].kind in ("truncation", "band", "selection"):  # and not all of it is trivial
        sizes = {int(np.isfinite(row).sum()) for given in cases for row in processed(name, values_of(name, given), z, around)}
        assert len(sizes) > 1


@pytest.mark.model
def test_basis_aware_is_its_formula_on_real_rows(real: tuple[np.ndarray, Scene]) -> None:
    """The program is large: the tokens it may choose from are cut first, as in a chain."""
    z, around = real
    z = decal.parse("top_k(60)")(torch.from_numpy(z[:4])).numpy()
    for given in ({"rank": 5, "tries": 4, "eps": 0.02}, {"rank": 8, "tries": 3, "eps": 0.1}):
        values = values_of("basis_aware", given)
        got = processed("basis_aware", values, z, around)
        for i, row in enumerate(z):
            compare(f"basis_aware {given}, row {i}", got[i], wanted("basis_aware", values, row, i, around))


def test_a_rule_declared_without_brackets_is_told() -> None:
    with pytest.raises(decal.DecalError, match=r"write @rule\(\), with brackets, above bare"):

        @decal.rule
        def bare(row):
            return row.max

    assert "bare" not in decal.RULES
