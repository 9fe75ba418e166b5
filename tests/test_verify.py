"""`decal verify` on an engine in miniature that does what a chain says, or something else beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from replay import CHAINS, law, row
from tiny import byte_level
from torch import Tensor

import decal
from decal import DecalError
from decal.serving.engine import Written
from decal.serving.request import Request
from decal.serving.verify import _differing, _early, _flips, describe, verify

PROMPTS = ["ab", "c", "ddd", "e f", "xyz!"]


class Miniature:
    """Draws from ``before | chain | after`` on rows that are a function of the text.

    Args:
        before, after: texts of chains that it applies too.
        drops: whether it forgets the chain.
        tells: whether it tells its laws.
        blind: whether it ignores seeds.
    """

    name, version, takes_seeds = "miniature", "1.0", True

    def __init__(
        self, before: str = "", after: str = "", drops: bool = False, tells: bool = True, blind: bool = False, seed: int = 5
    ):
        self.before, self.after, self.drops, self.tells, self.blind = before, after, drops, tells, blind
        self.tokenizer = byte_level()
        self.vocabulary = len(self.tokenizer)
        self._generator = torch.Generator().manual_seed(seed)

    def row(self, text: Sequence[int]) -> Tensor:
        return row(text, self.vocabulary)

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        return torch.cat([self.row(text) for text in texts])

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        written = []
        for prompt in prompts:
            request = Request.of({k: v for k, v in asked.items() if not (self.blind and k == "decal_seed")})
            assert request is not None
            request = request.given(self.tokenizer)
            output: list[int] = []
            rows = []
            for _ in range(length):
                scores = self.scores(request, prompt, output)
                rows.append(scores)
                output.append(int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator)))
            written.append(Written(output, torch.cat(rows) if laws and self.tells else None))
        return written

    def scores(self, request: Request, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        text = [*prompt, *output]
        if self.drops:
            return self.row(text)

        def rows(text: Sequence[int]) -> Tensor:
            return self.own(self.before, self.row(text), text)

        return self.own(self.after, law(request, prompt, output, request.seed or 0, rows), text)

    @staticmethod
    def own(chain: str, scores: Tensor, text: Sequence[int]) -> Tensor:
        return decal.parse(chain)(scores, history=decal.History.of([list(text)]), check=False) if chain else scores

    def notes(self) -> list[str]:
        return ["a note"]

    def close(self) -> None:
        pass


def one(engine: Miniature, chain: str, **kwargs: Any) -> Any:
    report = verify(engine, [chain], PROMPTS, **{"generations": 10, "length": 4, "draws": 60, **kwargs})
    assert (report.engine, report.version, report.notes) == ("miniature", "1.0", ("a note",))
    json.dumps(report.as_json(), allow_nan=False)
    return report.findings[0]


@pytest.mark.parametrize("chain", [*CHAINS, "guided(1.0)", "guided(0.3) | temperature(2)"])
def test_an_engine_that_does_what_the_chain_says_passes(chain: str):
    finding = one(Miniature(), chain, answers=["ab", "abc", "b"], length=2)
    assert finding.ok, str(finding)
    assert finding.seeded == finding.same > 0
    assert not finding.interference
    if "xtc" not in chain:
        assert (finding.generations, finding.steps) == (10, 20)
        assert finding.drawn == 300


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"drops": True}, "the chain isn't applied"),
        ({"after": "temperature(0)"}, "a temperature of 0"),
        ({"after": "temperature(0.7)"}, r"a further temperature\(0\.7\)"),
        ({"after": "temperature(1.5)"}, r"a further temperature\(1\.5\)"),
        ({"after": "top_k(5)"}, r"a further cut beside the chain: .*top_k\(5\)"),
        ({"after": "top_p(0.6)"}, r"a further cut beside the chain: top_p\(0\.6"),
        ({"after": "min_p(0.2)"}, r"a further cut beside the chain: min_p\(0\.2"),
        ({"after": "temperature(0.5) | top_k(4)"}, r"a further temperature\(0\.5\)"),
        ({"before": "repetition_penalty(1.5)"}, "a penalty on tokens of the text"),
    ],
)
def test_what_interferes_is_named(engine: dict[str, Any], words: str):
    finding = one(Miniature(**engine), "temperature(1.5)", generations=20, draws=0)
    assert not finding.ok
    assert not finding.laws_agree
    assert any(re.search(words, line) for line in finding.interference), finding.interference


def test_both_a_temperature_and_a_cut_are_named():
    finding = one(Miniature(after="temperature(0.5) | min_p(0.1)"), "temperature(1.5)", generations=20, draws=0)
    assert [line.split("(")[0] for line in finding.interference][:1] == ["a further temperature"]
    assert any("min_p(0.1" in line and "after the temperature" in line for line in finding.interference)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"drops": True}, "the chain isn't applied"),
        ({"after": "top_k(10)"}, r"a further top_k\(10\)"),
        ({"after": "temperature(0.5)"}, r"a further temperature\(0\.5\)"),
    ],
)
def test_what_interferes_is_guessed_from_draws_where_the_engine_doesn_t_tell_its_laws(engine: dict[str, Any], words: str):
    finding = one(Miniature(**engine, tells=False), "temperature(1.5) | top_k(40)", draws=400, length=1)
    assert finding.steps == 0
    assert not finding.frequencies_agree
    assert any(re.search(words, line) for line in finding.interference), finding.interference


def test_draws_of_tokens_that_the_chain_drops_are_counted():
    finding = one(Miniature(drops=True, tells=False), "min_p(0.5)")
    assert finding.impossible > 50
    assert not finding.ok


def test_an_engine_that_ignores_seeds_fails():
    finding = one(Miniature(blind=True), "temperature(1.5)")
    assert finding.laws_agree
    assert finding.frequencies_agree
    assert not finding.seeds_agree
    assert not finding.ok


def test_rounding_at_the_cut_is_told_apart_from_a_wrong_cut():
    class Rounding(Miniature):
        """Its logits are those it tells, but for a little."""

        little = 1e-3

        def scores(self, request: Request, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
            def rows(text: Sequence[int]) -> Tensor:
                cut = self.row(text).topk(20).values[0, -1]
                # The last token kept is a little lower than told, the first dropped a little higher.
                return torch.where(self.row(text) >= cut, self.row(text) - self.little, self.row(text))

            return law(request, prompt, output, request.seed or 0, rows)

    class Tight(Rounding):
        """A row in which a token stands at the threshold of min_p, far from all others."""

        def row(self, text: Sequence[int]) -> Tensor:
            z = torch.full((1, self.vocabulary), -20.0)
            z[0, :3] = torch.tensor([0.0, -1.0, float(torch.tensor(0.1).log()) + 1e-5])
            return z

        def scores(self, request: Request, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
            z = self.row([])
            z[0, 2] -= 3e-5 if request.seed is None else 0
            return law(request, prompt, output, request.seed or 0, lambda text: z)

    assert one(Rounding(), "top_k(20)", draws=0).laws_agree
    tight = one(Tight(), "min_p(0.1)", draws=400)
    assert tight.laws_agree
    assert tight.frequencies_agree
    assert tight.near == tight.steps == 40


def test_a_ban_that_is_not_followed_is_no_rounding():
    class Dense(Miniature):
        """Logits so close to one another that each has a neighbour within rounding."""

        def row(self, text: Sequence[int]) -> Tensor:
            return super().row(text) * 1e-3

    finding = one(Dense(drops=True), "no_repeat_ngram(1)", draws=0)
    assert len(finding.differing) > 40
    assert not finding.laws_agree


def test_a_refusal_is_told_with_the_engine_s_words():
    class Refusing(Miniature):
        def write(self, *args: Any) -> list[Written]:
            raise DecalError("temperature=0.7 (send 1)")

    finding = one(Refusing(), "min_p(0.1)")
    assert finding.refused == "temperature=0.7 (send 1)"
    assert not finding.ok


def test_an_engine_that_takes_no_seeds_is_asked_for_none():
    class Own(Miniature):
        takes_seeds = False

        def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
            assert "decal_seed" not in asked
            return super().write(prompts, asked, length, laws)

    finding = one(Own(), "min_p(0.1)")
    assert finding.ok
    assert (finding.seeded, finding.steps) == (0, 40)


def test_a_mass_that_float32_loses_is_rounding_and_more_is_not():
    """Of 200,000 tokens of 5e-10 each a sum in float32, from the top, counts none."""
    head = [0.3, 0.2, 0.2, 0.19995]
    for lost, near in ((1e-4, True), (1e-3, False)):
        rest = 0.98 ** torch.arange(100, dtype=torch.float64)
        rest *= (1 - sum(head) - lost) / rest.sum()
        probabilities = torch.tensor([*head, *rest.tolist(), *[lost / 200_000] * 200_000], dtype=torch.float64)
        row = probabilities.log()[None]
        chain = decal.parse(f"top_p({sum(head) + lost / 2})")
        assert chain(row)[0, 4].isfinite()
        # Counted without the tail, four reach the mass, by as much as was lost.
        assert sum(head) / (1 - lost) > sum(head) + lost / 2
        assert _flips(row, 4, True, lambda z, early=False, chain=chain: (_early(chain) if early else chain)(z)) == near


@pytest.mark.parametrize(
    ("chain", "wrong"),
    [
        ("top_n_sigma(1.0)", "top_n_sigma(0.97)"),
        ("temperature(2) | top_p(0.3)", "temperature(2) | top_p(0.299)"),
        ("top_p(0.9)", "top_p(0.899)"),
        ("top_k(50)", "top_k(45)"),
        ("typical(0.9)", "typical(0.899)"),
    ],
)
def test_a_cut_a_little_off_is_no_rounding(chain: str, wrong: str):
    """On rows of a large vocabulary, whose tail weighs little and is most of the tokens."""
    right, other = decal.parse(chain), decal.parse(wrong)
    row = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3

    def there(z: Tensor, early: bool = False) -> Tensor:
        return (_early(right) if early else right)(z)

    found = _differing(0, 0, row, right(row).log_softmax(-1)[0], other(row).log_softmax(-1)[0], there)
    assert sum(not one.near for one in found) >= 3
    assert not _differing(0, 0, row, right(row).log_softmax(-1)[0], right(row).log_softmax(-1)[0], there)


def test_tokens_too_improbable_for_float32_may_be_left_out():
    chain = decal.parse("temperature(0.1)")
    row = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    law = chain(row).log_softmax(-1)[0]
    told = law.float().exp().double().log()
    assert told.isfinite().sum() < 900
    assert not _differing(0, 0, row, law, told, lambda z, early=False: chain(z))
    # One that could be drawn may not.
    assert _differing(
        0,
        0,
        row,
        law,
        told.masked_fill(told.argsort(descending=True).argsort() == 1, -torch.inf),
        lambda z, early=False: chain(z),
    )


def test_rows_may_come_from_elsewhere():
    class Silent(Miniature):
        def rows(self, texts: Sequence[Sequence[int]]) -> Any:
            return None

    engine = Silent(tells=False)
    with pytest.raises(DecalError, match="miniature doesn't tell what its model gives"):
        one(engine, "min_p(0.1)")
    assert one(engine, "min_p(0.1)", rows=Miniature().rows).ok


def test_right_engines_seldom_count_as_wrong():
    values = [one(Miniature(tells=False, seed=s), "temperature(1.2)", draws=100, length=1).p for s in range(5)]
    assert len(set(values)) == 5
    assert all(0.001 < p < 0.999 for p in values)


def test_where_the_chain_does_nothing_nothing_is_shown():
    finding = one(Miniature(drops=True), "repetition_penalty(1.5)", draws=0, generations=0, length=0)
    assert finding.agrees
    assert not finding.ok
    assert "nothing is shown" in describe(finding)
    finding = one(Miniature(), "temperature(1.0)")
    assert finding.agrees
    assert finding.telling == 0
    assert not finding.ok


def test_an_engine_that_writes_nothing_is_no_right_one():
    class Mute(Miniature):
        def write(self, prompts: Sequence[Sequence[int]], *rest: Any) -> list[Written]:
            return [Written([], None) for _ in prompts]

    report = verify(Mute(), ["min_p(0.1)", "top_k(3)"], PROMPTS, draws=5)
    assert ["wrote nothing" in finding.refused for finding in report.findings] == [True, True]
    assert not verify(Mute(), ["min_p(0.1)"], PROMPTS, draws=0).ok
