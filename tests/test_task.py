"""Task files: the built-in ones, how questions are put, and what a bad file is told."""

from __future__ import annotations

import calendar
import datetime
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny

from decal import DecalError
from decal.eval import task
from decal.samplers.valid_set import ValidSet

SUMS = {2: 9, 3: 13, 4: 18}
BPE = tiny.byte_level
BYTES = BPE(template=tiny.TEMPLATE)
LABELLED = 'name: t\nlabel: "Word:"\n'


def spelt(alphabet: str, length: int) -> Iterable[str]:
    """All strings of that length."""
    return map("".join, itertools.product(alphabet, repeat=length))


def digits(n: int, wanted: Callable[[int], bool] = lambda total: True) -> set[str]:
    """``n`` digits with commas whose sum is wanted."""
    return {",".join(map(str, d)) for d in itertools.product(range(10), repeat=n) if wanted(sum(d))}


def unicode_names(first: str, last: str) -> list[str]:
    return [unicodedata.name(chr(code)) for code in range(ord(first), ord(last) + 1)]


def primes_below(limit: int) -> set[int]:
    """Sieve of Eratosthenes."""
    left = set(range(2, limit))
    for n in range(2, limit):
        left -= set(range(2 * n, limit, n))
    return left


def basic_colours() -> set[str]:
    """CSS names of the colours with all channels off, half or on, and of silver; of two names, the one in CSS Level 1."""
    from matplotlib.colors import CSS4_COLORS

    codes = {"".join(c) for level in ("80", "FF") for c in itertools.product(("00", level), repeat=3)} | {"C0C0C0"}
    return {name for name, code in CSS4_COLORS.items() if code[1:] in codes} - {"cyan", "magenta", "grey"}


def texts(numbers: Iterable[int]) -> set[str]:
    return set(map(str, numbers))


COMPUTED: dict[str, Callable[[], Iterable[str]]] = {
    "weekdays": lambda: calendar.day_name,
    "months": lambda: list(calendar.month_name)[1:],
    # Unicode follows other traditions in two names.
    "zodiac_signs": lambda: [n.capitalize().replace("Scorpius", "Scorpio") for n in unicode_names("♈", "♓")],
    "greek_letters": lambda: {
        n.split()[-1].lower().replace("lamda", "lambda") for n in unicode_names("α", "ω") if "FINAL" not in n
    },
    "chess_pieces": lambda: [n.split()[-1].lower() for n in unicode_names("♔", "♙")],
    "css_colours": basic_colours,
    "integers": lambda: texts(range(1, 101)),
    "primes": lambda: texts(primes_below(100)),
    "squares": lambda: texts(n for n in range(1, 1001) if round(n**0.5) ** 2 == n),
    "even_numbers": lambda: texts(n for n in range(1, 101) if not n & 1),
    "multiples_of_7": lambda: texts(n for n in range(1, 200) if n % 7 == 0),
    "sums_to_10": lambda: {f"{a}+{b}" for a in range(11) for b in range(11) if a + b == 10},
    "dates_2024": lambda: {
        day.isoformat()
        for n in range(400)
        if (day := datetime.date(2024, 1, 1) + datetime.timedelta(days=n)) < datetime.date(2025, 1, 1)
    },
    "clock_times": lambda: {f"{datetime.time(n // 60, n % 60):%H:%M}" for n in range(24 * 60)},
    "hex_bytes": lambda: {bytes([n]).hex() for n in range(256)},
    "binary_no_11": lambda: {text for text in spelt("01", 8) if "11" not in text},
    "palindromes": lambda: {text for text in spelt("abc", 5) if text == text[::-1]},
    "balanced_brackets": lambda: {
        text
        for text in spelt("()", 10)
        if text.count("(") == 5 and all(text[:i].count("(") >= text[:i].count(")") for i in range(10))
    },
    "json_booleans": lambda: {json.dumps(list(v)) for n in range(4) for v in itertools.product((True, False), repeat=n)},
    **{f"digits{n}": lambda n=n: digits(n) for n in SUMS},
    **{f"digits{n}_sum_eq": lambda n=n, s=s: digits(n, lambda total: total == s) for n, s in SUMS.items()},
    **{f"digits{n}_sum_le": lambda n=n, s=s: digits(n, lambda total: total <= s) for n, s in SUMS.items()},
}
"""Tasks whose answers can be had from elsewhere, and their answers."""

