"""Order where no list of valid answers exists: the tree procedure of arXiv 2605.11128.

At a prefix the model's ranking of next tokens is swept at some ranks, each swept token is completed by the model, and the
completions are judged. A token is valid if a completion through it is. So precision and recall of every cutoff of the swept
ranking can be counted, each valid token alike. Then the same is done one token deeper, behind some of the valid tokens. All
of it is relative to what was swept, to what the model completes, and to the judge.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval import shape
from decal.eval.completion import Form, Writer, encode
from decal.eval.frontier import Report
from decal.eval.journal import Journal, alone, digest
from decal.eval.judge import KINDS, Judge, Judgement, Remembered
from decal.eval.models import LoadedModel
from decal.eval.order import Prefix
from decal.eval.ranked import plain
from decal.samplers.chain import Chain, parse
from decal.samplers.errors import DecalError

RANKS = "1-50,60-1000:10"
MOST_RANKS = 100_000
NODES, COMPLETIONS, JUDGED = "nodes.jsonl", "completions.jsonl", "judged.jsonl"
"""Files of finished work, which the next run takes up."""


def ranks(text: str) -> tuple[int, ...]:
    """The ranks in a text such as ``1-50,60-1000:10``: single ones, and ranges with or without a step, ascending.

    Raises:
        DecalError: the text is something else, or means more than `MOST_RANKS`.
    """
    found: set[int] = set()
    for part in text.split(","):
        try:
            ends, _, step = part.partition(":")
            first, dash, last = ends.partition("-")
            one = range(int(first), int(last if dash else first) + 1, int(step) if step else 1)
        except ValueError:
            raise DecalError(f"ranks must be like {RANKS}, got {part!r} in {text!r}") from None
        if one.start < 1 or not one or one.step < 1:
            raise DecalError(f"ranks begin at 1 and ascend, got {part!r} in {text!r}")
        if len(one) + len(found) > MOST_RANKS:
            raise DecalError(f"at most {MOST_RANKS} ranks can be swept, got more in {text!r}")
        found.update(one)
    return tuple(sorted(found))


@dataclass(frozen=True)
class Plan:
    """What to sweep, and how to complete.

    Attributes:
        ranks: which ranks of a ranking to complete, ascending from 1; those beyond the vocabulary are left out.
        depth: how many tokens deep to go; 1 is the first token only.
        branch: behind how many valid tokens to go deeper at each prefix: the most probable one, the least probable one, and
            further ones evenly between them in rank.
        completions: how many completions of a token are drawn; None for one, greedily.
        share: the share of a token's completions that must be valid, in (0, 1]; None if one is enough.
        sampler: the chain that draws, as text. It may read the current row of logits, embeddings, and what ends a text.
        most: new tokens of a completion behind the swept one.
        stop: texts before which a completion ends, beside the model's own end tokens.
        form: how the prompt is put, see `decal.eval.completion.encode`.
        batch: completions written at once.
        seed: decides the draws.

    Raises:
        DecalError: a value is out of range.
    """

    ranks: tuple[int, ...] = ranks(RANKS)
    depth: int = 2
    branch: int = 2
    completions: int | None = None
    share: float | None = None
    sampler: str = "temperature(1)"
    most: int = 48
    stop: tuple[str, ...] = ()
    form: Form = "completion"
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"depth": 1, "branch": 1, "completions": 1, "most": 1, "batch": 1, "seed": 0}
        for name, low in least.items():
            given = getattr(self, name)
            if given is not None and given < low:
                raise DecalError(f"{name} must be at least {low}, got {given}")
        if self.completions is None and self.sampler != Plan.sampler:
            raise DecalError(
                f"{self.sampler} would draw completions, but without a number of completions there is one, greedily; give both"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise DecalError(f"share must be in (0, 1], got {self.share:g}")
        if not self.ranks or list(self.ranks) != sorted({r for r in self.ranks if r >= 1}):
            raise DecalError("ranks must be whole numbers from 1, ascending")
        if "" in self.stop:
            raise DecalError("a stop text must not be empty")
        if unfit := self.chain.needs - {"model", "ends"}:
            raise DecalError(f"a sampler of completions may read the current row alone; {self.chain} needs {min(unfit)}")

    @cached_property
    def chain(self) -> Chain:
        """The sampler of completions."""
        return parse("temperature(0)" if self.completions is None else self.sampler)

    def needed(self, completions: int) -> int:
        """How many of so many completions of a token must be valid for it to be."""
        return 1 if self.share is None else max(1, math.ceil(self.share * completions - 1e-9))

    @property
    def nodes(self) -> int:
        """Most prefixes that are swept."""
        return sum(self.branch**depth for depth in range(self.depth))


@dataclass(frozen=True)
class Completion:
    """One completion through a token.

    Attributes:
        text: all that follows the prompt.
        ended: whether it came to an end by itself.
        judgement: what the judge says.
    """

    text: str
    ended: bool
    judgement: Judgement


@dataclass(frozen=True)
class Swept:
    """A token of a ranking that was looked at.

    Attributes:
        token, text: its id and what it writes.
        rank: its place in the ranking, from 1; equals in the order of ids.
        logit, probability: the model's, at temperature 1.
        ends: whether the text ends with it.
        completions: through it.
        valid: None if that hangs on completions without a verdict.
    """

    token: int
    text: str
    rank: int
    logit: float
    probability: float
    ends: bool
    completions: tuple[Completion, ...]
    valid: bool | None


@dataclass(frozen=True)
class Node:
    """A prefix and what was swept there.

    As in `decal.eval.order`, tokens that end the text alike are one step, which stands where the most probable of them does.

    Attributes:
        number: place in the tree, parents first.
        prefix: token ids written before.
        text: what they write.
        tokens: most probable first.
    """

    number: int
    prefix: tuple[int, ...]
    text: str
    tokens: tuple[Swept, ...]

    @property
    def valid(self) -> list[Swept]:
        """The valid ones."""
        return [t for t in self.tokens if t.valid]

    @cached_property
    def steps(self) -> list[list[Swept]]:
        """What there is to choose between, as far as its validity is known: the tokens of each step, most probable first."""
        found: dict[tuple[bool, int | str], list[Swept]] = {}
        for token in self.tokens:
            if token.valid is not None:
                step = token.completions[0].text if token.ends else token.token
                found.setdefault((token.ends, step), []).append(token)
        return list(found.values())

    @cached_property
    def order(self) -> Prefix | None:
        """The valid steps among those of known validity, as if there were no others; None if there are none.

        Each counts as one completion, and where it leads to is left open. Probabilities are those of the whole ranking.
        """
        valid = np.asarray([bool(tokens[0].valid) for tokens in self.steps], dtype=bool)
        if not valid.any():
            return None
        descending = -np.asarray([tokens[0].logit for tokens in self.steps])
        probability = np.asarray([math.fsum(t.probability for t in tokens) for tokens in self.steps])
        upto = np.searchsorted(descending, descending[valid], side="right")
        return Prefix(
            node=self.number,
            depth=len(self.prefix),
            to=np.full(len(upto), -1),
            count=np.ones(len(upto)),
            above=np.searchsorted(descending, descending[valid], side="left"),
            upto=upto,
            share=probability[valid],
            head=np.cumsum(probability)[upto - 1],
            tokens=len(valid),
        )

    @property
    def entropy(self) -> float | None:
        """Of the model's choice among the swept valid steps, in nats; None if there are none."""
        return None if self.order is None else shape.entropy(self.order.share)

    def branches(self, most: int) -> list[Swept]:
        """The valid tokens to go deeper behind, see `Plan.branch`."""
        fit = [t for t in self.valid if not t.ends]
        places = np.linspace(0, len(fit) - 1, min(most, len(fit)))
        return [fit[round(place)] for place in places]

    def summary(self) -> dict[str, Any]:
        """The numbers of the node, JSON-able. Recall and precision are those of cutoffs of the swept ranking."""
        order = self.order
        valid = 0 if order is None else len(order.upto)
        numbers: dict[str, Any] = {
            "node": self.number,
            "prefix": list(self.prefix),
            "text": self.text,
            "swept": len(self.tokens),
            "unknown": sum(t.valid is None for t in self.tokens),
            "steps": len(self.steps),
            "valid": valid,
            "valid_share": valid / len(self.steps) if self.steps else None,
            "swept_probability": math.fsum(t.probability for t in self.tokens),
            "valid_probability": math.fsum(t.probability for t in self.valid),
            "average_precision": None,
            "recall_at_precision_08": None,
            "entropy_of_valid": self.entropy,
            "cutoffs": [],
        }
        if order is not None:
            cutoffs = sorted(set(zip(order.upto, order.recall("unit"), order.precision, strict=True)))
            numbers["average_precision"] = order.average_precision("unit")
            numbers["recall_at_precision_08"] = order.recall_at(0.8, "unit")
            numbers["cutoffs"] = [{"size": int(k), "recall": float(r), "precision": float(p)} for k, r, p in cutoffs]
        return numbers


