"""Validity and diversity where the valid set is too large to read every prefix: estimates with intervals, by sampling answers.

Answers are drawn half from the uniform law on the valid set, which counting makes easy, and half from the model made to write
only valid tokens, at one of four temperatures. Whatever a chain does, its probability of each drawn answer is then computed
exactly, and weighted by how likely the answer was to be drawn (importance sampling from a mixture). So one set of forward
passes, at most as many as the drawn answers have prefixes, serves every chain, and estimates of different chains are paired.

What was not drawn is not seen: a chain that is much sharper than these laws may put its probability where no draw is. The
number of effective draws is computed from the draws alone and can't tell that; below `FEW` of them no interval is given.

Legend: S settings, A distinct answers drawn, R resamples, K temperatures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from decal.eval import rows
from decal.eval.exact import Rows, Situation, flows, group, outcome
from decal.eval.frontier import LEVEL, Evaluation
from decal.eval.paths import cache_dir, scratch_dir
from decal.eval.ranking import Estimate
from decal.eval.task import Question
from decal.samplers.chain import Chain
from decal.samplers.context import GIVEN
from decal.samplers.errors import DecalError
from decal.samplers.trie import MOST_ANSWERS, Policy, TokenTrie, TrieBuilder
from decal.samplers.valid_set import ValidSet

RESAMPLES = 400
END = -1
"""In place of a token: the end of the answer."""
FEW = 100
"""Below this many effective draws an estimate has no interval: resampling would make it too narrow."""
TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
"""At which the model is drawn from."""


@dataclass(frozen=True)
class Draws:
    """Answers drawn on one prompt.

    Attributes:
        trie: their token sequences; answers are numbered in it.
        uniform, guided: (A,) how often each came from either law.
        guided_others: how often the guided law gave another spelling of an answer, which doesn't count as one.
        log_guided: (A,) log-probability of each under the guided law, the mean over temperatures.
        size: |V|.
    """

    trie: TokenTrie
    uniform: np.ndarray
    guided: np.ndarray
    guided_others: int
    log_guided: np.ndarray
    size: int

    @property
    def total(self) -> int:
        """Number of draws."""
        return int(self.uniform.sum() + self.guided.sum()) + self.guided_others

    @property
    def log_proposal(self) -> np.ndarray:
        """(A,) log-probability of each under the mixture of both laws."""
        part = self.uniform.sum() / self.total
        return np.logaddexp(math.log(part) - math.log(self.size), math.log(1 - part) + self.log_guided)


def _below(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """Whole numbers below ``size``, which may be larger than any machine integer."""
    words = -(-size.bit_length() // 32) + 2
    return [int.from_bytes(rng.bytes(4 * words), "little") * size >> 32 * words for _ in range(count)]


class Drawing:
    """Draws answers while a trie of them is grown; see `Draws`.

    Args:
        builder, valid, policy: as for an exact trie. The policy's tokenisation must be canonical and its case exact, and
            answers need an end.
        uniform, guided: how many answers to draw from either law.
        seed: decides them, whatever the order in which nodes are visited.

    Raises:
        DecalError: the policy is another, or an answer can't be tokenised.
    """

    def __init__(self, builder: TrieBuilder, valid: ValidSet, policy: Policy, uniform: int, guided: int, seed: int):
        if not policy.one_path_each or not policy.ends:
            raise DecalError("an estimate needs canonical tokenisation, exact case, and answers that end")
        self.builder, self.valid, self.policy, self.seed = builder, valid, policy, seed
        self.space = " " if policy.leading_space else ""
        self.steps: dict[Any, dict[int, Any]] = {}
        self.trie = TokenTrie(0, builder.ends(policy))
        self.answers: list[int] = []  # the node of each
        self.uniform: Counter[int] = Counter()
        self.guided: Counter[int] = Counter()
        self.others = 0
        # A state is what is written of a character, None before a leading space, and the state of the valid set.
        self.state: list[Any] = [(None if self.space else b"", valid.start)]
        # By temperature: draws that have come to a node, and the log-probability of coming there and of ending there.
        k = len(TEMPERATURES)
        self.waiting = {0: np.asarray([guided * (i + 1) // k - guided * i // k for i in range(k)])}
        self.log_guided = [np.zeros(k)]
        self.log_ending: dict[int, np.ndarray] = {}
        self.guided_total = guided
        rng = np.random.default_rng([seed, 0])
        for number in _below(rng, valid.size, uniform):
            self.uniform[self._answer(self._insert(self.space + valid.at(number)))] += 1

    def _insert(self, text: str) -> int:
        node = 0
        for token in self.builder.canonical(text, self.valid.source):
            node = self._child(node, token)
        return node

    def _child(self, node: int, token: int) -> int:
        known = len(self.trie)
        child = self.trie.add(node, token)
        if child == known:
            self.state.append(self._following(self.state[node])[token])
            self.log_guided.append(np.full(len(TEMPERATURES), math.nan))
        return child

    def _answer(self, node: int) -> int:
        """Number of the answer that ends at ``node``."""
        if self.trie.answer[node] < 0:
            self.trie.answer[node] = len(self.answers)
            self.answers.append(node)
            self.trie.size += 1
        return self.trie.answer[node]

    def _following(self, state: Any) -> dict[int, Any]:
        """``{token: state after it}`` for the tokens that spell on towards an answer."""
        if state not in self.steps:
            self.steps[state] = dict(self._walk(state))
            if both := self.steps[state].keys() & set(self.trie.ends):
                end = self.builder.vocabulary.bytes_of[min(both)].decode(errors="replace")
                raise DecalError(f"{self.valid.source}: the token {end!r} ends an answer, but an answer contains it")
        return self.steps[state]

    def _walk(self, state: Any) -> Iterator[tuple[int, Any]]:
        stack = [(state, self.builder.vocabulary.root)]
        while stack:
            here, (_, further) = stack.pop()
            for byte, after in self._bytes(here):
                if byte in further:
                    yield from ((token, after) for token in further[byte][0])
                    stack.append((after, further[byte]))

    def _bytes(self, state: Any) -> Iterator[tuple[int, Any]]:
        """The bytes that some answer continues with, each with the state after it."""
        written, here = state
        if written is None:
            yield ord(" "), (b"", here)
            return
        begun = {}
        for character, after in self.valid.edges(here).items():
            text = character.encode()
            if text.startswith(written):
                longer = text[: len(written) + 1]
                begun[longer[-1]] = (b"", after) if longer == text else (longer, here)
        yield from begun.items()

    def grow(self, trie: TokenTrie, node: int, reach: Tensor) -> None:
        """Go on from a node with the answers that have been drawn so far; see `decal.eval.forward.prefix_logits`."""
        written, here = self.state[node]
        p = (reach / reach.sum()).cpu().numpy()
        tokens = list(self._following(self.state[node]))
        share = p[tokens]
        if written == b"" and self.valid.final(here):
            tokens.append(END)
            share = np.append(share, p[list(trie.ends)].sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            log_share = np.log(share) / np.asarray(TEMPERATURES)[:, None]
            log_share -= np.logaddexp.reduce(log_share, -1, keepdims=True)
        if not share.any():
            log_share[:] = -np.inf
        # (K, tokens) how many go on with each token, at each temperature.
        times = self._draw(node, log_share)
        for place, token in enumerate(tokens):
            if times[:, place].any() and token == END:
                self._ended(node, int(times[:, place].sum()))
            elif times[:, place].any():
                self.waiting[self._child(node, token)] = times[:, place]
        for place, token in enumerate(tokens):
            if token == END:
                self.log_ending[node] = log_share[:, place]
            elif token in trie.children[node]:
                self.log_guided[trie.children[node][token]] = self.log_guided[node] + log_share[:, place]

    def _draw(self, node: int, log_share: np.ndarray) -> np.ndarray:
        drawn = self.waiting.pop(node, None)
        if drawn is None or not drawn.any():
            return np.zeros(log_share.shape, dtype=np.int64)
        share = np.exp(log_share)
        if not share.any():
            self.others += int(drawn.sum())
            return np.zeros(log_share.shape, dtype=np.int64)
        rng = np.random.default_rng([self.seed, 1, *self.trie.path(node)])
        return np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(drawn, share, strict=True)])

    def _ended(self, node: int, times: int) -> None:
        path = self.trie.path(node)
        text = b"".join(self.builder.vocabulary.bytes_of[t] for t in path).decode()
        if self.builder.encode(text) == path:
            self.guided[self._answer(node)] += times
        else:
            self.others += times

    def draws(self) -> Draws:
        """What was drawn, once the trie is grown."""
        by_temperature = np.stack([self.log_guided[node] + self.log_ending[node] for node in self.answers])
        # The draws are shared out as evenly as whole numbers go, and weighted as they were.
        k = len(TEMPERATURES)
        shares = [self.guided_total * (i + 1) // k - self.guided_total * i // k for i in range(k)]
        with np.errstate(divide="ignore"):
            log_guided = np.logaddexp.reduce(by_temperature + np.log(np.asarray(shares) / self.guided_total), -1)
        return Draws(self.trie, self._times(self.uniform), self._times(self.guided), self.others, log_guided, self.valid.size)

    def _times(self, counts: Counter[int]) -> np.ndarray:
        return np.asarray([counts[answer] for answer in range(len(self.answers))], dtype=float)


@dataclass(frozen=True)
class Estimated:
    """Estimates for S settings on one prompt.

    Attributes:
        validity, diversity: (S,); diversity is NaN where nothing valid was drawn that the setting can give.
        resampled: (2, R, S) both, with the answers drawn again.
        effective: (S,) number of equally weighted draws that the weighted ones are worth, as far as these can tell.
        nodes: prefixes read.
    """

    validity: np.ndarray
    diversity: np.ndarray
    resampled: np.ndarray
    effective: np.ndarray
    nodes: int


def weigh(draws: Draws, answers: np.ndarray, seed: int = 0) -> Estimated:
    """Estimates from what was drawn.

    Args:
        answers: (S, A) probability that each setting gives each drawn answer.
    """
    given = answers > 0
    logs = np.log(np.where(given, answers, 1.0))
    weight = np.where(given, np.exp(logs - draws.log_proposal), 0.0)
    counts = draws.uniform + draws.guided
    rng = np.random.default_rng([seed, 2])
    again = _again(rng, draws.uniform, 0) + _again(rng, draws.guided, draws.guided_others)
    both = np.stack([np.stack(_both(c, weight, logs, draws)) for c in (counts, *again)], 1)
    total = weight @ counts
    squares = weight**2 @ counts
    effective = np.divide(total**2, squares, out=np.zeros_like(total), where=squares > 0)
    return Estimated(both[0, 0], both[1, 0], both[:, 1:], effective, len(draws.trie))


def _again(rng: np.random.Generator, counts: np.ndarray, others: int) -> np.ndarray:
    """(R, A) draws from one of the laws, drawn again from themselves."""
    every = np.append(counts, others)
    return rng.multinomial(int(every.sum()), every / every.sum(), RESAMPLES)[:, :-1].astype(float)


def _both(counts: np.ndarray, weight: np.ndarray, logs: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    validity = weight @ counts / draws.total
    some = validity > 0
    mean_log = np.divide((weight * logs) @ counts / draws.total, validity, out=np.zeros_like(validity), where=some)
    entropy = np.log(np.where(some, validity, 1.0)) - mean_log
    return validity, np.where(some, np.exp(entropy - math.log(draws.size)), np.nan)


def estimate(
    evaluation: Evaluation,
    question: Question,
    chains: Sequence[Chain],
    samples: int = 1000,
    tick: Callable[[int], None] = lambda amount: None,
) -> list[Estimated]:
    """Estimates of every chain on each prompt of a task.

    Args:
        evaluation: on the model; its settings don't matter, its seed decides what is drawn.
        samples: answers drawn on a prompt, half from each law. The model reads at most as many prefixes as they have together.
        tick: called with the number of prefixes just read.

    Raises:
        DecalError: the task doesn't fit the model, or a chain can't be evaluated.
    """
    if samples < 2:
        raise DecalError(f"an estimate needs at least 2 samples, got {samples}")
    check(chains)
    groups = group(chains)
    found = []
    for number, (_, prompt) in enumerate(question.prompts(evaluation.model.tokenizer, evaluation.seed)):
        half = samples // 2
        seed = evaluation.seed * 1_000_003 + number
        drawing = Drawing(evaluation.builder, question.valid, question.policy, half, samples - half, seed)
        with scratch_dir(cache_dir()) as folder:
            rows.compute(folder, evaluation.model.model, prompt, drawing.trie, drawing.grow, tick)
            draws = drawing.draws()
            stored: Rows = rows.StoredRows(folder)
            situation = Situation(prompt, evaluation.weights)
            flow = flows(draws.trie, stored, groups, len(chains), situation=situation)
        found.append(weigh(draws, outcome(draws.trie, flow).answers, seed))
    return found


def check(chains: Sequence[Chain]) -> None:
    """Raise DecalError if a chain reads what an estimate doesn't have: all the answers, not those drawn, or other prompts."""
    for chain in chains:
        for need in sorted(chain.needs & {"answers", "prompts"}):
            raise DecalError(
                f"{chain} reads {GIVEN[need].what}, which an estimate can't give it; use decal frontier, for"
                f" up to {MOST_ANSWERS} answers"
            )


