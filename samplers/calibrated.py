"""Rules that cut at an estimated validity, and files with what was fitted for a model; ``decal calibrate`` writes them.

The estimate is a logistic one. The odds that a token is valid fall with its distance to the most probable one, and differ from
row to row with what the row's shape says:

    log odds = offset + gap (z_i - max z) + entropy H + peak log max p + spread sd(z)

``gap`` is positive, so within a row the estimate falls with the ranking, and a cut at it is a cutoff: `min_p` with a threshold
of each row's own. It costs no forward pass.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decal.samplers.drafts import LEAST, Profile, Search
from decal.samplers.errors import DecalError
from decal.samplers.row import Row
from decal.samplers.rule import Feedback, Numbers, Param, rule

if TYPE_CHECKING:
    from decal.samplers.chain import Chain

FORMAT = 2
MOST = 1e6
"""No budget is larger, in nats."""


# Weights of the estimate; the defaults are about those of smollm2 on the built-in tasks.
OFFSET = Param(1.4, low=-1000, high=1000)
GAP = Param(0.5, low=1e-3, high=1000)
ENTROPY = Param(-0.65, low=-1000, high=1000)
PEAK = SPREAD = Param(0.0, low=-1000, high=1000)


def _base(row: Row, offset: Tensor, entropy: Tensor, peak: Tensor, spread: Tensor) -> Tensor:
    """(B, 1) log odds of the most probable token."""
    return offset + entropy * row.entropy + peak * (row.max - row.logz) + spread * row.std


@rule(side="before")
def min_validity(
    row: Row,
    level: Tensor = Param(0.3, low=0, high=1, off=0.0, sweep=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7)),
    offset: Tensor = OFFSET,
    gap: Tensor = GAP,
    entropy: Tensor = ENTROPY,
    peak: Tensor = PEAK,
    spread: Tensor = SPREAD,
) -> Tensor:
    """Keep tokens that are valid with an estimated probability of at least ``level``.

    Kept: s_i >= log(level / (1 - level)), s_i = offset + gap (z_i - max z) + entropy H + peak log max p + spread sd(z). The
    defaults are about what ``decal calibrate`` fits for smollm2; fit your own. With no weight but ``gap`` it is ``min_p``.
    """
    needed = torch.log(level) - torch.log1p(-level)
    return row.max + (needed - _base(row, offset, entropy, peak, spread)) / gap


def _notes(
    row: Row, risk: Tensor, share: Tensor, offset: Tensor, gap: Tensor, entropy: Tensor, peak: Tensor, spread: Tensor
) -> Mapping[str, Tensor]:
    return {"base": _base(row, offset, entropy, peak, spread), "peak": row.max - row.logz}


def _spend(state: Mapping[str, Tensor], logp: Tensor, notes: Mapping[str, Tensor], **values: Tensor) -> Mapping[str, Tensor]:
    odds = notes["base"] + values["gap"] * (logp - notes["peak"])
    return {"left": (state["left"] - torch.nn.functional.softplus(-odds)).clamp(min=0)}


@rule(
    side="before",
    feedback=Feedback(
        init=lambda risk, **_: {"left": (-torch.log1p(-risk)).clamp(max=MOST)},
        update=_spend,
        notes=_notes,
    ),
)
def risk_budget(
    row: Row,
    risk: Tensor = Param(0.8, low=0, high=1, off=1.0, sweep=(0.3, 0.5, 0.7, 0.8, 0.9, 0.97)),
    share: Tensor = Param(0.5, low=0, high=1),
    offset: Tensor = OFFSET,
    gap: Tensor = GAP,
    entropy: Tensor = ENTROPY,
    peak: Tensor = PEAK,
    spread: Tensor = SPREAD,
) -> Tensor:
    """Keep tokens as long as the text stays valid with an estimated probability of at least 1 - ``risk``.

    Kept: -log v_i <= share b, v_i the estimated validity of ``min_validity`` and b what is left of the budget, -log(1 - risk)
    at first. A drawn token takes -log v_i from it: a text of sure steps can afford a daring one, and errors don't pile up. The
    most probable token always stays and may overdraw the budget, which is then 0 and leaves nothing else. ``risk`` is as good
    as the estimate: ``decal calibrate`` finds the one at which the true risk is controlled, on average over tasks.
    """
    allowed = share * row.state["left"]
    # -log v <= a where the odds are at least 1 / (exp(a) - 1).
    needed = -(allowed + torch.log(-torch.expm1(-allowed)))
    return row.max + (needed - _base(row, offset, entropy, peak, spread)) / gap


def _one_for_each_bin(edges: tuple[float, ...], **table: tuple[float, ...]) -> None:
    for name, entries in table.items():
        if len(entries) != len(edges) + 1:
            raise DecalError(f"{len(edges)} edges make {len(edges) + 1} bins, got {len(entries)} values of {name}")


def _by(value: Tensor, edges: tuple[float, ...], table: tuple[float, ...]) -> Tensor:
    """(B, 1) the entry of the table for the bin that ``value`` is in; bin i ends below ``edges[i]``."""
    found = torch.zeros_like(value) + table[0]
    for edge, entry in zip(edges, table[1:], strict=True):
        found = torch.where(value >= edge, entry, found)
    return found


@rule(paper="arXiv:2305.02633", side="before", check=_one_for_each_bin)
def conformal_nucleus(
    row: Row,
    p: tuple[float, ...] = Numbers((0.5, 0.8, 0.95), low=0, high=1),
    edges: tuple[float, ...] = Numbers((1.0, 3.0), low=0, high=1000, ascending=True),
) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches a share that depends on the row's entropy.

    Kept: what ``top_p`` keeps at p[i], i the number of ``edges``, in nats, that the entropy reaches. ``decal calibrate`` fits a
    table such that a valid token is missed as often as asked for, in every bin, on rows like those it saw. Conformal Nucleus
    Sampling, Ravfogel et al. 2023.
    """
    return row.upper(mass=_by(row.entropy, edges, p))


