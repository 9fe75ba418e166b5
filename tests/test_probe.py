"""The tree procedure on a tiny model, against brute force; and that killing it loses and repeats nothing."""

from __future__ import annotations

import html.parser
import json
import math
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from filelock import FileLock

import decal
from decal.eval import cli, judge, probe, probe_report
from decal.eval.completion import Writer, encode
from decal.eval.journal import Journal
from decal.eval.judge import Judge, Judgement
from decal.eval.models import LoadedModel
from decal.samplers.errors import DecalError

PROMPT = "Say: "


def tiny_model() -> LoadedModel:
    """The same in every process."""
    tokenizer = tiny.byte_level(["12 34 5+6 abc\n"] * 4, merges=6, template=tiny.TEMPLATE)
    return LoadedModel(tiny.llama(len(tokenizer), seed=1, spread=0.35), tokenizer, "tiny", "fingerprint")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model()


class Rule(Judge):
    """A judge that is a function of the completion, and counts."""

    def __init__(self, rule: Callable[[str], bool | None], name: str = "rule"):
        self.rule, self.name = rule, name
        self.asked: list[str] = []

    @property
    def identity(self) -> str:
        return self.name

    def __call__(self, prompt: str, completion: str) -> Judgement:
        assert prompt == PROMPT
        self.asked.append(completion)
        said = self.rule(completion)
        return Judgement(said, reason="refused: no" if said is None else "")


def by_length(text: str) -> bool:
    """Valid or not about as often, in no order."""
    return sum(text.encode()) % 3 == 0


def plan(**more: Any) -> probe.Plan:
    return probe.Plan(**{"ranks": probe.ranks("1-20,30-200:10"), "most": 4, "batch": 7} | more)


# ---- ranks and plans


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1", [1]),
        ("5-7", [5, 6, 7]),
        ("1-9:4", [1, 5, 9]),
        ("7,1-3, 2-8:3", [1, 2, 3, 5, 7, 8]),
        (probe.RANKS, [*range(1, 51), *range(60, 1001, 10)]),
    ],
)
def test_ranks(text: str, wanted: list[int]) -> None:
    assert list(probe.ranks(text)) == wanted


@pytest.mark.parametrize("text", ["", "0", "a", "1-", "-3", "5-1", "1-5:0", "1-5:-1", "1:2:3", "1.5", "1,,2", "1-999999999999"])
def test_bad_ranks(text: str) -> None:
    with pytest.raises(DecalError):
        probe.ranks(text)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"branch": 0}, "branch must be at least 1"),
        ({"completions": 0}, "completions must be at least 1"),
        ({"most": 0}, "most must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"share": float("nan")}, "share must be in"),
        ({"ranks": ()}, "ranks must be"),
        ({"ranks": (2, 1)}, "ranks must be"),
        ({"ranks": (0, 1)}, "ranks must be"),
        ({"stop": ("",)}, "must not be empty"),
        ({"sampler": "min_p(0.1)"}, "without a number of completions there is one"),
        ({"completions": 2, "sampler": "no_such_rule(1)"}, "no_such_rule"),
        ({"completions": 2, "sampler": "presence_penalty(1)"}, "may read the current row alone"),
        ({"completions": 2, "sampler": "mirostat"}, "may read the current row alone"),
    ],
)
def test_bad_plans(more: dict[str, Any], told: str) -> None:
    with pytest.raises(DecalError, match=told):
        plan(**more)


