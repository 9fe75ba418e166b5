"""Find the chain to use on one prompt, where valid answers can't be listed but judged: write drafts, judge them, choose."""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from decal.eval.completion import Form, Writer, encode
from decal.eval.frontier import Report
from decal.eval.journal import Journal, alone, digest
from decal.eval.judge import Judge, Remembered
from decal.eval.models import LoadedModel
from decal.eval.paths import atomic_write
from decal.samplers.chain import Chain
from decal.samplers.drafts import Chosen, Search
from decal.samplers.errors import DecalError
from decal.samplers.views import Prompts

DRAFTS, JUDGED, TUNED = "drafts.jsonl", "judged.jsonl", "tuned.json"
LIKELY = 0.5
"""A chain that reaches the floor with a smaller chance isn't recommended."""


@dataclass(frozen=True)
class Plan:
    """How many drafts to judge, and how to write them.

    Attributes:
        drafts: how many altogether.
        each: how many with a chain before the next one is chosen.
        most: new tokens of a draft.
        stop: texts before which a draft ends, beside the model's own end tokens.
        form: how the prompt is put, see `decal.eval.completion.encode`.
        seed: decides the drafts.

    Raises:
        DecalError: a value is out of range.
    """

    drafts: int = 50
    each: int = 5
    most: int = 48
    stop: tuple[str, ...] = ()
    form: Form = "completion"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"drafts": 1, "each": 1, "most": 1, "seed": 0}.items():
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, numbers.Integral) or int(given) < low:
                raise DecalError(f"{name} must be a whole number of at least {low}, got {given!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise DecalError(f"stop is a tuple of texts that aren't empty, got {self.stop!r}")
        if self.form not in get_args(Form):
            raise DecalError(f"form must be {' or '.join(get_args(Form))}, got {self.form!r}")


@dataclass(frozen=True)
class Tried:
    """What became of the drafts of a chain.

    Attributes:
        valid, judged: how many are, and of how many the judge said whether they are; the others are left out.
        drafts: how many there are.
        different: how many different valid ones.
    """

    chain: str
    valid: int
    judged: int
    drafts: int
    different: int


@dataclass(frozen=True)
class Tuned:
    """What was tried, in the order it was, what was chosen, and the tokens that ended a draft."""

    floor: float
    tried: tuple[Tried, ...]
    chosen: Chosen
    ends: tuple[int, ...]

    @property
    def likely(self) -> bool:
        """Whether the chosen chain reaches the floor more likely than not."""
        return self.chosen.chance >= LIKELY


def tune(
    model: LoadedModel,
    judge: Judge,
    prompt: str,
    search: Search,
    plan: Plan,
    folder: Path,
    others: Sequence[str] = (),
    report: Report = lambda what, done, total: None,
) -> Tuned:
    """Draft, judge, choose.

    Drafts and judgements are kept in ``folder`` as they get done: a run that is interrupted, or is asked for more drafts,
    repeats nothing.

    Args:
        judge: is given ``prompt`` as it stands here, not in a chat template.
        search: one that was told nothing yet; it is told of the drafts.
        others: other ways to ask, for chains that read them.
        report: told about progress.

    Raises:
        DecalError: the prompt doesn't fit the model, prompts are alike, the search was told something, the judge can't work or
            has no verdict on any draft, the folder can't be written, or another process works in it.
    """
    if search.drafts:
        raise DecalError(f"the search was told of {search.drafts} drafts before; tune begins with a new one")
    tuning = _Tuning(model, prompt, search, plan, others, report)
    with alone(folder), Journal(folder / DRAFTS) as drafts, Journal(folder / JUDGED) as judged:
        return tuning.run(drafts, Remembered(judge, prompt, judged))


class _Tuning:
    drafts: Journal
    judged: Remembered

    def __init__(self, model: LoadedModel, prompt: str, search: Search, plan: Plan, others: Sequence[str], report: Report):
        if isinstance(others, str) or len({prompt, *others}) <= len(others):
            raise DecalError(f"other ways to ask are texts unlike the prompt and each other, got {others!r}")
        self.model, self.search, self.plan, self.report = model, search, plan, report
        self.writer = Writer(model, plan.stop)
        self.ids, *self.ways = [encode(model.tokenizer, text, plan.form) for text in (prompt, *others)]
        self.writer.check_room(max(map(len, (self.ids, *self.ways))) + plan.most)
        put = partial(encode, model.tokenizer, form=plan.form)
        as_ids: Callable[[str], dict[str, Any]] = lambda text: {"input_ids": put(text)}  # noqa: E731
        self.views = Prompts(model.model, as_ids, {prompt: list(others)}) if others else None

    def run(self, drafts: Journal, judged: Remembered) -> Tuned:
        self.drafts, self.judged = drafts, judged
        texts: dict[str, list[str]] = {}
        for start in range(0, self.plan.drafts, self.plan.each):
            chain = self.search.ask()
            written = self._write(chain, range(start, min(start + self.plan.each, self.plan.drafts)))
            self.judged.ask(written)
            texts.setdefault(str(chain), []).extend(written)
            verdicts = [self.judged[text].valid for text in written]
            if told := len(verdicts) - verdicts.count(None):
                self.search.tell(verdicts.count(True), told)
            self.report("drafts", start + len(written), self.plan.drafts)
        if not self.search.drafts:
            reason = next(self.judged[text].reason for written in texts.values() for text in written)
            raise DecalError(f"the judge has no verdict on any of {self.plan.drafts} drafts; of the first it says: {reason}")
        tried = tuple(self._tried(chain, written) for chain, written in texts.items())
        return Tuned(self.search.floor, tried, self.search.best(), tuple(sorted(self.writer.ends)))

    def _tried(self, chain: str, written: Sequence[str]) -> Tried:
        valid = [text for text in written if self.judged[text].valid]
        judged = sum(self.judged[text].valid is not None for text in written)
        return Tried(chain, len(valid), judged, len(written), len({text.strip() for text in valid}))

    def _write(self, chain: Chain, numbers: range) -> list[str]:
        """The drafts of these numbers, which decide their seeds."""
        plan = self.plan
        seeds = [int(digest("draft", plan.seed, number)[:15], 16) for number in numbers]
        same = (self.model.fingerprint, self.ids, self.ways, str(chain), plan.most, plan.stop)
        keys = [digest(*same, seed) for seed in seeds]
        missing = [at for at, key in enumerate(keys) if key not in self.drafts.records]
        if missing:
            bound = chain if self.views is None else chain.for_prompts(self.views)
            new = self.writer.sampled([self.ids] * len(missing), bound, [seeds[at] for at in missing], plan.most)
            self.drafts.add(
                {"key": keys[at], "chain": str(chain), "seed": seeds[at], "text": self.writer.text(tokens)}
                for at, tokens in zip(missing, new, strict=True)
            )
        return [self.drafts.records[key]["text"] for key in keys]


def refuse_another(folder: Path, prompt: str) -> None:
    """Raise DecalError if the folder has what was tuned for another prompt, which `write` would replace."""
    try:
        other = json.loads((folder / TUNED).read_text(encoding="utf-8"))["about"]["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other != prompt:
        raise DecalError(f"{folder} has the results of another prompt, {other!r}; choose another --out")


def write(found: Tuned, about: Mapping[str, Any], folder: Path) -> None:
    """Write `TUNED`."""
    chosen = {**vars(found.chosen), "chain": str(found.chosen.chain)}
    tried = [asdict(one) for one in found.tried]
    content = {
        "about": dict(about),
        "floor": found.floor,
        "likely": found.likely,
        "chosen": chosen,
        "ends": found.ends,
        "tried": tried,
    }
    atomic_write(folder / TUNED, json.dumps(content, indent=1, allow_nan=False))


def print_table(found: Tuned, console: Any) -> None:
    """Print what was tried, and what to use."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("tried", "drafts", "valid", "different ones"):
        table.add_column(heading, justify="left" if heading == "tried" else "right")
    for one in found.tried:
        unsure = f" of {one.judged}" if one.judged < one.drafts else ""
        table.add_row(Text(one.chain), str(one.drafts), f"{one.valid}{unsure}", str(one.different))
    console.print(table)
    best = found.chosen
    about = (
        f"Its validity on this prompt is {found.floor:g} or more with probability {best.chance:.2f}; the best guess is"
        f" {best.validity:.2f}."
    )
    silent = sum(one.drafts - one.judged for one in found.tried)
    if silent:
        about += f" The judge had no verdict on {silent} drafts, which are left out."
    if found.likely:
        diverse = f"Going by other prompts, its diversity should be about {best.diversity:.2f} of what is possible."
        said = f"Use {best.chain}. {about} {diverse}"
    else:
        said = (
            f"No chain of this calibration is likely to reach validity {found.floor:g} on this prompt. The best bet is"
            f" {best.chain}. {about} Ask in another way, judge more drafts, or settle for less validity."
        )
    console.print(f"\n{said}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nIn Python: {best.chain.usage}.", highlight=False, markup=False, soft_wrap=True)
    if "ends" in best.chain.needs:
        ends = ", ".join(map(str, found.ends))
        console.print(f"tokens = [{ends}]  # the model's own and those with a stop text", highlight=False, soft_wrap=True)