@rule(paper="arXiv:2510.05987", side="before", check=_one_for_each_bin)
def calibrated_top_k(
    row: Row,
    k: tuple[float, ...] = Numbers((20, 5, 2), low=1, high=1e9),
    edges: tuple[float, ...] = Numbers((0.2, 0.6), low=0, high=1, ascending=True),
) -> Tensor:
    """Keep so many of the most probable tokens as are right often enough where the model is that confident.

    Kept: what ``top_k`` keeps at k[i], rounded down, i the number of ``edges`` that the largest probability reaches. ``decal
    calibrate`` fits a table such that the last rank kept is valid with the frequency asked for. Calibrated-TopK of Sample
    Smart, Not Hard, 2025.
    """
    return row.upper(count=torch.floor(_by(torch.exp(row.max - row.logz), edges, k)))


# ---- files


@dataclass(frozen=True)
class Advised:
    """A chain, and what choosing it like this gave on tasks left out; means over these.

    Attributes:
        chain: as text.
        score: diversity where the validity reaches the floor, 0 where it doesn't.
        reached: how often it does.
        validity, diversity: as they are.
    """

    chain: str
    score: float
    reached: float
    validity: float
    diversity: float


@dataclass(frozen=True, repr=False)
class Calibration:
    """What was fitted for a model.

    Attributes:
        about: model and tokenizer with fingerprints, tasks, seed, versions, date.
        validity: the weights of `min_validity`, by name.
        advised: by validity floor, such as ``"0.8"``, the chain to use; a floor that nothing reaches is missing.
        risk: by rule, ``min_validity`` or ``risk_budget``, and epsilon the chain, as text, whose expected invalidity is
            controlled; None where these tasks can't promise it.
        report: how well it fits.
        profiles: what chains of a family gave on every prompt: ``row``, which read no other prompts, and ``prompts``, which do.
            One that wasn't measured is missing.
    """

    about: Mapping[str, Any]
    validity: Mapping[str, float]
    advised: Mapping[str, Advised]
    risk: Mapping[str, Mapping[str, str | None]]
    report: Mapping[str, Any]
    profiles: Mapping[str, Profile]

    def __repr__(self) -> str:
        floors = ", ".join(self.advised) or "none"
        return (
            f"<calibration of {self.about['model']} on {len(self.about.get('tasks', ()))} tasks; chains for validity {floors}>"
        )

    def chain(self, floor: float = 0.8) -> Chain:
        """The chain that was the most diverse where its validity reaches ``floor``, counting 0 where it doesn't.

        It may have to be given other prompts or the tokens that end a text first: its ``usage`` says what.

        Raises:
            DecalError: there is none for this floor.
        """
        from decal.samplers.chain import parse

        return parse(_of(self.advised, floor, "floor").chain)

    def search(self, floor: float = 0.8, *, prompts: bool = False) -> Search:
        """A search for the chain to use on one prompt, by judging a few of its drafts.

        Args:
            floor: validity to be reached.
            prompts: whether among chains that read other prompts too: as many as in the calibration, two unless asked for more.

        Raises:
            DecalError: the file has no such chains, or the floor is out of range.
        """
        name = "prompts" if prompts else "row"
        if name not in self.profiles:
            how = "with --read-prompts, on" if prompts else "on"
            raise DecalError(
                f"the calibration has no profile {name!r} to search in; decal calibrate {how} at least {LEAST} prompts"
            )
        return Search(self.profiles[name], floor)

    def min_validity(self, level: float) -> Chain:
        """The cut at an estimated validity, with the weights of the file."""
        return min_validity(level, **self.validity)

    def controlled(self, epsilon: float, rule: str = "min_validity") -> Chain:
        """A cut such that a text is invalid with probability at most ``epsilon``, on average over tasks like those of the file.

        By conformal risk control (Angelopoulos et al., arXiv 2208.02814), at temperature 1: it holds if the new task and those
        of the file are exchangeable, such as draws from the same pool, and for the average over draws of all of them, those
        included for which nothing can be promised: a refusal writes no invalid text.

        Args:
            rule: ``min_validity`` cuts at one level; ``risk_budget`` spends more where a text was sure so far.

        Raises:
            DecalError: the file has no such rule or epsilon, or its tasks can't promise it.
        """
        from decal.samplers.chain import parse

        found = _of(self.risk, rule, "rule")
        chain = _of(found, epsilon, "epsilon")
        if chain is None:
            can = ", ".join(one for one, text in found.items() if text) or "none"
            raise DecalError(f"the tasks of this calibration can't promise an invalidity of at most {epsilon}, but {can}")
        return parse(chain)