def test_how_many_completions_must_be_valid() -> None:
    assert [plan().needed(n) for n in (1, 5)] == [1, 1]
    assert [plan(share=0.5).needed(n) for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert [plan(share=1.0).needed(n) for n in (1, 3)] == [1, 3]
    assert plan(share=0.1).needed(10) == 1
    assert plan(share=0.3).needed(10) == 3
    assert [plan(depth=d, branch=3).nodes for d in (1, 2, 3)] == [1, 4, 13]


# ---- completions


def naive(model: LoadedModel, ids: Sequence[int], most: int, ends: frozenset[int]) -> list[int]:
    """Greedy, without batch and cache."""
    new: list[int] = []
    while len(new) < most and not (new and new[-1] in ends):
        with torch.inference_mode():
            row = model.model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
        new.append(int(row.argmax()))
    return new


def test_completions_in_batches_of_any_lengths(model: LoadedModel) -> None:
    writer = Writer(model, ["\n"])
    assert writer.own_ends == {model.tokenizer.eos_token_id}
    starts = [encode(model.tokenizer, text, "completion") for text in ("a", "Hello", "12 34", "b" * 30)]
    wanted = [naive(model, start, 12, frozenset(writer.ends)) for start in starts]
    assert writer.greedy(starts, 12) == wanted
    chain = decal.parse("temperature(1.5)")
    seeds = [3, 1, 4, 1]
    together = writer.sampled(starts, chain, seeds, 12)
    assert together == [writer.sampled([s], chain, [seed], 12)[0] for s, seed in zip(starts, seeds, strict=True)]
    assert together != writer.sampled(starts, chain, [7, 8, 9, 10], 12)
    assert all(len(new) == 12 or writer.ended(new) for new in together)
    assert not any(writer.ended(new[:-1]) for new in together)


def test_text_and_end(model: LoadedModel) -> None:
    end = model.tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return list(model.tokenizer(text)["input_ids"])

    writer = Writer(model, ["\n", "END"])
    assert writer.text([*ids("ab"), end, *ids("c")]) == "ab"
    assert writer.text(ids("ab\nc")) == "ab"
    assert writer.text(ids("abEND\n")) == "ab"
    assert writer.text(ids("é")) == "é"
    assert writer.text(ids("é")[:1]) == "�"
    assert [writer.ended(t) for t in ([end], ids("ab"), ids("a\n"), ids("abEND"), ids("abEN"), [])] == [
        True,
        False,
        True,
        True,
        False,
        False,
    ]
    assert writer.token_text(end) == tiny.EOS
    assert writer.token_text(ids("é")[0]) == "�"
    assert not Writer(model).ended(ids("ab\nEND"))


def test_prompts(model: LoadedModel) -> None:
    assert model.tokenizer.decode(encode(model.tokenizer, "Hi", "chat")) == "[user]Hi\n[reply]"
    with pytest.raises(DecalError, match="at least one token"):
        encode(model.tokenizer, "", "completion")
    with pytest.raises(DecalError, match="lacks; use form completion"):
        encode(tiny.byte_level(), "Hi", "chat")


# ---- the tree


def brute(model: LoadedModel, p: probe.Plan, rule: Callable[[str], bool]) -> dict[tuple[int, ...], list[tuple[int, int, bool]]]:
    """(token, rank, valid) of every swept token at every prefix, one forward pass for each token."""
    ids = list(model.tokenizer(PROMPT)["input_ids"])
    end = {model.tokenizer.eos_token_id}
    found: dict[tuple[int, ...], list[tuple[int, int, bool]]] = {}
    level: list[tuple[int, ...]] = [()]
    for _ in range(p.depth):
        below: list[tuple[int, ...]] = []
        for prefix in level:
            with torch.inference_mode():
                row = model.model(input_ids=torch.tensor([[*ids, *prefix]])).logits[0, -1].tolist()
            ranking = sorted(range(len(row)), key=lambda t: (-row[t], t))
            found[prefix] = []
            for rank in p.ranks:
                if rank > len(ranking):
                    break
                token = ranking[rank - 1]
                path = [*prefix, token]
                if token not in end:
                    path += naive(model, [*ids, *path], p.most, frozenset(end))
                text = model.tokenizer.decode(path, skip_special_tokens=True)
                found[prefix].append((token, rank, rule(text)))
            valid = [t for t, _, ok in found[prefix] if ok and t not in end]
            if valid:
                below += [(*prefix, valid[0]), (*prefix, valid[-1])] if len(valid) > 1 else [(*prefix, valid[0])]
        level = below
    return found


@pytest.fixture(scope="module")
def whole(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[probe.Tree, Path, Rule]:
    """A finished probe, its folder, and its judge."""
    folder = tmp_path_factory.mktemp("whole")
    mine = Rule(by_length)
    return probe.probe(model, mine, PROMPT, plan(), folder), folder, mine


def test_labels_against_brute_force(model: LoadedModel, whole: tuple[probe.Tree, Path, Rule]) -> None:
    wanted = brute(model, plan(), by_length)
    found = whole[0]
    assert {n.prefix: [(t.token, t.rank, t.valid) for t in n.tokens] for n in found.nodes} == wanted
    assert [n.number for n in found.nodes] == list(range(3))
    labels = [ok for tokens in wanted.values() for _, _, ok in tokens]
    assert 0.15 < np.mean(labels) < 0.85
    for node in found.nodes:
        ids = [*model.tokenizer(PROMPT)["input_ids"], *node.prefix]
        with torch.inference_mode():
            row = model.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        p = row.softmax(-1)
        for t in node.tokens:
            assert t.logit == pytest.approx(float(row[t.token]), abs=1e-9)
            assert t.probability == pytest.approx(float(p[t.token]), rel=1e-9)


def test_every_swept_vocabulary(model: LoadedModel, tmp_path: Path) -> None:
    """Ranks beyond the vocabulary are left out, and an end of the text is a completion too."""
    mine = Rule(lambda text: True)
    everything = probe.probe(model, mine, PROMPT, plan(ranks=probe.ranks("1-400"), depth=1, most=1, batch=64), tmp_path)
    (node,) = everything.nodes
    assert sorted(t.token for t in node.tokens) == list(range(len(model.tokenizer)))
    assert math.fsum(t.probability for t in node.tokens) == pytest.approx(1)
    (end,) = [t for t in node.tokens if t.token == model.tokenizer.eos_token_id]
    assert (end.ends, end.completions) == (True, (probe.Completion("", True, Judgement(True)),))


def cutoffs(logits: Sequence[float], labels: Sequence[bool]) -> list[tuple[int, float, float]]:
    """(size, recall, precision) of every cutoff by logit that ends behind a valid token, by counting."""
    found = []
    for level in sorted({z for z, ok in zip(logits, labels, strict=True) if ok}, reverse=True):
        kept = [ok for z, ok in zip(logits, labels, strict=True) if z >= level]
        found.append((len(kept), sum(kept) / sum(labels), sum(kept) / len(kept)))
    return found


def swept(rng: np.random.Generator, labels: Sequence[bool | None], logits: Sequence[float]) -> tuple[probe.Swept, ...]:
    return tuple(
        probe.Swept(i, str(i), i + 1, float(z), float(rng.random()) / 100, False, (), ok)
        for i, (ok, z) in enumerate(zip(labels, logits, strict=True))
    )


def test_numbers_of_a_node_against_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 30))
        logits = np.sort(rng.integers(0, 12, size).astype(float))[::-1]  # with equals
        labels = [[True, False, None][i] for i in rng.choice(3, size, p=[0.4, 0.4, 0.2])]
        tokens = swept(rng, labels, logits)
        node = probe.Node(0, (), "", tokens)
        told = node.summary()
        known = [t for t in tokens if t.valid is not None]
        valid = [t for t in known if t.valid]
        assert (told["swept"], told["valid"], told["unknown"]) == (size, len(valid), size - len(known))
        if not valid:
            assert node.order is None
            assert told["average_precision"] is told["recall_at_precision_08"] is told["entropy_of_valid"] is None
            continue
        wanted = cutoffs([t.logit for t in known], [bool(t.valid) for t in known])
        assert [(c["size"], c["recall"], c["precision"]) for c in told["cutoffs"]] == [pytest.approx(c) for c in wanted]
        # Average precision, as usual: the sum of gains of recall times precision.
        recalls = [0.0, *(r for _, r, _ in wanted)]
        average = sum((recalls[i + 1] - recalls[i]) * p for i, (_, _, p) in enumerate(wanted))
        assert told["average_precision"] == pytest.approx(average)
        assert told["recall_at_precision_08"] == pytest.approx(max((r for _, r, p in wanted if p >= 0.8 - 1e-12), default=0))
        share = np.asarray([t.probability for t in valid])
        share /= share.sum()
        assert told["entropy_of_valid"] == pytest.approx(-(share * np.log(share)).sum())


