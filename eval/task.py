"""Tasks: a question with a known set of valid answers, and how it is put to a model. Written as YAML files.

The built-in tasks are the files in ``tasks/`` beside this module; a user's own has the same form (`Task` lists the keys).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from decal.samplers.errors import DecalError
from decal.samplers.trie import Policy
from decal.samplers.valid_set import ValidSet

FOLDER = Path(__file__).parent / "tasks"
DEFAULT_TASKS = ("weekdays", "months", "us_states", "integers", "digits2", "digits2_sum_le")
FORMS = ("few_shot", "chat", "prefix", "completion")
Form = Literal["few_shot", "chat", "prefix", "completion"]
Family = Literal["closed list", "numeric", "formal language", "open list"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Digits(_Strict):
    """``n`` digits separated by commas; their sum equals ``sum_eq``, or is at most ``sum_le``, or is free."""

    n: int = Field(ge=1, le=60)
    sum_eq: int | None = Field(default=None, ge=0)
    sum_le: int | None = Field(default=None, ge=0)


class Dyck(_Strict):
    """Balanced strings of ``pairs`` pairs of round brackets."""

    pairs: int = Field(ge=1, le=500)


class Grammar(_Strict):
    """The texts of at most ``max_length`` characters that ``rules`` in Lark's notation derive."""

    rules: StrictStr
    max_length: int = Field(ge=1, le=1000)


class Answers(_Strict):
    """Exactly one of: a ``list``, a ``file`` with one answer per line, and the kinds of sets that `ValidSet` has."""

    list_: list[StrictStr] | None = Field(default=None, alias="list")
    file: StrictStr | None = None
    regex: StrictStr | None = None
    json_schema: dict[str, Any] | None = None
    grammar: Grammar | None = None
    digits: Digits | None = None
    dyck: Dyck | None = None

    @model_validator(mode="after")
    def _one(self) -> Answers:
        kinds = (self.list_, self.file, self.regex, self.json_schema, self.grammar, self.digits, self.dyck)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of list, file, regex, json_schema, grammar, digits and dyck")
        return self


class Phrasing(_Strict):
    """A way to ask: ``prompt`` and ``label``, as in `Task`."""

    prompt: StrictStr | None = None
    label: StrictStr | None = None

    def spaced(self, form: str) -> bool:
        """Whether what stands right before the answer ends in a space or line break."""
        return ((self.label if form in ("few_shot", "prefix") else self.prompt) or "").endswith((" ", "\n"))


NEEDED = {"few_shot": ("label",), "chat": ("prompt",), "prefix": ("prompt", "label"), "completion": ("prompt",)}
"""Texts that each form puts."""


class Task(_Strict):
    """One task.

    Attributes:
        name: what results are filed under.
        prompt: the request, as one would put it to a chat model or a person.
        label: what stands right before an answer, such as ``Random US state:``.
        answers: the valid set.
        form: how the request is put: ``few_shot``, lines of ``label answer`` with drawn exemplars, then ``label``; ``chat``,
            the model's chat template around ``prompt``; ``prefix``, the same with ``label`` already written as the start of
            the reply; ``completion``, ``prompt`` as plain text.
        phrasings: other ways to ask for the same. Few-shot prompts take turns; other forms put each once.
        family: what kind of set the answers are: a ``closed list``, complete by definition; ``numeric``, numbers under a
            condition; a ``formal language``; or an ``open list``, long, and often a stated part of what one might accept.
        shots: exemplars of a few-shot prompt.
        draws: how many few-shot prompts to average over, each with other exemplars.
        tokenisation, case: see `Policy`.
        leading_space: whether a space stands before an answer; by default where the prompt's last line asks for one.
        ends: see `Policy`; by default a line break or the model's end token, in a chat only the latter.
    """

    name: StrictStr = Field(min_length=1, max_length=100, pattern=r"^[\w.-]+$")
    answers: Answers
    prompt: StrictStr | None = None
    label: StrictStr | None = None
    phrasings: list[Phrasing] = []
    family: Family | None = None
    form: Form = "few_shot"
    shots: int = Field(default=4, ge=1, le=64)
    draws: int = Field(default=5, ge=1, le=1000)
    tokenisation: Literal["canonical", "all"] = "canonical"
    leading_space: bool | None = None
    case: Literal["exact", "any"] = "exact"
    ends: list[Annotated[StrictStr, Field(min_length=1)]] | None = None

    @model_validator(mode="after")
    def _has_its_texts(self) -> Task:
        for number, way in enumerate(self.ways):
            for text in NEEDED[self.form]:
                if not getattr(way, text):
                    of = f"phrasing {number} needs a {text}, as " if number else ""
                    raise ValueError(f"{of}form {self.form} needs a {text}")
        if len({way.spaced(self.form) for way in self.ways}) > 1:
            raise ValueError("either all phrasings end in a space or line break, or none")
        return self

    @property
    def ways(self) -> list[Phrasing]:
        """All phrasings, that of the task itself first."""
        return [Phrasing(prompt=self.prompt, label=self.label), *self.phrasings]