def _of(table: Mapping[str, Any], key: float | str, what: str) -> Any:
    name = f"{key:g}" if isinstance(key, (int, float)) else str(key)
    if name not in table:
        raise DecalError(f"the calibration has no {what} {name}; it has {', '.join(table) or 'none'}")
    return table[name]


def fingerprint(model: Any, tokenizer: Any) -> dict[str, str]:
    """What tells a transformers model and its tokenizer from others: digests of weights, as bfloat16, and of the vocabulary.

    A few numbers of each weight go in, so it is quick, and the same in any dtype that keeps bfloat16 and on any device.

    Raises:
        DecalError: these are no model and tokenizer.
    """
    if not hasattr(model, "state_dict") or not hasattr(tokenizer, "get_vocab"):
        got = f"{type(model).__name__} and {type(tokenizer).__name__}"
        raise DecalError(f"a fingerprint is that of a transformers model and its tokenizer, in this order, got {got}")
    weights = hashlib.sha256()
    try:
        for name, weight in sorted(model.state_dict().items()):
            weights.update(f"{name.removeprefix('_orig_mod.')} {tuple(weight.shape)}".encode())
            few = weight.detach().flatten()[_spread(weight.numel(), weight.shape[-1] if weight.dim() else 1).to(weight.device)]
            weights.update(few.float().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise DecalError(f"the weights of this model can't be read, as of one on the meta device: {error}") from None
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return {"model": weights.hexdigest()[:32], "tokenizer": hashlib.sha256(words.encode()).hexdigest()[:32]}


def _spread(size: int, width: int, most: int = 256) -> Tensor:
    """Up to ``most`` places of a weight, in all of its columns by turns."""
    step = max(1, size // most)
    while math.gcd(step, width) > 1:
        step += 1
    return torch.arange(0, size, step)[:most]


def load(file: str | Path, model: Any = None, tokenizer: Any = None, *, mismatch: str = "warn") -> Calibration:
    """A calibration that ``decal calibrate`` wrote.

    Args:
        model, tokenizer: those it will be used with, compared with those it was fitted for.
        mismatch: whether another model is a reason to ``warn`` or to ``refuse``.

    Raises:
        DecalError: the file isn't a calibration, or was fitted for another model and ``mismatch`` is ``refuse``.
    """
    if mismatch not in ("warn", "refuse"):
        raise DecalError(f"mismatch is 'warn' or 'refuse', got {mismatch!r}")
    if (model is None) != (tokenizer is None):
        raise DecalError("load compares a model and its tokenizer, or neither")
    found = _read(Path(file))
    if model is not None:
        fitted, here = found.about["fingerprint"], fingerprint(model, tokenizer)
        other = [what for what in here if here[what] != fitted.get(what)]
        if other:
            this = " and ".join(other)
            said = f"{file} was fitted for {found.about['model']}, not for this {this}; decal calibrate fits another"
            if mismatch == "refuse":
                raise DecalError(said)
            warnings.warn(said, stacklevel=2)
    return found


def _advised(chain: str, **means: float) -> Advised:
    return Advised(str(chain), **{name: float(mean) for name, mean in means.items()})


def _profile(chains: list[str], validity: list[list[float]], diversity: list[list[float]]) -> Profile:
    return Profile(tuple(map(str, chains)), *(tuple(tuple(map(float, row)) for row in rows) for rows in (validity, diversity)))


def _read(file: Path) -> Calibration:
    from decal.samplers.chain import parse

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DecalError(f"can't read the calibration {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DecalError(f"{file} is no calibration: not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DecalError(
            f"{file} is no calibration of format {FORMAT}, as decal calibrate writes them; its format is {got!r}; make it again"
        )
    try:
        found = Calibration(
            about=dict(content["about"]),
            validity={name: float(weight) for name, weight in content["validity"].items()},
            advised={floor: _advised(**one) for floor, one in content["advised"].items()},
            risk={
                rule: {epsilon: None if chain is None else str(chain) for epsilon, chain in chains.items()}
                for rule, chains in content["risk"].items()
            },
            report=dict(content["report"]),
            profiles={name: _profile(**one) for name, one in content["profiles"].items()},
        )
        found.about["fingerprint"]["model"], found.about["model"]
        found.min_validity(0.5)
        for chain in (one.chain for one in found.advised.values()):
            parse(chain)
        for chain in (chain for one in found.profiles.values() for chain in one.chains):
            parse(chain)
        for chain in (chain for chains in found.risk.values() for chain in chains.values() if chain is not None):
            parse(chain)
    except DecalError as error:
        raise DecalError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DecalError(f"{file} is no calibration: {type(error).__name__} {error}") from None
    return found
