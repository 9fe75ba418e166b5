"""Texts that a schema leaves to the model: its own law among the tokens that keep the form, and uniform around them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import tiny
import torch
from pydantic import BaseModel, Field
from scipy.stats import chisquare
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import decal
from decal import DecalError, ValidSet, guided
from decal.samplers.free_text import FreeText
from decal.samplers.guided import Guide
from decal.samplers.valid_set import automaton_of
from decal.samplers.vocabulary import token_bytes

TEXTS = [
    '{"a": "red.", "b": true}',
    '{"a": "blue"}',
    '{"a": "x", "b": false}',
    '"red."}',
    "12.5, 100}",
    "été 漢字",
    '": "',
    "null",
]
TOKENIZER = tiny.byte_level(TEXTS * 3, merges=70)
INNER = r'(?:[^"\\\x00-\x1f]|\\["\\bfnrt])'
STRING: dict[str, Any] = {"type": "string"}
FORM = regex.compile(f"{INNER}*")
OPTIONAL = {"properties": {"a": STRING, "b": {"type": "boolean"}}, "required": ["a"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "string": STRING,
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "at least": {"type": "string", "minLength": 3},
    "number": {"type": "number"},
    "integer": {"type": "integer"},
    "natural": {"type": "integer", "minimum": 0},
    "positive": {"type": "integer", "exclusiveMinimum": 0},
    "from eighteen": {"type": "integer", "minimum": 18},
    "from minus seven": {"type": "integer", "exclusiveMinimum": -8},
    "up to twelve": {"type": "integer", "maximum": 12},
    "up to minus two": {"type": "integer", "maximum": -2},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z ]+$"},
    "many texts of a pattern": {"type": "string", "pattern": "^[A-Za-z]{1,9}$"},
    "pattern and length": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 5},
    "no x": {"type": "string", "pattern": "^[^x]+$"},
    "no spaces": {"type": "string", "pattern": r"^\S+$"},
    "words": {"type": "string", "pattern": r"^[^\s]+\s\w*$"},
    "no letters": {"type": "string", "pattern": r"^\W+$"},
    "no digits": {"type": "string", "pattern": r"^\D+$"},
    "any character": {"type": "string", "pattern": "^-.{2}$"},
    "no Latin beyond ASCII": {"type": "string", "pattern": "^[^À-ÿ]+$"},
    "no Cyrillic": {"type": "string", "pattern": "^[^\u0400-\u04ff]*$"},
    "nothing from U+0080": {"type": "string", "pattern": "^[^\u0080-\uffff]*$"},
    "nothing below U+10000": {"type": "string", "pattern": "^\\.[\U00010000-\U0001ffff]*$"},
    "no Han, and a limit": {"type": "string", "pattern": "^[^一-龥]+$", "maxLength": 3},
    "optional member": OPTIONAL,
    "string or null": {"properties": {"a": {"anyOf": [STRING, {"type": "null"}]}}, "required": ["a"]},
    "number or null": {"properties": {"a": {"type": ["number", "null"]}, "b": STRING}, "required": ["a", "b"]},
    "array": {"type": "array", "items": STRING, "minItems": 1, "maxItems": 3},
    "numbers": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
    "two of one kind": {"properties": {"a": STRING, "b": STRING, "c": {"enum": ["x", "y"]}}, "required": ["a", "b", "c"]},
}  # fmt: skip


def following(schema: dict[str, Any]) -> ValidSet:
    return ValidSet.from_json_schema(schema, free=True)


def written(
    chain: decal.Chain, count: int, tokenizer: PreTrainedTokenizerFast = TOKENIZER, spread: float = 0.6, **kwargs: Any
) -> list[str]:
    """Texts that a random model writes."""
    model = tiny.llama(len(tokenizer), dtype=torch.float32, spread=spread)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompt = torch.tensor([tokenizer.encode("red ")]).expand(count, -1)
    torch.manual_seed(1)
    kwargs = chain.generate_kwargs(pad_token_id=tokenizer.eos_token_id, **kwargs)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in out[:, prompt.shape[1] :]]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_what_is_written_is_valid_whatever_the_model(name: str, kind: str) -> None:
    """A random model, which would go on for ever; the limit on tokens ends its texts."""
    tokenizer = TOKENIZER if kind == "byte-level" else tiny.sentencepiece(['{}[]":,.-+eE0123456789 abcdefnulrtsxyXYZ'])
    valid = following(SCHEMAS[name])
    checked = jsonschema.Draft202012Validator(SCHEMAS[name])
    for free_tokens in (6, 20):
        for strength in (0.4, 1.0):
            texts = written(guided(strength).for_answers(valid, tokenizer, free_tokens=free_tokens), 16, tokenizer)
            for text in texts:
                assert checked.is_valid(json.loads(text)), text
                assert text in valid
        assert len(set(texts)) >= 2


@pytest.mark.parametrize("name", SCHEMAS)
def test_membership(name: str) -> None:
    """Against jsonschema, on texts that are valid, and those that slips make of them."""
    valid, chance = following(SCHEMAS[name]), random.Random(0)
    checked = jsonschema.Draft202012Validator(SCHEMAS[name])
    texts = written(guided(1).for_answers(valid, TOKENIZER, free_tokens=6), 30)
    texts += [*valid, *(valid.at(number) for number in range(valid.size))]
    assert all(text in valid for text in texts)
    slips = 0
    for text in texts:
        for _ in range(20):
            place = chance.randrange(len(text) + 1)
            slip = text[:place] + chance.choice(["", *'"\\, 0a.-}é\n', "\ue001"]) + text[place + chance.randrange(2) :]
            if slip in valid:
                assert checked.is_valid(json.loads(slip)), slip
            elif (
                not ("pattern" in SCHEMAS[name] and "\\" in SCHEMAS[name]["pattern"] + slip)  # written without escapes
                and slip == _plain(slip)
                and not re.search(r'-0|\\[/u]|0[eE]|\s"|"\s:|\.0$|[\x7f-\xa0]', slip)
            ):
                slips += not checked.is_valid(json.loads(slip))
                assert not checked.is_valid(json.loads(slip)), slip
    assert 3 not in valid


def _plain(text: str) -> str | None:
    """A text as json.dumps would write its value, if it is one."""
    try:
        value = json.loads(text, object_pairs_hook=_no_member_twice)
    except ValueError:
        return None
    return json.dumps(value, ensure_ascii=False)


def _no_member_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def fits(text: FreeText, some: str) -> bool:
    place = text.after(text.start, some.encode())
    return place is not None and text.final(place)


def test_form_against_re() -> None:
    chance = random.Random(3)
    for pattern, low, high in ((f"{INNER}*", 0, None), (f"{INNER}*", 1, 3), ("[a-z]+é?", 0, None), (r"x.|漢+", 0, None)):
        text = FreeText(automaton_of(pattern, "t"), low, high)
        assert fits(text, text.example)
        for _ in range(3000):
            some = "".join(chance.choices('ab"\\nxé漢\u0080\U0001f600\n', k=chance.randrange(6)))
            size = len(re.sub(r"\\.", "x", some, flags=re.DOTALL))
            wanted = re.fullmatch(pattern, some) is not None and low <= size <= (size if high is None else high)
            assert fits(text, some) == wanted, (pattern, some)
            if wanted:  # all beginnings are, byte by byte
                assert all(text.after(text.start, some.encode()[:n]) is not None for n in range(len(some.encode())))


def test_bytes_that_are_no_text_are_not_begun() -> None:
    text = FreeText(automaton_of(f"{INNER}*", "t"))
    for bad in (b"\x80", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe6\x41", b"\xf5\x80"):
        assert text.after(text.start, bad) is None
    letters = FreeText(automaton_of("[a-z]*", "t"))
    assert letters.after(letters.start, "é".encode()[:1]) is None


def goes_on(written: bytes) -> bool:
    """Whether bytes are the beginning of what stands within the quotes, by trying how their last character may go on."""
    tails = (b"", b"\x80", b"\xa0", b"\x80\x80", b"\xa0\x80", b"\x90\x80\x80", b"\x80\x80\x80")
    texts = ((written + tail).decode(errors="replace") for tail in tails)
    return any("\ufffd" not in text and FORM.fullmatch(text, partial=True) for text in texts)


def law(strength: float, z: torch.Tensor, prefix: list[int], answers: Guide) -> np.ndarray:
    chain = guided(strength).for_answers(answers)
    return chain(z, history=decal.History.of([[5, *prefix]], prompt=1)).softmax(-1)[0].numpy()


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.05])
@pytest.mark.parametrize("within", ["", "r", "red", "é", "\\"])
def test_the_law_within_a_text(strength: float, within: str) -> None:
    """Against tokens found by trying each, and the tokenizer's own way to write every ending."""
    guide = Guide.of(following(OPTIONAL), TOKENIZER)
    head = '{"a": "'
    rests = ['"}', '", "b": true}', '", "b": false}']
    z = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (1, len(TOKENIZER))))
    got = law(strength, z, [*TOKENIZER.encode(head), *TOKENIZER.encode(within)], guide)
    p = tiny.softmax(z[0].numpy())
    wanted = np.zeros_like(p)
    spelt = token_bytes(TOKENIZER)
    for token, text in spelt.items():
        wanted[token] = p[token] * goes_on(within.encode() + text)
    # Ends of the text in a token with the quote, as any characters or none.
    for before in {text.partition(b'"')[0].decode(errors="replace") for text in spelt.values() if b'"' in text}:
        if not FORM.fullmatch(within + before):
            continue
        first = [TOKENIZER.encode(before + rest)[0] for rest in rests]
        if all(spelt[token].startswith(f'{before}"'.encode()) for token in first):
            behind = Counter(first)
            share = np.array([p[t] ** (1 - strength) * n**strength for t, n in behind.items()])
            wanted[list(behind)] = p[list(behind)].sum() * share / share.sum()
    np.testing.assert_allclose(got, wanted / wanted.sum(), atol=1e-12)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_all_of_a_text_is_one_choice(strength: float) -> None:
    """Beside null, all numbers together have what one token of their mass would have."""
    guide = Guide.of(following({"properties": {"a": {"type": ["number", "null"]}}, "required": ["a"]}), TOKENIZER)
    z = torch.from_numpy(np.random.default_rng(2).normal(0, 2, (1, len(TOKENIZER))))
    got = law(strength, z, TOKENIZER.encode('{"a": '), guide)
    p = tiny.softmax(z[0].numpy())
    number = regex.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
    begin = [t for t, text in token_bytes(TOKENIZER).items() if number.fullmatch(text.decode(errors="replace"), partial=True)]
    null = TOKENIZER.encode("null")[0]
    mass = np.array([p[begin].sum(), p[null]]) ** (1 - strength)
    mass /= mass.sum()
    np.testing.assert_allclose(got[null], mass[1], atol=1e-12)
    np.testing.assert_allclose(got[begin], mass[0] * p[begin] / p[begin].sum(), atol=1e-12)
    assert got[[*begin, null]].sum() == pytest.approx(1, abs=1e-12)