def over_prompts(found: Sequence[Estimated]) -> tuple[list[Estimate], list[Estimate]]:
    """Validity and diversity of each setting, means over prompts, at most 1; intervals cover the drawing of answers, not of
    prompts, and are left out below `FEW` effective draws."""
    value = np.mean([[one.validity, one.diversity] for one in found], 0)
    low, high = np.quantile(np.mean([one.resampled for one in found], 0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    lines = np.minimum(np.stack([value, low, high], -1), 1.0)
    enough = np.min([one.effective for one in found], 0) >= FEW
    both = [
        [Estimate(*map(float, ends if many else ends[:1])) for ends, many in zip(line, enough, strict=True)] for line in lines
    ]
    return both[0], both[1]


def summary(
    found: Sequence[Estimated], chains: Sequence[Chain], question: Question, model: str, samples: int, seed: int
) -> dict[str, Any]:
    """The estimates as JSON."""
    validity, diversity = over_prompts(found)
    lines = [
        {
            "chain": str(chain),
            "validity": asdict(v),
            "diversity": asdict(d) if math.isfinite(d.value) else None,
            "effective_draws": float(min(one.effective[number] for one in found)),
        }
        for number, (chain, v, d) in enumerate(zip(chains, validity, diversity, strict=True))
    ]
    about = {"model": model, "task": question.task.name, "answers": question.valid.size, "prompts": len(found)}
    return {**about, "samples": samples, "seed": seed, "prefixes": sum(one.nodes for one in found), "chains": lines}


def print_table(told: Mapping[str, Any], console: Any) -> None:
    """Print what `summary` says."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("chain", "validity", "diversity", "effective draws"):
        table.add_column(heading, justify="left" if heading == "chain" else "right")
    for line in told["chains"]:
        cells = [_cell(line[name]) for name in ("validity", "diversity")]
        few = " (few)" if line["effective_draws"] < FEW else ""
        table.add_row(line["chain"], *cells, f"{line['effective_draws']:.0f}{few}")
    prompts = f"{told['prompts']} prompts" if told["prompts"] > 1 else "one prompt"
    console.print(f"{told['model']}, {told['task']}: {told['answers']} answers, {prompts}, {told['samples']} draws each\n")
    console.print(table)
    said = f"In brackets 95 % intervals for the drawing of answers, from {FEW} effective draws on; prompts are not in them."
    console.print(
        f"\n{said} A chain much sharper than the model may hide where nothing was drawn.", style="dim", highlight=False
    )


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    ends = "" if value["low"] is None else f" [{value['low']:.4g}, {value['high']:.4g}]"
    return f"{value['value']:.4g}{ends}"