LISTED = {
    "us_states": (50, r"[A-Z][a-z]+( [A-Z][a-z]+)?", "Ohio, New York, Hawaii", "Puerto Rico, District of Columbia, Guam"),
    "us_capitals": (50, r"[A-Z][a-z]+( [A-Z][a-z]+){0,2}", "Saint Paul, Salt Lake City, Albany", "New York, St. Paul, Chicago"),
    "planets": (8, r"[A-Z][a-z]+", "Mercury, Earth, Neptune", "Pluto, Sun, Moon, Ceres"),
    "nato_alphabet": (26, r"[A-Z][a-z]+|X-ray", "Alfa, Juliett, X-ray, Whiskey", "Alpha, Juliet, Xray, Whisky"),
    "chemical_symbols": (118, r"[A-Z][a-z]?", "H, N, No, Y, Og, Cn", "D, T, Uuo, J, A, Uub, Q"),
    "currency_codes": (178, r"[A-Z]{3}", "USD, EUR, XXX, SLE, XCG, ZWG", "BGN, HRK, ANG, ZWL, SLL, CUC, BTC, DEM"),
    "country_codes": (249, r"[A-Z]{3}", "USA, DEU, SSD, PSE, TWN, ATA", "XKX, EUR, SUN, ANT, YUG, GER, ENG"),
    "first_names": (1000, r"[A-Z][a-z]+", "James, Mary, Jo, Latoya", "Smith, JAMES, mary, Xerxes"),
    "five_letter_words": (
        2622,
        r"[a-rt-z]{5}",
        "zebra, crane, color, metre, eaten",
        "trees, sting, apples, April, abcde",
    ),
}
"""Tasks whose answers were checked against other lists when written down: size, form, some members and some others."""


@pytest.mark.parametrize("name", task.builtin_names())
def test_built_in_tasks(name: str) -> None:
    question = task.load(name)
    assert question.task.name == name
    assert len(question.answers) == question.valid.size == len(set(question.answers))
    if name in COMPUTED:
        assert set(question.answers) == set(COMPUTED[name]())
        return
    size, form, members, others = LISTED[name]
    assert question.valid.size == size
    assert all(re.fullmatch(form, answer) for answer in question.answers)
    assert set(members.split(", ")) <= set(question.answers)
    assert not set(others.split(", ")) & set(question.answers)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nato_alphabet", dict.fromkeys("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 1)),
        # States of the USA by their first letter.
        ("us_states", dict(zip("ACDFGHIKLMNOPRSTUVW", (4, 3, 1, 1, 1, 1, 4, 2, 1, 8, 8, 3, 1, 1, 2, 2, 1, 2, 4), strict=True))),
    ],
)
def test_first_letters(name: str, sizes: dict[str, int]) -> None:
    assert Counter(answer[0] for answer in task.load(name).answers) == sizes


def test_one_letter_symbols() -> None:
    assert {s for s in task.load("chemical_symbols").answers if len(s) == 1} == set("HBCNOFPSKVYIWU")


def test_the_default_tasks_are_built_in() -> None:
    assert set(task.DEFAULT_TASKS) <= set(task.builtin_names())
    assert len(task.builtin_names()) >= 24
    assert sorted([*COMPUTED, *LISTED]) == task.builtin_names()


def test_families() -> None:
    sizes = Counter(task.load(name).task.family for name in task.builtin_names())
    assert set(sizes) == set(get_args(task.Family))
    assert min(sizes.values()) >= 3


@pytest.mark.parametrize("name", task.builtin_names())
def test_every_built_in_task_is_asked_in_three_ways_or_more(name: str) -> None:
    question = task.load(name)
    ways = question.task.ways
    assert len(ways) >= 3
    assert len({way.prompt for way in ways}) == len({way.label for way in ways}) == len(ways)
    for way in ways:
        assert way.prompt.endswith(" Answer:"), "a completion goes on with the answer"
        assert way.label.endswith(":")
    assert question.valid.size > question.task.shots


def test_no_two_built_in_tasks_ask_the_same() -> None:
    ways = [way for name in task.builtin_names() for way in task.load(name).task.ways]
    assert len({way.prompt for way in ways}) == len({way.label for way in ways}) == len(ways)