def test_what_is_not_free_is_uniform_through_generate() -> None:
    """900 records; fails for one seed in ten thousand where nothing is wrong."""
    schema = {
        "properties": {"a": STRING, "n": {"enum": [1, 22, 333]}, "b": {"type": "number"}, "c": {"type": ["boolean", "null"]}},
        "required": ["a", "n", "c"],
    }  # fmt: skip
    texts = written(guided(1).for_answers(following(schema), TOKENIZER, free_tokens=5), 900, spread=1.0)
    records = [json.loads(text) for text in texts]
    seen = Counter((r["n"], "b" in r, r["c"]) for r in records)
    assert len(seen) == 18
    assert chisquare(list(seen.values())).pvalue > 1e-4
    assert len({r["a"] for r in records}) > 100


def test_the_model_ends_its_texts_when_it_would() -> None:
    """Where nothing is cut or weighed, how long texts are is the model's: a quote with all its mass ends them at once."""
    guide = Guide.of(following(OPTIONAL), TOKENIZER)
    quote = [t for t in range(len(TOKENIZER)) if TOKENIZER.decode([t]).startswith('"')]
    z = torch.zeros(1, len(TOKENIZER))
    z[0, quote] = 30
    got = law(1.0, z, TOKENIZER.encode('{"a": "red'), guide)
    assert got[quote].sum() == pytest.approx(1, abs=1e-9)


