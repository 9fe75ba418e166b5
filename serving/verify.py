"""Whether a running engine does with a chain what the chain says, and if not, what interferes.

    engine = decal.serving.vllm.Live.start("path/to/model")
    print(decal.serving.verify.verify(engine, ["temperature(1.3) | min_p(0.1)"], ["Once upon a time"]))

The reference is the chain in plain torch, on the rows that the engine's own model gives. Compared are, at every step of what
the engine writes, the tokens that can be drawn and their probabilities, where the engine tells them; the frequencies of first
tokens, by a chi-square test; and with a seed, the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import decal
from decal.kernels import dispatch
from decal.samplers.chain import Chain, parse
from decal.samplers.context import History
from decal.samplers.errors import DecalError
from decal.samplers.rule import Step as RuleStep
from decal.serving.engine import Engine, Written
from decal.serving.request import Request, as_params

NEAR = 1e-2
"""Nats within which a token counts as on the cut: engines round differently from one step, or batch, to the next."""
LOST = 2e-4
"""Share that a sum of probabilities may lose: terms too small for a float32 change it by nothing. A mass to reach is reached so
much too early."""
MASSES = {"top_p": "p", "typical": "p"}
"""Parameters that are a mass to reach, of rules that engines have themselves."""
TINY = -87.0
"""Log-probability from which on a float32 probability is 0, or nearly: such a token may count as dropped."""
FEW = 50
"""Tokens of a step that are looked at so closely; where more differ, rounding isn't why."""
APART = 5e-3
"""Total variation above which two laws differ."""
FALSE_ALARMS = 1e-4
"""How often frequencies of a right engine count as wrong."""

PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived",
    "The three most important things in life are",
    "Q: Name a random animal.\nA:",
    "def fibonacci(n):\n    ",
    "The weather in London is",
    "Random colour: blue\nRandom colour: red\nRandom colour:",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
    "My favourite number between 1 and 100 is",
    "Le chat est assis sur la",
)
"""What engines are asked to continue, unless told otherwise."""

ANSWERS = ("red", "green", "light green", "blue")
"""What ``guided`` follows, unless told otherwise."""

Rows = Callable[[Sequence[Sequence[int]]], Tensor]


class Difference(NamedTuple):
    """A token that the engine and the chain don't agree on.

    Attributes:
        generation, step: where, counted from 0.
        token: its id.
        kept_by: ``engine`` or ``chain``.
        near: whether rounding explains it: the chain would agree if the model's logit of the token were `NEAR` away, or if a
            mass to reach were smaller by the share `LOST`.
    """

    generation: int
    step: int
    token: int
    kept_by: str
    near: bool


@dataclass(frozen=True)
class Finding:
    """What came of one chain.

    Attributes:
        chain: as text.
        refused: the engine's words, if it refused; nothing else is known then.
        generations, steps: how many were compared law by law; 0 if the engine doesn't tell its laws.
        differing: tokens kept by one of the two only, away from the cut.
        near: how many are so close to the cut that rounding decides.
        distance: the largest total variation between the laws of a step, on the tokens that both keep.
        drawn: first tokens drawn for the test of frequencies, which leaves out those on the cut; ``impossible`` of the others
            the chain drops.
        p: of the chi-square test; None if nothing was drawn, or all of it was as good as certain.
        seeded: tokens drawn with a seed, ``same`` of them those of the reference.
        telling: at how many of the steps looked at the chain changes the model's law; an engine without it differs only there.
        interference: what would explain the differences.
    """

    chain: str
    refused: str = ""
    generations: int = 0
    steps: int = 0
    differing: tuple[Difference, ...] = ()
    near: int = 0
    distance: float = 0.0
    drawn: int = 0
    impossible: int = 0
    p: float | None = None
    seeded: int = 0
    same: int = 0
    telling: int = 0
    interference: tuple[str, ...] = ()

    @property
    def laws_agree(self) -> bool:
        return not self.differing and self.distance <= APART

    @property
    def frequencies_agree(self) -> bool:
        return not self.impossible and (self.p is None or self.p >= FALSE_ALARMS)

    @property
    def seeds_agree(self) -> bool:
        # A tie of the race within rounding is rare, and spoils one token.
        return self.same >= self.seeded - self.seeded // 100

    @property
    def agrees(self) -> bool:
        """Whether nothing speaks against the engine."""
        return not self.refused and self.laws_agree and self.frequencies_agree and self.seeds_agree

    @property
    def ok(self) -> bool:
        """Whether the engine does what the chain says, as far as that shows: somewhere the chain had something to do."""
        return self.agrees and self.telling > 0