@dataclass(frozen=True)
class Tree:
    """A finished probe.

    Attributes:
        prompt: as the user gave it.
        plan: what was swept.
        judge: the judge's identity.
        nodes: parents first.
        about: model, versions, times; JSON-able.
    """

    prompt: str
    plan: Plan
    judge: str
    nodes: tuple[Node, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many completions were judged how, and how many were cut off; equal ones at several nodes count at each."""
        completions = [c for node in self.nodes for token in node.tokens for c in token.completions]
        verdicts = Counter(c.judgement.kind for c in completions)
        cut_off = sum(not c.ended for c in completions)
        return {"completions": len(completions), "cut_off": cut_off} | {kind: verdicts[kind] for kind in KINDS}


def probe(
    model: LoadedModel,
    judge: Judge,
    prompt: str,
    plan: Plan,
    folder: Path,
    report: Report = lambda what, done, total: None,
    node_done: Callable[[], None] = lambda: None,
) -> Tree:
    """Sweep, complete and judge.

    Finished work is kept in ``folder`` as it gets done, by model, prompt, prefix, token, seed and judge: a run that is
    interrupted, or is asked for more, repeats nothing. A text that several tokens lead to is judged once.

    Args:
        judge: decides about completions; it is given ``prompt`` as it stands here, not in a chat template.
        report: told about progress.
        node_done: called after each prefix, of which there are at most ``plan.nodes``.

    Raises:
        DecalError: the prompt doesn't fit the model, the judge can't work, the folder can't be written, or another process
            works in it.
    """
    with (
        alone(folder),
        Journal(folder / NODES) as nodes,
        Journal(folder / COMPLETIONS) as completions,
        Journal(folder / JUDGED) as judged,
    ):
        return _Probe(model, judge, prompt, plan, nodes, completions, judged, report).run(node_done)


class _Probe:
    def __init__(
        self,
        model: LoadedModel,
        judge: Judge,
        prompt: str,
        plan: Plan,
        nodes: Journal,
        completions: Journal,
        judged: Journal,
        report: Report,
    ):
        self.model, self.prompt, self.plan, self.report = model, prompt, plan, report
        self.rankings, self.completions = nodes, completions
        self.judged = Remembered(judge, prompt, judged)
        self.writer = Writer(model, plan.stop)
        self.ids = encode(model.tokenizer, prompt, plan.form)
        self.writer.check_room(len(self.ids) + plan.depth + plan.most)

    def run(self, node_done: Callable[[], None]) -> Tree:
        nodes: list[Node] = []
        level: list[tuple[int, ...]] = [()]
        for _ in range(self.plan.depth):
            fresh = []
            for number, prefix in enumerate(level, len(nodes)):
                fresh.append(self._node(number, prefix))
                node_done()
            nodes += fresh
            level = [(*node.prefix, t.token) for node in fresh for t in node.branches(self.plan.branch)]
        return Tree(self.prompt, self.plan, self.judged.identity, tuple(nodes))

    def _node(self, number: int, prefix: tuple[int, ...]) -> Node:
        what = f"node {number + 1}: "
        swept = self._sweep(prefix)
        written = self._complete(prefix, swept["tokens"], f"{what}completions")
        texts = [record["text"] for records in written for record in records]
        self.judged.ask(texts, partial(self.report, f"{what}judgements"))
        tokens = []
        for token, rank, logit, probability, records in zip(
            swept["tokens"], swept["ranks"], swept["logits"], swept["probabilities"], written, strict=True
        ):
            completions = tuple(Completion(r["text"], r["ended"], self.judged[r["text"]]) for r in records)
            tokens.append(
                Swept(
                    token=token,
                    text=self.writer.token_text(token),
                    rank=rank,
                    logit=logit,
                    probability=probability,
                    ends=self.writer.ended([*prefix, token]),
                    completions=completions,
                    valid=self._valid([c.judgement.valid for c in completions]),
                )
            )
        return Node(number, prefix, self.writer.text(prefix), tuple(tokens))

    def _valid(self, verdicts: Sequence[bool | None]) -> bool | None:
        needed = self.plan.needed(len(verdicts))
        if verdicts.count(True) >= needed:
            return True
        return None if verdicts.count(True) + verdicts.count(None) >= needed else False

    def _sweep(self, prefix: tuple[int, ...]) -> dict[str, Any]:
        """The swept part of the ranking after a prefix."""
        key = digest("node", self.model.fingerprint, self.ids, prefix, self.plan.ranks)
        if key not in self.rankings.records:
            row = self._logits(prefix)
            ranked, order = row.sort(descending=True, stable=True)
            alive = int(ranked.isfinite().sum())
            places = [rank - 1 for rank in self.plan.ranks if rank <= alive]
            record = {
                "key": key,
                "prefix": list(prefix),
                "ranks": [place + 1 for place in places],
                "tokens": order[places].tolist(),
                "logits": ranked[places].tolist(),
                "probabilities": (ranked - ranked.logsumexp(0)).exp()[places].tolist(),
            }
            self.rankings.add([record])
        return self.rankings.records[key]

    def _logits(self, prefix: tuple[int, ...]) -> Any:
        import torch

        model = self.model.model
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([[*self.ids, *prefix]], device=model.device), **last)
        row = plain(out.logits[0, -1]).double()
        if row.isnan().any() or row.isposinf().any() or not row.isfinite().any():
            raise DecalError(f"the model gives no usable logits after {self.writer.text(prefix)!r}")
        return row

    def _complete(self, prefix: tuple[int, ...], tokens: Sequence[int], what: str) -> list[list[dict[str, Any]]]:
        """The completions of each token."""
        plan = self.plan
        keys: list[list[str]] = []
        missing: list[tuple[str, int, int]] = []
        for token in tokens:
            # Where the text ends there is one completion, whatever the seed.
            several = 1 if plan.completions is None or self.writer.ended([*prefix, token]) else plan.completions
            own = []
            for number in range(several):
                seed = int(digest("seed", plan.seed, prefix, token, number)[:15], 16)
                drawn = 0 if plan.completions is None else seed
                key = digest(self.model.fingerprint, self.ids, prefix, token, drawn, str(plan.chain), plan.most, plan.stop)
                own.append(key)
                if key not in self.completions.records:
                    missing.append((key, token, drawn))
            keys.append(own)
        total = sum(map(len, keys))
        for start in range(0, len(missing), plan.batch):
            self.report(what, total - len(missing) + start, total)
            self.completions.add(self._write(prefix, missing[start : start + plan.batch]))
        self.report(what, total, total)
        return [[self.completions.records[key] for key in own] for own in keys]

    def _write(self, prefix: tuple[int, ...], wanted: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
        open_ = [(token, seed) for _, token, seed in wanted if not self.writer.ended([*prefix, token])]
        new: Iterator[list[int]] = iter(())
        if open_:
            starts = [[*self.ids, *prefix, token] for token, _ in open_]
            new = iter(self.writer.sampled(starts, self.plan.chain, [seed for _, seed in open_], self.plan.most))
        records = []
        for key, token, seed in wanted:
            path = [*prefix, token]
            whole = path if self.writer.ended(path) else [*path, *next(new)]
            records.append(
                {
                    "key": key,
                    "prefix": list(prefix),
                    "token": token,
                    "seed": seed,
                    "tokens": whole,
                    "text": self.writer.text(whole),
                    "ended": self.writer.ended(whole),
                }
            )
        return records