BLANK = "Random answer:"
"""A prompt that asks for nothing in particular."""


@dataclass(frozen=True)
class Question:
    """A task ready to be put to models.

    Attributes:
        task: as declared.
        valid: its valid set.
    """

    task: Task
    valid: ValidSet

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The valid answers as text, in the order results number them."""
        return tuple(self.valid)

    @property
    def digest(self) -> str:
        """What tells a task from others of the same name: of how it is declared, and of its answers."""
        return hashlib.sha256("\0".join([self.task.model_dump_json(), *self.answers]).encode()).hexdigest()[:32]

    @property
    def policy(self) -> Policy:
        """What counts as writing an answer."""
        chat = self.task.form == "chat"
        space = self.task.leading_space
        if space is None:
            space = not chat and not self.task.ways[0].spaced(self.task.form)
        ends = self.task.ends if self.task.ends is not None else (["<eos>"] if chat else ["\n", "<eos>"])
        return Policy(self.task.tokenisation, space, self.task.case, tuple(ends))

    def prompts(self, tokenizer: Any, seed: int) -> Iterator[tuple[str, list[int]]]:
        """The prompts to average over, as text and token ids: one for each phrasing, or for each draw of exemplars.

        Raises:
            DecalError: the form needs a chat template that the model doesn't have, or more exemplars than there are answers.
        """
        ways = self.task.ways
        if self.task.form == "few_shot":
            for draw in range(self.task.draws):
                text = self._few_shot(ways[draw % len(ways)], np.random.default_rng([seed, draw]))
                yield text, tokenizer(text)["input_ids"]
            return
        for way in ways:
            if self.task.form == "completion":
                assert way.prompt is not None
                yield way.prompt, tokenizer(way.prompt)["input_ids"]
            else:
                text = self._chat(way, tokenizer) + (way.label or "" if self.task.form == "prefix" else "")
                yield text, tokenizer(text, add_special_tokens=False)["input_ids"]

    def other_prompts(self, number: int, tokenizer: Any, seed: int) -> dict[str, list[list[int]]]:
        """For prompt ``number`` of `prompts`: ``others``, all the others, which differ in wording, exemplars or both, and
        ``blank``.

        Raises:
            DecalError: the task has one prompt only.
        """
        every = [ids for _, ids in self.prompts(tokenizer, seed)]
        if len(every) < 2:
            raise DecalError(
                f"{self.task.name}: has one prompt only, so there are no others to read; give it phrasings or draws"
            )
        return {"others": every[:number] + every[number + 1 :], "blank": [tokenizer(BLANK)["input_ids"]]}

    def _few_shot(self, way: Phrasing, rng: np.random.Generator) -> str:
        shots = self.task.shots
        if shots > self.valid.size:
            raise DecalError(f"{self.task.name}: {shots} exemplars can't be drawn from {self.valid.size} answers")
        space = " " if self.policy.leading_space else ""
        chosen = rng.choice(self.valid.size, size=shots, replace=False).tolist()
        return "".join(f"{way.label}{space}{self.valid.at(i)}\n" for i in chosen) + f"{way.label}"

    def _chat(self, way: Phrasing, tokenizer: Any) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise DecalError(
                f"{self.task.name}: form {self.task.form} needs a chat template, which this model lacks; use few_shot"
            )
        messages = [{"role": "user", "content": way.prompt}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return text


def builtin_names() -> list[str]:
    """Names of the built-in tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, **overrides: Any) -> Question:
    """A built-in task by name, or the task in a YAML file.

    Args:
        overrides: keys of `Task` to replace, such as ``form="chat"``; None leaves a key alone.

    Raises:
        DecalError: no such task, or the file isn't one; the message names file, line and key.
    """
    path = Path(name)
    if name in builtin_names():
        path = FOLDER / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name, builtin_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "decal tasks lists the built-in ones."
        raise DecalError(f"unknown task {name!r}; {hint} A file of your own ends in .yaml")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DecalError(f"can't read the task file {name}: {getattr(error, 'strerror', None) or error}") from None
    content, lines = _parse(text, name)
    content |= {k: v for k, v in overrides.items() if v is not None}
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        raise DecalError(_first_error(error, name, lines)) from None
    valid = _valid_set(task, path, f"{name}:{lines.get(('answers',), 1)}: answers")
    return Question(task, valid)