def test_ways_to_end_a_text_are_one_step() -> None:
    """As if there were only the most probable one, with the probability of all."""

    def ending(number: int, logit: float, probability: float, text: str, valid: bool | None) -> probe.Swept:
        done = (probe.Completion(text, True, Judgement(valid, {}, "")),)
        return probe.Swept(number, "", number, logit, probability, True, done, valid)

    def plain(number: int, logit: float, probability: float, valid: bool) -> probe.Swept:
        done = (probe.Completion("a", True, Judgement(valid)),)
        return probe.Swept(number, "", number, logit, probability, False, done, valid)

    between = [plain(2, 4, 0.2, True), plain(5, 1, 0.05, True)]
    some = [
        ending(1, 5, 0.3, "a", True),
        ending(3, 3, 0.1, "a", True),
        ending(4, 2, 0.08, "a.", False),
        ending(6, 0, 0.01, "a", True),
    ]
    tokens = sorted([*between, *some], key=lambda t: t.token)
    found = probe.Node(0, (), "", tuple(tokens)).order
    one = probe.Node(0, (), "", (ending(1, 5, 0.41, "a", True), between[0], some[2], between[1])).order
    assert found is not None
    assert one is not None
    assert (found.upto.tolist(), found.above.tolist(), found.tokens) == ([1, 2, 4], [0, 1, 3], 4)
    for name in ("to", "count", "above", "upto", "share", "head"):
        np.testing.assert_allclose(getattr(found, name), getattr(one, name), err_msg=name)