@dataclass(frozen=True)
class Report:
    """What came of all chains with one engine.

    Attributes:
        engine, version: which.
        notes: what of its configuration may act beside a chain.
        findings: one for each chain.
    """

    engine: str
    version: str
    notes: tuple[str, ...]
    findings: tuple[Finding, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether it does what every chain says."""
        return all(finding.ok for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        found = [
            {
                **asdict(finding),
                "ok": finding.ok,
                # A few show what is wrong.
                "differing": [one._asdict() for one in finding.differing[:100]],
                "differing_in_all": len(finding.differing),
            }
            for finding in self.findings
        ]
        return {
            "decal": decal.__version__,
            "engine": self.engine,
            "version": self.version,
            "ok": self.ok,
            "notes": list(self.notes),
            "findings": found,
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.engine} {self.version}", *self.notes, *map(describe, self.findings)])


def describe(finding: Finding) -> str:
    """A finding in a few lines."""
    if finding.refused:
        return f"not done: {finding.chain}\n     refused: {finding.refused}"
    lines = [f"{'ok  ' if finding.ok else 'none' if finding.agrees else 'FAIL'} {finding.chain}"]
    if finding.steps:
        lines.append(
            f"kept sets: {len(finding.differing)} tokens differ in {finding.steps} steps of {finding.generations} generations"
            f" ({finding.near} more within rounding of the cut); laws at most {finding.distance:.1e} apart in total variation"
        )
    else:
        lines.append("kept sets: not compared, the engine doesn't tell its laws, or the chain's coins are its own")
    if finding.drawn:
        p = "not tested, too sure or too flat" if finding.p is None else f"p = {finding.p:.2g}"
        lines.append(f"frequencies: {finding.drawn} draws, {finding.impossible} of tokens that the chain drops, chi-square {p}")
    if finding.seeded:
        lines.append(f"seeds: {finding.same} of {finding.seeded} tokens are those of the reference")
    else:
        lines.append("seeds: not compared")
    if not (finding.steps or finding.drawn or finding.seeded):
        lines.append("nothing is shown: there was nothing to compare")
    elif finding.agrees and not finding.telling:
        lines.append("nothing is shown: the chain changes nothing at any step looked at; try other prompts, or longer texts")
    return "\n     ".join([*lines, *(f"interference: {one}" for one in finding.interference)])


def verify(
    engine: Engine,
    chains: Iterable[Chain | str],
    prompts: Sequence[str] = PROMPTS,
    *,
    generations: int = 50,
    length: int = 4,
    draws: int = 40,
    seed: int = 0,
    answers: Sequence[str] = ANSWERS,
    rows: Rows | None = None,
    each: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Ask an engine about chains.

    Args:
        engine: a running one.
        chains: with ``guided``, they follow ``answers``.
        prompts: texts to continue.
        generations, length: so many texts, of so many tokens, are compared step by step; prompts take turns.
        draws: first tokens drawn behind each prompt, for the test of frequencies; 0 for none.
        seed: the seed sent.
        rows: gives logits (texts, V) behind lists of tokens, where the engine doesn't tell its own.
        each: is told of every chain as it is done.

    Raises:
        DecalError: the engine doesn't tell its rows, and nothing else does.
    """
    parsed = [parse(chain) if isinstance(chain, str) else chain for chain in chains]
    tokens = [list(engine.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    findings = []
    for chain in parsed:
        guided = {"answers": answers} if "answers" in chain.needs else {}
        try:
            findings.append(_finding(engine, chain, tokens, guided, generations, length, draws, seed, rows))
        except Refused as error:
            findings.append(Finding(str(chain), refused=str(error)))
        each(findings[-1])
    return Report(engine.name, engine.version, tuple(engine.notes()), tuple(findings))


class Refused(Exception):
    """The engine refused a request."""


def _finding(
    engine: Engine,
    chain: Chain,
    prompts: Sequence[list[int]],
    guided: dict[str, Any],
    generations: int,
    length: int,
    draws: int,
    seed: int,
    rows: Rows | None,
) -> Finding:
    request = Request.of(as_params(chain, **guided))
    assert request is not None
    chain = request.given(engine.tokenizer).chain
    asked = as_params(chain, **guided)

    def write(those: Sequence[list[int]], keys: dict[str, Any], size: int, laws: bool) -> list[Written]:
        try:
            return engine.write(those, keys, size, laws)
        except DecalError as error:
            raise Refused(str(error)) from error

    def behind(texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        return _rows_behind(engine, rows, texts)

    turns = [prompts[i % len(prompts)] for i in range(generations)]
    steps: list[Step] = []
    if "chance" not in chain.needs:  # whose coins depend on a number that only the engine knows
        texts = [
            Text(i, prompt, one) for i, (prompt, one) in enumerate(zip(turns, write(turns, asked, length, True), strict=True))
        ]
        told = [text for text in texts if text.written.laws is not None]
        for start in range(0, len(told), AT_ONCE):
            found_rows = behind([one for text in told[start : start + AT_ONCE] for one in text.prefixes])
            steps += [step for text in told[start : start + AT_ONCE] for step in _steps(chain, text, found_rows)]
    seeded = write(prompts, {**asked, "decal_seed": seed}, length, False) if engine.takes_seeds else []
    texts = [Text(i, prompt, one) for i, (prompt, one) in enumerate(zip(prompts, seeded, strict=False))]
    found_rows = behind([one for text in texts for one in text.prefixes])
    same, telling = [], sum(_apart(step.chain, step.model) > APART for step in steps)
    for text in texts:
        played = _replay(chain, text, found_rows, seed, seed)
        for before, drawn, (scores, wanted, _) in zip(text.prefixes, text.written.tokens, played, strict=False):
            same.append(drawn == int(wanted))
            telling += _apart(scores.log_softmax(-1), found_rows[before].double().log_softmax(-1)) > APART
    frequencies = None
    if draws and "chance" not in chain.needs:
        first = write([p for p in prompts for _ in range(draws)], asked, 1, False)
        begun = [Text(i, p, Written([], None)) for i, p in enumerate(prompts)]
        found_rows = behind([tuple(p) for p in prompts])
        model = torch.cat([found_rows[tuple(p)] for p in prompts]).double().log_softmax(-1)
        begins = [next(_replay(chain, text, found_rows, 0, None)) for text in begun]
        kept = [
            _off_the_cut(row[None], scores.log_softmax(-1)[0], there, those)
            for row, (scores, _, there), those in zip(model, begins, _counts(first, draws), strict=True)
        ]
        laws, counts = torch.stack([law for law, _ in kept]), [those for _, those in kept]
        frequencies = Frequencies(laws, model, counts)
    found = Finding(
        str(chain),
        generations=len({step.generation for step in steps}),
        steps=len(steps),
        differing=tuple(one for step in steps for one in step.differing if not one.near),
        near=sum(one.near for step in steps for one in step.differing),
        distance=max((step.distance for step in steps), default=0.0),
        drawn=draws * len(prompts) if frequencies else 0,
        impossible=frequencies.impossible if frequencies else 0,
        p=frequencies.p() if frequencies else None,
        seeded=len(same),
        same=sum(same),
        telling=telling,
    )
    if found.agrees:
        return found
    why = tuple(explain_laws(steps)) if not found.laws_agree else ()
    if not why and frequencies and not found.frequencies_agree:
        why = tuple(explain_frequencies(frequencies))
    # What the engine says of its own samplers comes before guesses.
    known = [note for note in engine.notes() if note.split(":")[0] in {step.rule.name for step in chain.steps}]
    return replace(found, interference=(*known, *why))


# ---- the reference

AT_ONCE = 16
"""Texts whose rows are held at a time."""


class Text(NamedTuple):
    """What an engine wrote behind a prompt, and the number of the generation."""

    generation: int
    prompt: list[int]
    written: Written

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """What stood before each of its tokens, and if there are none, behind the prompt."""
        tokens = self.written.tokens
        return [(*self.prompt, *tokens[:size]) for size in range(max(len(tokens), 1))]


def _rows_behind(engine: Engine, rows: Rows | None, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """(1, V) logits behind each text, asked for once."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    own = engine.rows(distinct)
    if own is None and rows is not None:
        own = rows(distinct)
    if own is None:
        raise DecalError(f"{engine.name} doesn't tell what its model gives; pass rows= that does, of the same model (--model)")
    return {text: own[i : i + 1] for i, text in enumerate(distinct)}


def reference(chain: Chain, text: Text, rows: Mapping[tuple[int, ...], Tensor], number: int = 0) -> Tensor:
    """(len(text.prefixes), V) float64 log-probabilities of the chain at every step of a text.

    Args:
        rows: (1, V) the model's logits, by what stands before them.
        number: of the request, for its coins.
    """
    return torch.cat([scores for scores, *_ in _replay(chain, text, rows, number, None)]).log_softmax(-1)


def _replay(
    chain: Chain, text: Text, rows: Mapping[tuple[int, ...], Tensor], number: int, seed: int | None
) -> Iterator[tuple[Tensor, Tensor, Callable[..., Tensor]]]:
    """At every step of a text the chain's scores, (1, V) float64, the token it draws with the seed, and what it makes of other
    rows there."""
    state = chain.init(1) if "state" in chain.needs else None
    tokens, reached_early = text.written.tokens, _early(chain)
    with dispatch.use("reference"):
        for size, before in enumerate(text.prefixes if tokens or seed is None else []):
            row = rows[before]
            history = History.of([before], prompt=len(text.prompt), request=[number])
            scores, seen = chain.apply(row.double(), state, history=history, check=False)

            def there(other: Tensor, early: bool = False, history: History = history, state: Any = state) -> Tensor:
                return (reached_early if early else chain)(other, history=history, state=state, check=False)

            token = torch.zeros(1)
            if seed is not None:
                token, _ = chain.draw(row, [seed], [len(before)], state, history=history, check=False)
            yield scores, token, there
            if state is not None and size < len(tokens):
                state = chain.observe(state, seen, torch.tensor([tokens[size]]))


def rows_of(loaded: Any) -> Rows:
    """What a model of transformers gives behind texts; ``loaded`` has it as ``model``."""

    @torch.inference_mode()
    def rows(texts: Sequence[Sequence[int]]) -> Tensor:
        model = loaded.model
        return torch.cat([model(torch.tensor([list(t)], device=model.device)).logits[:, -1].float().cpu() for t in texts])

    return rows


# ---- laws


class Step(NamedTuple):
    """One step of one generation: (V,) log-probabilities of the model, the chain and the engine, and the text before it."""

    generation: int
    text: list[int]
    model: Tensor
    chain: Tensor
    engine: Tensor
    differing: list[Difference]
    distance: float


def _steps(chain: Chain, text: Text, rows: Mapping[tuple[int, ...], Tensor]) -> list[Step]:
    laws = text.written.laws
    assert laws is not None
    if not text.written.tokens:
        return []
    found = []
    for step, (scores, _, there) in enumerate(_replay(chain, text, rows, 0, None)):
        before = text.prefixes[step]
        row, ours, theirs = rows[before].double(), scores.log_softmax(-1)[0], laws[step].double().log_softmax(-1)
        if ours.shape != theirs.shape:
            raise DecalError(f"the engine gave laws of {len(theirs)} tokens, and rows of {len(ours)}")
        differing = _differing(text.generation, step, row, ours, theirs, there)
        both = ours.isfinite() & theirs.isfinite()
        distance = _apart(ours[both].log_softmax(-1), theirs[both].log_softmax(-1)) if bool(both.any()) else 1.0
        model = row.log_softmax(-1)[0]
        found.append(Step(text.generation, list(before), model, ours, theirs, differing, distance))
    return found


def _differing(
    number: int, step: int, row: Tensor, ours: Tensor, theirs: Tensor, there: Callable[..., Tensor]
) -> list[Difference]:
    kept = ours.isfinite()
    found: list[Difference] = []
    for token in ((kept != theirs.isfinite()) & ~(ours < TINY).logical_and(kept)).nonzero()[:, 0].tolist():
        near = len(found) < FEW and _flips(row, token, bool(kept[token]), there)
        found.append(Difference(number, step, token, "chain" if kept[token] else "engine", near))
    return found


def _flips(row: Tensor, token: int, kept: bool, there: Callable[..., Tensor]) -> bool:
    """Whether the chain decides otherwise on a token if the model's logit of it is `NEAR` away, or if masses count more."""
    moved = row.clone()
    moved[0, token] += -NEAR if kept else NEAR
    with dispatch.use("reference"):
        return any(bool(scores[0, token].isfinite()) != kept for scores in (there(moved), there(row, early=True)))


def _early(chain: Chain) -> Chain:
    """With every mass to reach smaller by the share `LOST`."""

    def smaller(step: RuleStep) -> RuleStep:
        name = MASSES.get(step.rule.name)
        if name is None or step.is_off:
            return step
        return replace(step, values={**step.values, name: step.values[name] * (1 - LOST)})  # type: ignore[operator]

    return replace(chain, steps=tuple(map(smaller, chain.steps)))


def _off_the_cut(row: Tensor, law: Tensor, there: Callable[..., Tensor], drawn: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The chain's law and the tokens drawn, without tokens on whose side of the cut rounding decides."""
    dropped = sorted({token for token in drawn if law[token].isneginf()})[:FEW]
    kept = law.isfinite().nonzero()[:, 0]
    lowest = kept[row[0, kept].argsort()][:FEW].tolist()
    near = [token for token in dropped + lowest if _flips(row, token, bool(law[token].isfinite()), there)]
    sure = law.clone()
    sure[near] = -torch.inf
    if not bool(sure.isfinite().any()):
        return law, []
    return sure.log_softmax(-1), [token for token in drawn if token not in near]


def _apart(one: Tensor, other: Tensor) -> float:
    """Total variation between two laws."""
    return float((one.exp() - other.exp()).abs().sum() / 2)


# ---- frequencies


class Frequencies(NamedTuple):
    """First tokens: (P, V) log-probabilities of chain and model behind each prompt, and of each the tokens drawn."""

    laws: Tensor
    model: Tensor
    tokens: list[list[int]]

    @property
    def impossible(self) -> int:
        """Draws of what the chain drops."""
        return sum(int(self.laws[i][those].isneginf().sum()) for i, those in enumerate(self.tokens))

    def p(self, laws: Tensor | None = None) -> float | None:
        """Of a chi-square test of all prompts together; tokens that are expected less than five times share a cell, if
        need be with another. None if every prompt has but one cell."""
        from scipy.stats import chi2

        statistic, freedom = 0.0, 0
        for law, those in zip(self.laws if laws is None else laws, self.tokens, strict=True):
            if not those:
                continue
            expected = law.exp() * len(those)
            counts = torch.bincount(torch.tensor(those, dtype=torch.long), minlength=len(law)).double()
            if bool((counts[expected < 1e-9] > 0).any()):
                return 0.0
            rare = expected < 5
            if 0 < float(expected[rare].sum()) < 5 and bool((~rare).any()):
                rare[expected.masked_fill(rare, torch.inf).argmin()] = True  # the test wants five in every cell
            expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
            counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
            cells = expected > 0
            statistic += float(((counts - expected)[cells].square() / expected[cells]).sum())
            freedom += int(cells.sum()) - 1
        return float(chi2.sf(statistic, freedom)) if freedom else None

    def likelihood(self, laws: Tensor) -> float:
        """Log-likelihood of the draws, where a thousandth of them may be anything."""
        mixed = (laws.exp() * 0.999 + 0.001 / laws.shape[1]).log()
        return sum(float(mixed[i][those].sum()) for i, those in enumerate(self.tokens))


def _counts(written: Sequence[Written], draws: int) -> list[list[int]]:
    if not all(one.tokens for one in written):
        raise Refused("the engine wrote nothing, not even an end token, behind a prompt")
    first = [one.tokens[0] for one in written]
    return [first[start : start + draws] for start in range(0, len(first), draws)]


# ---- what interferes


def explain_laws(steps: Sequence[Step]) -> Iterator[str]:
    """What would make the engine's laws of the chain's, in words."""
    if all(_apart(step.engine, step.model) <= APART for step in steps):
        yield "the chain isn't applied: its keys are ignored, or the processor isn't there"
        return
    if all(int(step.engine.isfinite().sum()) == 1 and step.engine.argmax() == step.chain.argmax() for step in steps):
        yield "a temperature of 0 beside the chain: every step keeps the most probable token alone"
        return
    penalised = _penalised(steps)
    if penalised:
        yield penalised
        return
    slope = _slope(steps)
    if slope is not None and abs(slope - 1) > 1e-2:
        yield f"a further temperature({1 / slope:.3g}) beside the chain"
    slope = slope or 1.0
    before = [step.chain for step in steps]
    after = [(step.chain * slope).log_softmax(-1) for step in steps]
    kept = [step.engine.isfinite() for step in steps]
    if any(bool((k & ~law.isfinite()).any()) for k, law in zip(kept, before, strict=True)):
        yield "the engine keeps tokens that the chain drops: another chain, or the chain before something that lifts tokens"
        return
    if all(bool((k == law.isfinite()).all()) for k, law in zip(kept, before, strict=True)):
        if abs(slope - 1) <= 1e-2:
            yield "the same tokens with other probabilities, which no temperature explains"
        return
    cuts = [*_cuts(before, kept, "before"), *_cuts(after, kept, "after")] if abs(slope - 1) > 1e-2 else _cuts(before, kept, "")
    yield (
        "a further cut beside the chain: " + " or ".join(dict.fromkeys(cuts))
        if cuts
        else "a further cut beside the chain, which is no top_k, top_p or min_p"
    )


def _slope(steps: Sequence[Step]) -> float | None:
    """By what the engine's log-probabilities are the chain's times a number, if they are; differences within a row tell."""
    slopes = []
    for step in steps:
        both = step.chain.isfinite() & step.engine.isfinite()
        ours, theirs = step.chain[both], step.engine[both]
        if len(ours) > 1 and ours.max() - ours.min() > 0.1:
            ours, theirs = ours - ours.mean(), theirs - theirs.mean()
            slope = float((ours * theirs).sum() / ours.square().sum())
            if float((theirs - slope * ours).abs().max()) > 0.05 * (1 + float(theirs.abs().max())):
                return None
            slopes.append(slope)
    if not slopes or max(slopes) - min(slopes) > 0.02 * max(slopes):
        return None
    return sum(slopes) / len(slopes)


def _penalised(steps: Sequence[Step]) -> str:
    """Words for a penalty on the tokens of the text, if that is all."""
    found = False
    for step in steps:
        both = step.chain.isfinite() & step.engine.isfinite()
        ratio = torch.where(both, step.engine - step.chain, torch.nan)
        inside = torch.zeros_like(both)
        inside[torch.tensor(step.text)] = True
        outside, within = ratio[both & ~inside], ratio[both & inside]
        if len(outside) < 2 or float(outside.max() - outside.min()) > 0.02:
            return ""
        found |= len(within) > 0 and float((within - outside.median()).min()) < -0.05
    return "a penalty on tokens of the text beside the chain" if found else ""


def _cuts(laws: Sequence[Tensor], kept: Sequence[Tensor], when: str) -> list[str]:
    """The cuts of one parameter that make of every law what was kept of it."""
    where = f", {when} the temperature" if when else ""
    bounds: dict[str, tuple[float, float]] = {"top_k": (0, torch.inf), "top_p": (0, 1), "min_p": (0, 1)}
    for law, those in zip(laws, kept, strict=True):
        values = law.sort(descending=True).values
        values = values[values.isfinite()]
        size = int(those.sum())
        if not bool((law[those].min() >= law[law.isfinite() & ~those]).all()):
            return []
        mass, whole = values.exp().cumsum(0), size == len(values)
        ratio = (values - values[0]).exp()
        own = {
            "top_k": (float(size), torch.inf if whole else float(size)),
            "top_p": (float(mass[size - 2]) if size > 1 else 0.0, 1.0 if whole else float(mass[size - 1])),
            "min_p": (0.0 if whole else float(ratio[size]), float(ratio[size - 1])),
        }
        bounds = {
            name: (max(low, own[name][0]), min(high, own[name][1])) for name, (low, high) in bounds.items() if name in own
        }
    slack = {"top_k": 0.0, "top_p": 1e-3, "min_p": 1e-3}
    fits = {name: (low, high) for name, (low, high) in bounds.items() if low <= high + slack[name]}
    return [
        f"top_k({low:.0f}){where}" if name == "top_k" else f"{name}({_round_between(low, high)}){where}"
        for name, (low, high) in fits.items()
    ]


def _round_between(low: float, high: float) -> str:
    """The shortest decimal in an interval, or its middle."""
    for digits in range(1, 6):
        middle = round((low + high) / 2, digits)
        if low - 1e-9 <= middle <= high + 1e-9:
            return f"{middle:g}"
    return f"{(low + high) / 2:.3g}"


CANDIDATES = (
    *(f"top_k({k})" for k in (1, 10, 20, 40, 50, 64, 100)),
    *(f"top_p({p})" for p in (0.8, 0.85, 0.9, 0.95)),
    *(f"min_p({p})" for p in (0.02, 0.05, 0.1)),
    *(f"temperature({t})" for t in (0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5)),
)
"""Steps that engines are known to add."""


def explain_frequencies(found: Frequencies) -> Iterator[str]:
    """The same from draws alone: the one of a few candidates that fits, if one does."""
    laws = {"the chain isn't applied: its keys are ignored, or the processor isn't there": found.model}
    for text in CANDIDATES:
        with dispatch.use("reference"):
            laws[f"a further {text} beside the chain"] = parse(text)(found.laws, check=False).log_softmax(-1)
    best = max(laws, key=lambda words: found.likelihood(laws[words]))
    if (found.p(laws[best]) or 0.0) >= FALSE_ALARMS and found.likelihood(laws[best]) > found.likelihood(found.laws) + 5:
        yield f"{best} (the likeliest of {len(laws)} guesses, from frequencies)"
    else:
        yield "the frequencies are those of nothing decal knows to guess"