def test_the_same_text_alone_and_in_a_batch() -> None:
    model = tiny.llama(len(TOKENIZER))
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    chain = (guided(0.5) | decal.min_p(0.01)).for_answers(following(SCHEMAS["two of one kind"]), TOKENIZER, free_tokens=8)
    prompts = [TOKENIZER.encode(text) for text in ("red ", "x", "null 12")]
    width = max(map(len, prompts))
    pad = TOKENIZER.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    kwargs = chain.generate_kwargs(seeds=[4, 5, 6], pad_token_id=pad)
    together = model.generate(ids, attention_mask=(ids != pad).long(), **kwargs)[:, width:]
    for number, prompt in enumerate(prompts):
        alone = chain.generate_kwargs(seeds=[4 + number], pad_token_id=pad)
        one = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **alone)
        tokens = one[0, len(prompt) :].tolist()
        assert together[number].tolist()[: len(tokens)] == tokens
        assert TOKENIZER.decode(tokens, skip_special_tokens=True) in following(SCHEMAS["two of one kind"])


def test_behind_a_cut_the_kept_tokens_are_weighed() -> None:
    """Of few columns as of all."""
    guide = Guide.of(following(OPTIONAL), TOKENIZER)
    z = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (1, len(TOKENIZER))))
    history = decal.History.of([[5, *TOKENIZER.encode('{"a": "re')]], prompt=1)
    cut = decal.top_k(40)(z, history=history)
    got = (decal.top_k(40) | guided(0.7)).for_answers(guide)(z, history=history).softmax(-1)
    torch.testing.assert_close(got, guided(0.7).for_answers(guide)(cut, history=history).softmax(-1), atol=1e-12, rtol=0)