def test_branches() -> None:
    rng = np.random.default_rng(0)
    node = probe.Node(0, (), "", swept(rng, [False, True, None, True, True, True, True], range(7, 0, -1)))
    assert [[t.token for t in node.branches(n)] for n in (1, 2, 3, 4, 9)] == [
        [1],
        [1, 6],
        [1, 4, 6],
        [1, 3, 5, 6],
        [1, 3, 4, 5, 6],
    ]
    assert probe.Node(0, (), "", swept(rng, [False, None], [2, 1])).branches(2) == []


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_several_completions(share: float | None, model: LoadedModel, tmp_path: Path) -> None:
    """A token is valid if enough are, unknown if that hangs on those without a verdict."""
    # So that each share makes some tokens valid, some not, and leaves some unknown.
    verdicts = {None: [True, None, *[False] * 7], 0.5: [True, None, False, False], 1.0: [*[True] * 6, None, False]}[share]
    mine = Rule(lambda text: verdicts[sum(text.encode()) % len(verdicts)])
    drawn = plan(completions=4, share=share, sampler="temperature(1.2) | min_p(0.01)", depth=1)
    found = probe.probe(model, mine, PROMPT, drawn, tmp_path)
    kinds: Counter[bool | None] = Counter()
    for token in found.nodes[0].tokens:
        said = [c.judgement.valid for c in token.completions]
        assert len(said) == (1 if token.ends else 4)
        need = {None: 1, 0.5: (len(said) + 1) // 2, 1.0: len(said)}[share]
        low, high = said.count(True), said.count(True) + said.count(None)
        assert token.valid is (True if low >= need else False if high < need else None)
        kinds[token.valid] += 1
    assert len(kinds) == 3
    texts = [c.text for t in found.nodes[0].tokens for c in t.completions]
    assert len(set(texts)) > len(texts) / 2
    counts = found.counts()
    assert counts["completions"] == len(texts)
    assert counts["valid"] + counts["invalid"] + counts["refused"] == len(texts)
    assert counts["refused"] == sum(mine.rule(t) is None for t in texts)
    again = probe.probe(model, Rule(mine.rule), PROMPT, drawn, tmp_path / "again")
    assert again.nodes == found.nodes
    other = probe.probe(model, Rule(mine.rule), PROMPT, plan(completions=4, depth=1, seed=1), tmp_path)
    assert [c.text for t in other.nodes[0].tokens for c in t.completions] != texts


def test_a_prompt_too_long(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(DecalError, match="need 5053 tokens, and the model has room for 512"):
        probe.probe(model, Rule(by_length), "x" * 5001, plan(most=50), tmp_path)


# ---- finished work


def test_a_journal_survives_any_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    records = [{"key": "1", "text": "é\n"}, {"key": "2", "n": [1, 2.5, None]}, {"key": "3"}]
    with Journal(path) as journal:
        journal.add(records[:1])
        journal.add(records[1:])
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == records
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        whole = sum(len(b"".join(lines[: n + 1])) <= cut for n in range(3))
        with Journal(path) as journal:
            assert list(journal.records.values()) == records[:whole]
            journal.add([{"key": "new"}])
        with Journal(path) as journal:
            assert list(journal.records) == [*"123"[:whole], "new"]


@pytest.mark.parametrize("line", [b"not JSON", b"[1]", b"3", b'{"no": "key"}', b"\xff", b"", b'{"key": []}', b"[" * 100_000])
def test_a_journal_with_something_else_in_it(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"key": "1"}\n' + line + b'\n{"key": "2"}\n')
    with pytest.raises(DecalError, match=r"a.jsonl:2: not a record of earlier work"):
        Journal(path)


def test_a_journal_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DecalError, match="cannot write"):
        Journal(tmp_path / "file" / "a.jsonl")


def test_one_process_at_a_time(model: LoadedModel, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(DecalError, match="another process works in"):
        probe.probe(model, Rule(by_length), PROMPT, plan(), tmp_path)
    probe.probe(model, Rule(by_length), PROMPT, plan(depth=1), tmp_path)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """What the model is asked to complete."""
    asked: list[tuple[int, ...]] = []
    original = Writer.sampled

    def sampled(self: Writer, starts: Sequence[Sequence[int]], *more: Any) -> list[list[int]]:
        asked.extend(map(tuple, starts))
        return original(self, starts, *more)

    monkeypatch.setattr(Writer, "sampled", sampled)
    return asked


def test_a_second_run_does_nothing_and_more_only_what_is_new(
    model: LoadedModel, whole: tuple[probe.Tree, Path, Rule], written: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, folder, judge_ = whole
    assert len(judge_.asked) == len(set(judge_.asked))
    same = Rule(by_length)
    assert probe.probe(model, same, PROMPT, plan(), folder) == first
    assert (same.asked, written) == ([], [])

    more = probe.probe(model, same, PROMPT, plan(ranks=probe.ranks("1-25")), folder)
    known = {t.token for t in first.nodes[0].tokens}
    fresh = {t.token for t in more.nodes[0].tokens} - known
    at_the_root = [path[-1] for path in written if len(path) == len(encode(model.tokenizer, PROMPT, "completion")) + 1]
    assert sorted(at_the_root) == sorted(fresh - {model.tokenizer.eos_token_id})
    assert not set(same.asked) & set(judge_.asked)

    written.clear()
    other = Rule(by_length, "another judge")
    assert probe.probe(model, other, PROMPT, plan(), folder).nodes == first.nodes
    assert written == []
    assert sorted(other.asked) == sorted(judge_.asked)


def test_what_was_judged_before_a_failure_is_kept(model: LoadedModel, tmp_path: Path) -> None:
    class Dies(Rule):
        def __call__(self, prompt: str, completion: str) -> Judgement:
            if len(self.asked) == 9:
                raise DecalError("no more")
            return super().__call__(prompt, completion)

    dies = Dies(by_length)
    with pytest.raises(DecalError, match="no more"):
        probe.probe(model, dies, PROMPT, plan(), tmp_path)
    goes_on = Rule(by_length)
    found = probe.probe(model, goes_on, PROMPT, plan(), tmp_path)
    assert not set(dies.asked) & set(goes_on.asked)
    assert found == probe.probe(model, Rule(by_length), PROMPT, plan(), tmp_path / "apart")


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import test_probe
    from pathlib import Path
    from decal.eval import probe
    from decal.eval.completion import Writer

    folder, batches, judgements = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    original, done = Writer.sampled, [0]

    def sampled(self, starts, *more):
        done[0] += 1
        with open(folder / "batches.log", "a") as log:
            log.write("".join(repr(tuple(s)) + "\\n" for s in starts))
        new = original(self, starts, *more)
        if done[0] == batches:
            die()
        return new

    Writer.sampled = sampled

    class Logs(test_probe.Rule):
        def __call__(self, prompt, completion):
            said = super().__call__(prompt, completion)
            with open(folder / "judged.log", "a") as log:
                log.write(repr(completion) + "\\n")
            if len(self.asked) == judgements:
                die()
            return said

    probe.probe(test_probe.tiny_model(), Logs(test_probe.by_length), test_probe.PROMPT, test_probe.plan(), folder)
"""


def test_killed_and_killed_again(
    model: LoadedModel, whole: tuple[probe.Tree, Path, Rule], written: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Killed in a batch of completions and in a judgement, each time before what was done could be written down."""
    script = tmp_path / "probe.py"
    script.write_text(textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent)))

    for batches, judgements in ((3, 0), (0, 25)):
        command = [sys.executable, str(script), str(tmp_path), str(batches), str(judgements)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    # As if a line had been on its way to the disk.
    for name in (probe.COMPLETIONS, probe.JUDGED, probe.NODES):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"key": "half')
    last = Rule(by_length)
    assert probe.probe(model, last, PROMPT, plan(), tmp_path) == whole[0]
    completed = Counter((tmp_path / "batches.log").read_text().splitlines()) + Counter(map(repr, written))
    judged = Counter((tmp_path / "judged.log").read_text().splitlines()) + Counter(map(repr, last.asked))
    assert set(judged) == {repr(text) for text in whole[2].asked}
    # Only what was under way is done twice: a batch, and one judgement.
    assert max(completed.values()) == max(judged.values()) == 2
    assert sum(n == 2 for n in completed.values()) <= plan().batch
    assert sum(n == 2 for n in judged.values()) == 1
    for name in (probe.COMPLETIONS, probe.JUDGED, probe.NODES):
        keys = [json.loads(line)["key"] for line in (tmp_path / name).read_text().splitlines()]
        assert len(keys) == len(set(keys))


# ---- what is left behind


class Text(html.parser.HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.titles: list[str] = []
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.tags[tag] += 1
        self.links += [told[name] or "" for name in ("href", "src") if name in told]
        if tag == "span" and "title" in told:
            self.kinds.append(told["class"] or "")
            self.titles.append(told["title"] or "")


@pytest.fixture(scope="module")
def folder(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk."""
    path = tmp_path_factory.mktemp("model")
    model.model.float().save_pretrained(path)
    model.model.double()
    model.tokenizer.save_pretrained(path)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``decal`` in this process; gives code, output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decal", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


def test_probe_from_end_to_end(run: Run, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def odd(prompt, completion):\n    assert prompt == '<b>&'\n    return len(completion) % 2 == 1\n")
    out = tmp_path / "out"
    command = [
        "probe",
        "<b>&",
        "--judge",
        f"{mine}:odd",
        "--model",
        folder,
        "--out",
        out,
        "--ranks",
        "1-30",
        "--completions",
        2,
    ]
    command += ["--max-new-tokens", 4, "--stop", "\\n", "--share", 0.6, "--seed", 3, "--branch", 1]
    code, text, error = run(*command)
    assert code == 0, error
    assert f"the one to open is {out / 'report.html'}" in text
    made = {"tree.json", "tokens.parquet", "precision_recall.png", "report.html"}
    assert {p.name for p in out.iterdir() if p.name != ".lock"} == made | {probe.NODES, probe.COMPLETIONS, probe.JUDGED}
    assert (out / "precision_recall.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    told = json.loads((out / "tree.json").read_text())
    table = pd.read_parquet(out / "tokens.parquet")
    assert told["prompt"] == "<b>&"
    assert told["plan"]["stop"] == ["\n"]
    assert (told["plan"]["seed"], told["plan"]["share"], told["decal"]) == (3, 0.6, decal.__version__)
    assert [n["node"] for n in told["nodes"]] == sorted(set(table.node)) == [0, 1]
    for node in told["nodes"]:
        rows = table[table.node == node["node"]]
        assert rows["rank"].tolist() == [t["rank"] for t in node["tokens"]] == list(range(1, 31))
        endings = [t["completions"][0]["text"] for t in node["tokens"] if t["ends"] and t["valid"]]
        assert rows.valid.sum() == node["valid"] + len(endings) - len(set(endings))
        assert (rows.valid == (rows.valid_completions >= 0.6 * rows.completions)).all()
        for token in node["tokens"]:
            for completion in token["completions"]:
                assert "\n" not in completion["text"]
                assert completion["judgement"]["valid"] is (len(completion["text"]) % 2 == 1)
    assert told["nodes"][1]["prefix"] == [told["nodes"][0]["tokens"][int(np.argmax(table[table.node == 0].valid))]["token"]]

    page = Text()
    page.feed((out / "report.html").read_text())
    assert Counter(page.kinds) == Counter({True: "valid", False: "invalid"}[v] for v in table.valid)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert page.tags["b"] == page.tags["script"] == 0
    assert page.titles[0].startswith("rank 1, probability ")

    before = (out / probe.JUDGED).read_bytes()
    assert run(*command)[0] == 0
    assert (out / probe.JUDGED).read_bytes() == before

    labels = tmp_path / "labels.jsonl"
    labels.write_bytes(before)
    code, text, error = run("agreement", labels, out / probe.JUDGED)
    assert code == 0, error
    assert re.search(r"accuracy +1\.000", text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--judge", "jsn"], "no judge 'jsn'"),
        (["--judge", "no_such_file.py:f"], "no such file"),
        (["--judge", "openai:m@ftp://h"], "must be like https://host/v1"),
        (["--judge", "json", "--threshold", "11"], "threshold must be in [1, 10]"),
        (["--judge", "json", "--ranks", "0-5"], "ranks begin at 1"),
        (["--judge", "json", "--depth", "0"], "depth must be at least 1"),
        (["--judge", "json", "--share", "2"], "share must be in (0, 1]"),
        (["--judge", "json", "--completions", "3", "--sampler", "min_p(2)"], "min_p"),
        (["--judge", "json"], "no model"),
        ([], "Missing option '--judge'"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    arguments: list[str], told: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECAL_OFFLINE", "1")
    code, _, error = run("probe", "x", "--model", "no-such-model.gguf", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert told in error
    assert error.count("\n") == 1


def test_a_page_of_wicked_texts(tmp_path: Path) -> None:
    wicked = "<script>alert('x')</script>\" onload=$x$ \u202e"
    token = probe.Swept(
        1, wicked, 1, 0.0, 1.0, False, (probe.Completion(wicked, False, Judgement(None, {}, f"refused: {wicked}")),), None
    )
    good = probe.Swept(2, "$$", 2, -1.0, 0.5, False, (probe.Completion(wicked, True, Judgement(True)),), True)
    nodes = probe.Node(0, (), "", (token,)), probe.Node(1, (3,), wicked, (token, good))
    about = {"decal": "0", "created": "now", "model": {"name": wicked, "note": wicked}, "judge": wicked}
    probe_report.write(probe.Tree(wicked, plan(), "j", nodes, about), tmp_path)
    page = Text()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags["script"] == 0
    assert page.kinds == ["unknown", "unknown", "valid"]
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert json.loads((tmp_path / "tree.json").read_text())["nodes"][0]["average_precision"] is None
    assert pd.read_parquet(tmp_path / "tokens.parquet").valid.isna().tolist() == [True, True, False]


def test_judges_of_the_library_in_a_tree(model: LoadedModel, tmp_path: Path) -> None:
    digits = judge.parse(r"regex:[0-9 +]+")
    found = probe.probe(model, digits, PROMPT, plan(depth=1, most=1), tmp_path)
    for token in found.nodes[0].tokens:
        (one,) = token.completions
        assert token.valid is (re.fullmatch("[0-9 +]+", one.text.strip()) is not None)


def test_a_probe_that_finds_nothing_says_why(model: LoadedModel, tmp_path: Path) -> None:
    def hint(verdict: bool, ended: bool) -> str:
        judge_ = Rule(lambda text: verdict, f"always {verdict}")
        found = probe.probe(model, judge_, PROMPT, plan(ranks=(1, 2), depth=1), tmp_path / f"{verdict} {ended}")
        nodes = []
        for node in found.nodes:
            completed = [[replace(c, ended=ended) for c in token.completions] for token in node.tokens]
            tokens = [replace(t, completions=tuple(some)) for t, some in zip(node.tokens, completed, strict=True)]
            nodes.append(replace(node, tokens=tuple(tokens)))
        return probe_report.hint(replace(found, nodes=nodes))

    assert hint(False, ended=False).startswith("Every completion was cut off: raise --max-new-tokens")
    assert hint(False, ended=True).startswith("Nothing is valid. The judge is given what the model writes behind")
    assert hint(True, ended=True) == ""