@pytest.mark.parametrize(
    "name", [n for n in task.builtin_names() if re.search("sum_|primes|squares|_of_7|even|no_11|palin", n)]
)
def test_conditions_are_said_in_every_way(name: str) -> None:
    """What the answers fulfil stands in each prompt and label as a number or a word for it."""
    said = {
        "primes": "100",
        "squares": "1000|1 to 31",
        "even_numbers": "[Ee]ven\\b",
        "multiples_of_7": "[Ss]even|7",
        "sums_to_10": r"10\b|[Tt]en\b",
        "binary_no_11": "ones in a row|both (1|on)|11",
        "palindromes": "palindrome|backwards|[Mm]irror",
    }
    wanted = said.get(name) or rf"\b{SUMS[int(name[6])]}\b"
    for way in task.load(name).task.ways:
        assert re.search(wanted, way.prompt), way.prompt
        assert re.search(wanted, way.label), way.label


@pytest.mark.parametrize("form", ["few_shot", "chat"])
@pytest.mark.parametrize("name", task.builtin_names())
def test_built_in_answers_become_tokens(name: str, form: str) -> None:
    question = task.load(name, form=form)
    trie, _ = tiny.compile_trie(BYTES, question.valid, question.policy)
    space = "" if form == "chat" else " "
    assert trie.count[0] == trie.size == question.valid.size
    assert sorted(a for a in trie.answer if a >= 0) == list(range(trie.size))
    # With tokens of one byte, a node is a prefix.
    prefixes = {(space + answer)[:i] for answer in question.answers for i in range(len(space + answer) + 1)}
    assert len(trie) == len(prefixes)


@pytest.mark.parametrize("name", task.builtin_names())
@pytest.mark.parametrize("form", task.FORMS)
def test_every_form_of_every_built_in_task_can_be_put(name: str, form: str) -> None:
    question = task.load(name, form=form, draws=2)
    prompts = list(question.prompts(BYTES, seed=0))
    ways = question.task.ways
    assert len(prompts) == (2 if form == "few_shot" else len(ways))
    for (text, ids), way in zip(prompts, ways, strict=form != "few_shot"):
        assert BYTES.decode(ids) == text
        body, label = way.prompt, way.label
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
    prompts = list(task.load("weekdays", form="chat").prompts(BPE(template=template), 0))
    assert len(prompts) == 3
    assert all(text.endswith("[reply]<think></think>") for text, _ in prompts)


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
    ways = question.task.ways
    prompts = [text for text, _ in question.prompts(tokenizer, 3)]
    assert len(prompts) == 10
    for draw, text in enumerate(prompts):
        shots = shots_of(text, ways[draw % len(ways)].label)
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
WAYS = LABELLED + "prompt: Say a word.\nanswers: {list: [one, two, three, four]}\nphrasings:\n"


def test_phrasings_of_ones_own(tmp_path: Path) -> None:
    text = WAYS + '  - {label: "Noun:"}\n  - {label: "Term:", prompt: Say a term.}\n'
    question = load(text, tmp_path, draws=4)
    labels = [prompt.split("\n")[-1] for prompt, _ in question.prompts(BPE(), 0)]
    assert labels == ["Word:", "Noun:", "Term:", "Word:"]
    with pytest.raises(DecalError, match=r"phrasing 1 needs a prompt, as form completion needs a prompt$"):
        load(text, tmp_path, form="completion")


def test_json_schemas_and_grammars_as_answers(tmp_path: Path) -> None:
    schema = "answers:\n  json_schema:\n    properties: {a: {type: boolean}}\n    required: [a]\n"
    assert load(LABELLED + schema, tmp_path).answers == ('{"a": false}', '{"a": true}')
    grammar = 'answers:\n  grammar:\n    max_length: 4\n    rules: |\n      start: pair+\n      pair: "(" start? ")"\n'
    assert sorted(load(LABELLED + grammar, tmp_path).answers) == ["(())", "()", "()()"]