def test_of_a_pydantic_model() -> None:
    class Person(BaseModel):
        name: str = Field(max_length=5)
        age: int = Field(ge=0)
        job: str | None = None

    valid = ValidSet.from_json_schema(Person, free=True)
    for text in written(guided(1).for_answers(valid, TOKENIZER, free_tokens=7), 30):
        assert Person.model_validate_json(text).age >= 0


def test_texts_are_ended_in_time() -> None:
    """Also where a character isn't complete, or there are too few of them."""
    z = torch.zeros(1, len(TOKENIZER), dtype=torch.float64)
    valid = following({"type": "string", "minLength": 4})
    guide = Guide.of(valid, TOKENIZER, free_tokens=5)
    assert guide.longest == 1 + 5 + 1
    text = [*TOKENIZER.encode('"'), *TOKENIZER.encode("x")]
    spelt = token_bytes(TOKENIZER)
    # Four tokens are left, three characters to write, and the quote: no byte of a character that takes more.
    kept = [spelt[t] for t in np.flatnonzero(law(1.0, z, text, guide))]
    assert b"y" in kept
    assert b"\xc3" not in kept
    assert b"\\" not in kept
    kept = [spelt[t] for t in np.flatnonzero(law(1.0, z, [*text, *TOKENIZER.encode("x") * 3], guide))]
    assert kept
    assert all(b'"' in piece for piece in kept)
    roomy = Guide.of(valid, TOKENIZER, free_tokens=6)
    kept = [spelt[t] for t in np.flatnonzero(law(1.0, z, text, roomy))]
    assert b"\xc3" in kept
    assert b"\\" in kept
    assert b"\xe6" not in kept  # of three
    with pytest.raises(DecalError, match="takes 5 tokens at least, more than free_tokens=4"):
        Guide.of(valid, TOKENIZER, free_tokens=4)


def test_what_a_space_is_and_a_letter() -> None:
    """Where readers of patterns disagree, what is written suits all."""
    for pattern, some in (
        (r"^[^\w]+$", "漢"),
        (r"^[^\d]+$", "٣"),
        (r"^\S+$", "a\xa0b"),
        (r"^[^\s]+$", "a\u2003b"),
        (r"^\W+$", "漢"),
        (r"^\D+$", "٣"),
        (r"^[^\]\w]+$", "漢"),
        (r"^(?!\w).+$", "漢"),
    ):
        valid = following({"type": "string", "pattern": pattern})
        assert f'"{some}"' not in valid
        assert '"-"' in valid
    assert '"é漢"' in following({"type": "string", "pattern": r"^\S+$"})


def test_no_byte_begins_a_character_that_the_pattern_has_not() -> None:
    spelt = token_bytes(TOKENIZER)
    guide = Guide.of(following({"type": "string", "pattern": "^(é|è[a-z]{3}[a-z]*)$"}), TOKENIZER, free_tokens=4)
    z = torch.zeros(1, len(TOKENIZER), dtype=torch.float64)
    start = TOKENIZER.encode('"')
    assert {spelt[t] for t in np.flatnonzero(law(1.0, z, start, guide))} == {b"\xc3", "é".encode()}
    begun = [*start, next(t for t, text in spelt.items() if text == b"\xc3")]
    # Two tokens are left behind the next one, too few for what è asks for.
    assert {spelt[t] for t in np.flatnonzero(law(1.0, z, begun, guide))} == {b"\xa9"}


def test_a_byte_that_begins_no_character_of_the_pattern() -> None:
    """Of all bytes that may begin, and of all that may follow, those of a character that is left; found by trying them."""
    leads = [bytes([byte]) for byte in range(0xC2, 0xF5)]
    for pattern, left in (
        ("[^À-ÿ]", lambda c: not "À" <= c <= "ÿ"),
        ("[^\u0080-\uffff]", lambda c: c > "\uffff"),
        ("[\u0080-\u10ff]", lambda c: "\u0080" <= c <= "\u10ff"),
        ("[^\u07c0-\u0fff]", lambda c: not "\u07c0" <= c <= "\u0fff"),
    ):
        text = FreeText(automaton_of(pattern, "t"))
        spelt = [c.encode() for c in map(chr, range(0x80, 0x110000)) if left(c) and not 0xD800 <= ord(c) <= 0xDFFF]
        begun = {written[:size] for written in spelt for size in range(1, len(written))}
        some = leads + [lead + bytes([byte]) for lead in leads for byte in range(0x80, 0xC0)]
        assert {written for written in some if text.after(text.start, written)} - set(spelt) == begun.intersection(some)