def _valid_set(task: Task, path: Path, where: str) -> ValidSet:
    answers = task.answers
    if answers.list_ is not None:
        return ValidSet.from_list(answers.list_, where)
    if answers.regex is not None:
        return ValidSet.from_regex(answers.regex, where)
    if answers.json_schema is not None:
        return ValidSet.from_json_schema(answers.json_schema, source=f"{where}.json_schema")
    if answers.grammar is not None:
        return ValidSet.from_grammar(answers.grammar.rules, max_length=answers.grammar.max_length, source=f"{where}.grammar")
    if answers.digits is not None:
        return ValidSet.digits(**answers.digits.model_dump(), source=where)
    if answers.dyck is not None:
        return ValidSet.dyck(answers.dyck.pairs, source=where)
    assert answers.file is not None
    file = path.parent / answers.file
    try:
        listed = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DecalError(f"{where}.file: can't read {file}: {getattr(error, 'strerror', None) or error}") from None
    return ValidSet.from_list(listed, str(file))


Location = tuple[str | int, ...]
DEEPEST = 8


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """The mapping in a YAML text, and the line of each of its keys."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Location, int] = {}
        if root is not None:
            _locate(root, (), lines, name)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DecalError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or 'can not be read'}") from None
    if not isinstance(content, dict):
        raise DecalError(f"{name}:1: a task file holds keys and values (name, prompt, label, answers, ...)")
    return content, lines


def _locate(node: yaml.Node, at: Location, lines: dict[Location, int], name: str) -> None:
    lines[at] = node.start_mark.line + 1
    if len(at) > DEEPEST:
        raise DecalError(f"{name}:{node.start_mark.line + 1}: nested too deep for a task")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise DecalError(f"{name}:{key.start_mark.line + 1}: a key must be a word")
            place = (*at, key.value)
            if place in lines:
                raise DecalError(f"{name}:{key.start_mark.line + 1}: {'.'.join(map(str, place))} is given twice")
            _locate(value, place, lines, name)
            lines[place] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _locate(value, (*at, number), lines, name)


def _first_error(error: ValidationError, name: str, lines: dict[Location, int]) -> str:
    first = error.errors()[0]
    place: Location = tuple(first["loc"])
    known = place
    while known and known not in lines:
        known = known[:-1]
    key = ".".join(map(str, place)) or "task"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        owners: dict[Location, type[BaseModel]] = {
            (): Task,
            ("answers",): Answers,
            ("answers", "digits"): Digits,
            ("answers", "dyck"): Dyck,
        }
        owner = Phrasing if place[0] == "phrasings" else owners[place[:-1]]
        allowed = ", ".join(f.alias or n for n, f in owner.model_fields.items())
        return f"{name}:{lines.get(known, 1)}: unknown key {key!r} (allowed: {allowed})"
    got = f", got {first['input']!r}" if first["type"] not in ("missing", "value_error") else ""
    return f"{name}:{lines.get(known, 1)}: {key}: {message}{got}"