def test_balanced_brackets_as_answers(tmp_path: Path) -> None:
    question = load(LABELLED + "answers: {dyck: {pairs: 3}}\n", tmp_path)
    assert sorted(question.answers) == ["((()))", "(()())", "(())()", "()(())", "()()()"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD + "shot: 3\n", 4, "unknown key 'shot' (allowed: name, answers, prompt, label, phrasings, family, form, "),
        (
            LABELLED + "answers:\n  lists: [a]\n",
            4,
            "unknown key 'answers.lists' (allowed: list, file, regex, json_schema, grammar, digits, dyck)",
        ),
        (
            LABELLED + "answers:\n  digits:\n    n: 2\n    m: 3\n",
            6,
            "unknown key 'answers.digits.m' (allowed: n, sum_eq",
        ),
        (LABELLED + "answers:\n  dyck:\n    pairs: 2\n    n: 2\n", 6, "unknown key 'answers.dyck.n' (allowed: pairs)"),
        (LABELLED + "answers:\n  dyck: {}\n", 4, "answers.dyck.pairs: Field required"),
        (
            LABELLED + "answers:\n  dyck: {pairs: 0}\n",
            4,
            "answers.dyck.pairs: Input should be greater than or equal to 1, got 0",
        ),
        (
            LABELLED + "answers:\n  dyck: {pairs: 501}\n",
            4,
            "answers.dyck.pairs: Input should be less than or equal to 500, got",
        ),
        (
            GOOD + "family: nouns\n",
            4,
            "family: Input should be 'closed list', 'numeric', 'formal language' or 'open list', got",
        ),
        (WAYS + "  - {label: 'Noun:'}\n  - prompt: x\n", 1, "task: phrasing 2 needs a label, as form few_shot needs a label"),
        (WAYS + "  - {label: 'Noun: '}\n", 1, "task: either all phrasings end in a space or line break, or none"),
        (WAYS + "  - label: 'Noun:'\n    shots: 2\n", 7, "unknown key 'phrasings.0.shots' (allowed: prompt, label)"),
        (WAYS + "  - 3\n", 6, "phrasings.0: Input should be a valid dictionary"),
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
        (
            LABELLED + "answers:\n  list: [a]\n  regex: b\n",
            3,
            "answers: give exactly one of list, file, regex, json_schema, grammar, digits and dyck",
        ),
        (
            LABELLED + "answers: {}\n",
            3,
            "answers: give exactly one of list, file, regex, json_schema, grammar, digits and dyck",
        ),
        (LABELLED + "answers: [a, b]\n", 3, "answers: Input should be a valid dictionary"),
        (LABELLED + "answers:\n  list:\n    - Yes\n", 5, "answers.list.0: Input should be a valid string, got True"),
        (LABELLED + "answers:\n  list:\n    - a\n    - No\n", 6, "answers.list.1: Input should be a valid string, got False"),
        (LABELLED + "answers:\n  list: [a, 3]\n", 4, "answers.list.1: Input should be a valid string, got 3"),
        (LABELLED + "answers:\n  list: []\n", 3, "answers: the valid set is empty"),
        (LABELLED + "answers:\n  list: [a, b, a]\n", 3, "answers: 'a' is given twice, as answers 1 and 3"),
        (LABELLED + "answers:\n  regex: '('\n", 3, "answers: can't read the regular expression '('"),
        (LABELLED + "answers:\n  regex: 'a+'\n", 3, "answers: the valid set is infinite"),
        (LABELLED + "answers:\n  json_schema: {type: number}\n", 3, "answers.json_schema: the schema: numbers have no end"),
        (LABELLED + "answers:\n  json_schema: text\n", 4, "answers.json_schema: Input should be a valid dictionary"),
        (LABELLED + "answers:\n  grammar: {rules: 'start: (', max_length: 3}\n", 3, "answers.grammar: can't read the grammar"),
        (
            LABELLED + "answers:\n  grammar: {rules: 'start: (', max_length: 0}\n",
            4,
            "answers.grammar.max_length: Input should be",
        ),
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
    with pytest.raises(DecalError, match=r"unknown task 'weekday'; did you mean weekdays\? A file of your own ends in \.yaml"):
        task.load("weekday")
    with pytest.raises(DecalError, match=r"can't read the task file .*missing\.yaml: No such file or directory"):
        task.load(str(tmp_path / "missing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DecalError, match="can't read the task file"):
        task.load(str(tmp_path / "binary.yaml"))