def test_all_answers_behind_a_text_count_where_a_cut_left_only_its_ends() -> None:
    """Tokens that end the text part the answers behind it, and count as all of them together."""
    some = {"anyOf": [{"const": "x"}, {"type": "string", "pattern": r"^\.+$"}]}
    schema = {"properties": {"a": some, "b": {"type": "boolean"}}, "required": ["a"]}
    guide = Guide.of(following(schema), TOKENIZER)
    (passage,) = guide.trie.passages.values()
    ends = list(passage.exits[b"."])
    assert len(ends) > 1
    x = TOKENIZER.encode("x")[0]
    z = torch.full((1, len(TOKENIZER)), -torch.inf, dtype=torch.float64)
    z[0, [x, *ends]] = 0
    got = law(1.0, z, TOKENIZER.encode('{"a": "'), guide)
    assert got[x] == pytest.approx(0.5, abs=1e-12)
    assert got[ends].sum() == pytest.approx(0.5, abs=1e-12)


def test_few_texts_of_a_pattern_are_counted() -> None:
    for pattern, size in (("^[0-9]{5}$", 100_000), ("^[A-Z][ab]$", 52), ("^[a-z]{3}$", 1)):
        assert following({"type": "string", "pattern": pattern}).size == size


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"anyOf": [{"const": "x"}, STRING]}, "can't be told from what else may stand there"),
        ({"type": ["integer", "number"]}, "can't be told from what else may stand there"),
        ({"anyOf": [{"const": 12}, {"type": "number"}]}, "can't be told from what else may stand there"),
    ],
)
def test_texts_that_cannot_be_told_apart(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(DecalError, match=f"behind '.*' a free text {message}"):
        Guide.of(following(schema), TOKENIZER)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": '^["\\\\]+$'}, "/pattern: .* matches no text without characters"),
        ({"type": "string", "pattern": "^(a$"}, "can't read"),
        ({"type": "number", "minimum": 5}, "/minimum: isn't followed with numbers; integers have bounds"),
        ({"type": "string", "pattern": r"^\p{L}+$"}, r"can't read the regular expression '\^"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "no text has from 3 to 2"),
        ({"type": "array", "items": STRING}, "has no maxItems"),
        ({"enum": ["\ue001"]}, "U\\+E001 has a use of its own here"),
        ({"type": "string", "pattern": "^\ue001$"}, r"/pattern: may match U\+E001, which has a use of its own here"),
        ({"type": "string", "pattern": r"^[^]\w]+$"}, r"has a \] first in brackets, which is read in two ways; write \\\]"),
    ],
)
def test_schemas_that_are_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(DecalError, match=message):
        following(schema)


def test_without_asking_nothing_is_free() -> None:
    for schema in (STRING, {"type": "number"}, {"type": "integer"}):
        with pytest.raises(DecalError, match=r"free=True"):
            ValidSet.from_json_schema(schema)


def test_where_free_texts_do_not_fit() -> None:
    with pytest.raises(DecalError, match="they can't be listed"):
        tiny.compile_trie(TOKENIZER, following(STRING))
    with pytest.raises(DecalError, match="needs ends"):
        Guide.of(following({"type": "number"}), TOKENIZER, ends=())
    few = Tokenizer(BPE({"e": 0, '"': 1, tiny.EOS: 2}, []))
    few.pre_tokenizer = ByteLevel(add_prefix_space=False)
    with pytest.raises(DecalError, match="can't be written in the tokens of this vocabulary"):
        Guide.of(
            following({"type": "string", "pattern": "^é+$"}), PreTrainedTokenizerFast(tokenizer_object=few, eos_token=tiny.EOS)
        )
    with pytest.raises(DecalError, match="a free text may contain it"):
        Guide.of(following({"type": "number"}), TOKENIZER, ends=["."])
    for bad in (0, 2.5, True, "many"):
        with pytest.raises(DecalError, match="free_tokens is a whole number"):
            guided(1).for_answers(following(STRING), TOKENIZER, free_tokens=bad)
