"""Task files: the built-in ones, how questions are put, and what a bad file is told."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny

from decal import DecalError
from decal.eval import task
from decal.eval.valid_set import ValidSet

SIZES = {"weekdays": 7, "months": 12, "us_states": 50, "integers": 100, "digits2": 100, "digits3": 1000, "digits4": 10_000}
SUMS = {"2": 9, "3": 13, "4": 18}
BPE = tiny.byte_level
LABELLED = 'name: t\nlabel: "Word:"\n'


@pytest.mark.parametrize("name", task.builtin_names())
def test_built_in_tasks(name: str) -> None:
    question = task.load(name)
    if "sum" in name:
        n, most = int(name[6]), SUMS[name[6]]
        wanted = (lambda s: s == most) if name.endswith("eq") else (lambda s: s <= most)
        expected = {",".join(map(str, d)) for d in itertools.product(range(10), repeat=n) if wanted(sum(d))}
        assert set(question.answers) == expected
        assert f" {most}" in question.task.prompt
    else:
        assert question.valid.size == SIZES[name]
    assert question.task.name == name
    assert len(question.answers) == question.valid.size == len(set(question.answers))
    assert all(answer in question.valid for answer in question.answers)


def test_the_default_tasks_are_built_in() -> None:
    assert set(task.DEFAULT_TASKS) <= set(task.builtin_names())
    assert set(SIZES) | {f"digits{n}_sum_{how}" for n in SUMS for how in ("eq", "le")} == set(task.builtin_names())


@pytest.mark.parametrize("name", task.builtin_names())
@pytest.mark.parametrize("form", task.FORMS)
def test_every_form_of_every_built_in_task_can_be_put(name: str, form: str) -> None:
    question = task.load(name, form=form, draws=2)
    tokenizer = BPE(template=tiny.TEMPLATE)
    prompts = list(question.prompts(tokenizer, seed=0))
    assert len(prompts) == (2 if form == "few_shot" else 1)
    for text, ids in prompts:
        assert tokenizer.decode(ids) == text
        body, label = question.task.prompt, question.task.label
        if form == "completion":
            assert text == body
        elif form == "chat":
            assert text == f"[user]{body}\n[reply]"
        elif form == "prefix":
            assert text == f"[user]{body}\n[reply]{label}"
        else:
            assert text.endswith(f"\n{label}")


@pytest.mark.parametrize("form", ["chat", "prefix"])
def test_forms_that_need_a_chat_template(form: str) -> None:
    question = task.load("weekdays", form=form)
    with pytest.raises(DecalError, match=f"weekdays: form {form} needs a chat template, which this model lacks; use few_shot"):
        list(question.prompts(BPE(), 0))


def test_a_thinking_model_is_told_not_to() -> None:
    template = tiny.TEMPLATE + "{% if not enable_thinking %}<think></think>{% endif %}"
    ((text, _),) = task.load("weekdays", form="chat").prompts(BPE(template=template), 0)
    assert text.endswith("[reply]<think></think>")


def test_special_tokens_are_added_where_the_text_has_none() -> None:
    """A start token comes from the tokenizer, or from the chat template, and never from both."""
    tokenizer = BPE(template="<|end|>" + tiny.TEMPLATE)
    tokenizer.bos_token = tiny.EOS
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{tiny.EOS} $A", special_tokens=[(tiny.EOS, 0)])
    for form in task.FORMS:
        for _, ids in task.load("weekdays", form=form, draws=1).prompts(tokenizer, 0):
            assert ids.count(0) == 1, form
            assert ids[0] == 0


def shots_of(text: str, label: str) -> list[str]:
    *lines, last = text.split("\n")
    assert last == label
    assert all(line.startswith(label + " ") for line in lines)
    return [line.removeprefix(label + " ") for line in lines]


@pytest.mark.parametrize("name", ["weekdays", "us_states", "digits2_sum_le"])
def test_exemplars(name: str) -> None:
    question, tokenizer = task.load(name, draws=10), BPE()
    label = question.task.label
    prompts = [text for text, _ in question.prompts(tokenizer, 3)]
    assert len(prompts) == 10
    for text in prompts:
        shots = shots_of(text, label)
        assert len(set(shots)) == len(shots) == 4
        assert set(shots) <= set(question.answers)
    assert len(set(prompts)) > 8, "draws differ"
    assert [text for text, _ in question.prompts(tokenizer, 3)] == prompts
    assert [text for text, _ in task.load(name, draws=5).prompts(tokenizer, 3)] == prompts[:5], "a draw doesn't hang on others"
    assert [text for text, _ in question.prompts(tokenizer, 4)] != prompts


def policy_of(text: str, tmp_path: Path, **overrides: Any) -> task.Policy:
    return load(text, tmp_path, **overrides).policy


def load(text: str, tmp_path: Path, **overrides: Any) -> task.Question:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    return task.load(str(file), **overrides)


def test_what_counts_as_an_answer_by_default(tmp_path: Path) -> None:
    text = LABELLED + "prompt: Say a word.\nanswers: {list: [one, two, six]}\n"
    for form in ("few_shot", "prefix", "completion"):
        policy = policy_of(text, tmp_path, form=form)
        assert policy == task.Policy(leading_space=True)
        assert policy.ends == ("\n", "<eos>")
    assert policy_of(text, tmp_path, form="chat") == task.Policy(ends=("<eos>",))
    for ending in (" ", "\\n"):
        assert not policy_of(text.replace("Word:", f"Word:{ending}"), tmp_path, form="prefix").leading_space
    own = text + 'leading_space: false\ncase: any\ntokenisation: all\nends: ["."]\n'
    assert policy_of(own, tmp_path) == task.Policy("all", False, "any", (".",))


def test_exemplars_without_a_space(tmp_path: Path) -> None:
    question = load('name: t\nlabel: "Word: "\nshots: 2\ndraws: 1\nanswers: {list: [one, two]}\n', tmp_path)
    ((text, _),) = question.prompts(BPE(), 0)
    assert sorted(text.split("\n")) == ["Word: ", "Word: one", "Word: two"]


def test_answers_from_a_file_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("zwölf\n\n  eins  \nzwei\n", encoding="utf-8")
    assert sorted(load(LABELLED + "answers: {file: words.txt}", tmp_path).answers) == ["eins", "zwei", "zwölf"]


def test_overrides(tmp_path: Path) -> None:
    question = load(LABELLED + "draws: 3\nanswers: {list: [a, b, c, d]}", tmp_path, form=None, draws=7)
    assert question.task.draws == 7
    assert question.task.form == "few_shot"


GOOD = LABELLED + "answers: {list: [one, two, three, four]}\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD + "shot: 3\n", 4, "unknown key 'shot' (allowed: name, answers, prompt, label, form, "),
        (LABELLED + "answers:\n  lists: [a]\n", 4, "unknown key 'answers.lists' (allowed: list, file, regex, digits)"),
        (
            LABELLED + "answers:\n  digits:\n    n: 2\n    m: 3\n",
            6,
            "unknown key 'answers.digits.m' (allowed: n, sum_eq",
        ),
        ("name: t\nanswers: {list: [a]}\n", 1, "task: form few_shot needs a label"),
        ("name: t\nform: chat\nlabel: x\nanswers: {list: [a]}\n", 1, "task: form chat needs a prompt"),
        ("label: x\nanswers: {list: [a]}\n", 1, "name: Field required"),
        ("name: t\nlabel: x\n", 1, "answers: Field required"),
        (GOOD + "shots: many\n", 4, "shots: Input should be a valid integer"),
        (GOOD + "\nshots: 0\n", 5, "shots: Input should be greater than or equal to 1, got 0"),
        (GOOD + "draws: 0\n", 4, "draws: Input should be greater than or equal to 1, got 0"),
        (GOOD + "form: poem\n", 4, "form: Input should be 'few_shot', 'chat', 'prefix' or 'completion', got 'poem'"),
        (GOOD + "case: upper\n", 4, "case: Input should be 'exact' or 'any', got 'upper'"),
        (GOOD + "ends: x\n", 4, "ends: Input should be a valid list, got 'x'"),
        ("name: a b\nlabel: x\nanswers: {list: [a]}\n", 1, "name: String should match pattern"),
        ("name: 3\nlabel: x\nanswers: {list: [a]}\n", 1, "name: Input should be a valid string, got 3"),
        (LABELLED + "answers:\n  list: [a]\n  regex: b\n", 3, "answers: give exactly one of list, file, regex and digits"),
        (LABELLED + "answers: {}\n", 3, "answers: give exactly one of list, file, regex and digits"),
        (LABELLED + "answers: [a, b]\n", 3, "answers: Input should be a valid dictionary"),
        (LABELLED + "answers:\n  list:\n    - Yes\n", 5, "answers.list.0: Input should be a valid string, got True"),
        (LABELLED + "answers:\n  list:\n    - a\n    - No\n", 6, "answers.list.1: Input should be a valid string, got False"),
        (LABELLED + "answers:\n  list: [a, 3]\n", 4, "answers.list.1: Input should be a valid string, got 3"),
        (LABELLED + "answers:\n  list: []\n", 3, "answers: the valid set is empty"),
        (LABELLED + "answers:\n  list: [a, b, a]\n", 3, "answers: 'a' is given twice, as answers 1 and 3"),
        (LABELLED + "answers:\n  regex: '('\n", 3, "answers: can't read the regular expression '('"),
        (LABELLED + "answers:\n  regex: 'a+'\n", 3, "answers: the valid set is infinite"),
        (LABELLED + "answers:\n  regex: 'a.'\n", 3, "answers: 'a.' accepts every character somewhere"),
        (LABELLED + "answers:\n  digits: {n: 2, sum_eq: 3, sum_le: 4}\n", 3, "answers: digits needs n >= 1 and at most one of"),
        (LABELLED + "answers:\n  digits: {n: 0}\n", 4, "answers.digits.n: Input should be greater than or equal to 1, got 0"),
        (LABELLED + "answers:\n  digits: {n: 2, sum_eq: 99}\n", 3, "answers: the valid set is empty"),
        ("name: t\nlabel: x\nname: u\n", 3, "name is given twice"),
        (LABELLED + "answers:\n  list: [a]\n  list: [b]\n", 5, "answers.list is given twice"),
        ("name: t\nlabel: 'x\nanswers: 3\n", 4, "not YAML"),
        ("name: t\n\tlabel: x\n", 2, "not YAML"),
        ("name: [a\n", 2, "not YAML"),
        ("- a\n- b\n", 1, "a task file holds keys and values"),
        ("just text", 1, "a task file holds keys and values"),
        ("", 1, "a task file holds keys and values"),
        ("? [a, b]\n: 1\n", 1, ""),
        ("name: t\nlabel: &a [*a]\n", 2, ""),
    ],
)
def test_errors_name_file_line_and_key(text: str, line: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(DecalError) as caught:
        load(text, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 't.yaml'}:{line}: {message}")
    assert "\n" not in str(caught.value)


def test_a_bad_override_is_told_like_a_bad_file() -> None:
    with pytest.raises(DecalError, match=r"^weekdays:1: draws: Input should be greater than or equal to 1, got 0$"):
        task.load("weekdays", draws=0)
    with pytest.raises(DecalError, match=r"form: Input should be .*, got 'poem'$"):
        task.load("weekdays", form="poem")


def test_a_missing_file_of_answers(tmp_path: Path) -> None:
    with pytest.raises(DecalError, match=r"t\.yaml:3: answers\.file: can't read .*words\.txt: No such file"):
        load(LABELLED + "answers: {file: words.txt}\n", tmp_path)
    (tmp_path / "words.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DecalError, match=r"t\.yaml:3: answers\.file: can't read"):
        load(LABELLED + "answers: {file: words.txt}\n", tmp_path)


def test_a_file_of_answers_that_repeats_itself(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a\nb\na \n")
    with pytest.raises(DecalError, match=r"words\.txt: 'a' is given twice, as answers 1 and 3"):
        load(LABELLED + "answers: {file: words.txt}\n", tmp_path)


def test_more_exemplars_than_answers(tmp_path: Path) -> None:
    question = load(LABELLED + "shots: 3\nanswers: {list: [a, b]}\n", tmp_path)
    with pytest.raises(DecalError, match="t: 3 exemplars can't be drawn from 2 answers"):
        next(iter(question.prompts(BPE(), 0)))


def test_a_set_too_large_to_list_is_never_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(valid: ValidSet) -> None:
        pytest.fail(f"{valid!r} was listed")

    monkeypatch.setattr(ValidSet, "__iter__", fail)
    with pytest.raises(DecalError, match=f"{10**40} answers"):
        tiny.compile_trie(BPE(), load(LABELLED + "answers: {digits: {n: 40}}\n", tmp_path).valid)


def test_unknown_tasks(tmp_path: Path) -> None:
    with pytest.raises(DecalError, match=r"unknown task 'weekday'; built in are .*weekdays; or give a \.yaml file"):
        task.load("weekday")
    with pytest.raises(DecalError, match=r"can't read the task file .*missing\.yaml: No such file or directory"):
        task.load(str(tmp_path / "missing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DecalError, match="can't read the task file"):
        task.load(str(tmp_path / "binary.yaml"))
