"""Exactness: the evaluator against enumeration of every sequence, and its fast path against the plain one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import tiny
import torch
from tiny import Steps
from torch import Tensor

import decal
from decal import Affine
from decal.eval import exact, forward, grid
from decal.samplers.context import Weights
from decal.samplers.guided import Guide
from decal.samplers.testing import SomeViews
from decal.samplers.trie import TokenTrie

CHAINS: list[Steps] = [
    [("temperature", 1.0)],
    [("temperature", 0.3)],
    [("temperature", 2.5)],
    [("temperature", 0)],
    [("top_k", 3)],
    [("top_k", 1)],
    [("top_p", 0.7), ("temperature", 1.5)],
    [("temperature", 1.5), ("top_p", 0.7)],
    [("min_p", 0.2), ("temperature", 2.0)],
    [("temperature", 2.0), ("min_p", 0.2)],
    [("top_n_sigma", 0.8), ("temperature", 0.5)],
    [("temperature", 0.5), ("top_n_sigma", 0.8)],
    [("epsilon", 0.08)],
    [("temperature", 1.7), ("epsilon", 0.08)],
    [("eta", 0.1)],
    [("temperature", 0.6), ("eta", 0.1)],
    [("top_a", 0.3)],
    [("top_a", 0.3), ("flatten", 0.5)],
    [("p_less", 1.0)],
    [("p_less", 0.5), ("temperature", 3.0)],
    [("typical", 0.5)],
    [("typical", 0.3), ("temperature", 0.02)],
    [("temperature", 0.1), ("typical", 0.4)],
    [("typical", 0.3), ("temperature", 0)],
    [("typical", 0.6), ("top_p", 0.5), ("temperature", 0.05)],
    [("typical", 0.4), ("eta", 0.2), ("flatten", 0.7)],
    [("top_k", 5), ("flatten", 1)],
    [("flatten", 1), ("top_k", 3)],
    [("temperature", 0), ("flatten", 1)],
    [("temperature", 0), ("top_p", 0.5)],
    [("temperature", 2), ("flatten", 0.4), ("top_p", 0.8), ("temperature", 0.7), ("min_p", 0.05)],
    [("top_p", 1.0), ("min_p", 0.0), ("temperature", 1.3)],
]


def expected_diversity(answers: np.ndarray) -> float:
    """Effective number of answers by their share of the valid mass, over their number."""
    share = answers / answers.sum()
    return math.exp(-sum(p * math.log(p) for p in share if p > 0)) / len(answers)


class Enumeration:
    """Every sequence of ``depth`` + 1 tokens of a model, with an ordinary forward pass for each."""

    def __init__(self, model: torch.nn.Module, prompt: list[int], vocabulary: int, depth: int):
        self.vocabulary, self.depth = vocabulary, depth
        sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=depth)))
        with torch.inference_mode():
            ids = torch.cat([torch.tensor([prompt]).expand(len(sequences), -1), sequences], 1)
            logits = model(input_ids=ids).logits[:, len(prompt) - 1 :]
        values = logits.numpy()
        self.rows = [values[:: vocabulary ** (depth - length), length] for length in range(depth + 1)]

    def law(self, steps: Steps) -> np.ndarray:
        """Probability of every sequence, in the order of itertools.product."""
        law = np.ones(1)
        for rows in self.rows:
            law = (law[:, None] * np.stack([tiny.sample_law(row, steps) for row in rows])).ravel()
        return law

    def answers(self, answers: list[tuple[int, ...]], ends: tuple[int, ...]) -> np.ndarray:
        """For every sequence the number of the answer it writes, or -1."""
        number = {answer: i for i, answer in enumerate(answers)}
        return np.array(
            [self._answer(s, number, ends) for s in itertools.product(range(self.vocabulary), repeat=self.depth + 1)]
        )

    @staticmethod
    def _answer(sequence: tuple[int, ...], number: dict[tuple[int, ...], int], ends: tuple[int, ...]) -> int:
        for length, token in enumerate(sequence):
            if ends and token in ends:
                return number.get(sequence[:length], -1)
            if not ends and sequence[: length + 1] in number:
                return number[sequence[: length + 1]]
        return -1


def rows_of(model: torch.nn.Module, prompt: list[int], trie: TokenTrie) -> list[tuple[list[int], Tensor]]:
    rows: list[tuple[list[int], Tensor]] = []
    assert forward.collect(model, prompt, trie, lambda nodes, logits: rows.append((list(nodes), logits.clone())))
    return rows


@pytest.mark.parametrize(
    ("seed", "vocabulary", "depth", "ends", "spread"),
    [(0, 10, 3, (0,), 0.6), (1, 12, 2, (3, 7), 0.6), (2, 8, 3, (1,), 1.0), (3, 16, 2, (5,), 0.3)],
)
def test_equals_enumeration_of_every_sequence(
    seed: int, vocabulary: int, depth: int, ends: tuple[int, ...], spread: float
) -> None:
    rng = np.random.default_rng(seed)
    model = tiny.llama(vocabulary, seed=seed, spread=spread)
    prompt = rng.integers(0, vocabulary, 4).tolist()
    answers = tiny.random_answers(rng, [t for t in range(vocabulary) if t not in ends], depth, 20)
    trie = tiny.trie_of(answers, ends)
    assert any(a != b and a == b[: len(a)] for a in answers for b in answers), "want answers that begin with another"
    result = exact.evaluate(trie, rows_of(model, prompt, trie), [decal.parse(tiny.text_of(steps)) for steps in CHAINS])
    enumeration = Enumeration(model, prompt, vocabulary, depth)
    written = enumeration.answers(answers, ends)
    for number, steps in enumerate(CHAINS):
        law = enumeration.law(steps)
        assert law.sum() == pytest.approx(1, abs=1e-12)
        expected = np.array([law[written == a].sum() for a in range(len(answers))])
        np.testing.assert_allclose(result.answers[number], expected, rtol=0, atol=1e-9, err_msg=tiny.text_of(steps))
        assert abs(result.validity[number] - expected.sum()) < 1e-9
        if expected.sum() > 0:
            assert abs(result.diversity[number] - expected_diversity(expected)) < 1e-9, tiny.text_of(steps)
        else:
            assert math.isnan(result.diversity[number])


def test_equals_enumeration_where_an_answer_counts_as_soon_as_it_is_written() -> None:
    answers = [(1,), (2, 3), (2, 4, 5), (2, 4, 6), (7, 1)]
    model, prompt = tiny.llama(9), [3, 4, 5]
    trie = tiny.trie_of(answers)
    result = exact.evaluate(trie, rows_of(model, prompt, trie), [decal.parse(tiny.text_of(steps)) for steps in CHAINS])
    enumeration = Enumeration(model, prompt, 9, 2)
    written = enumeration.answers(answers, ())
    for number, steps in enumerate(CHAINS):
        law = enumeration.law(steps)
        expected = np.array([law[written == a].sum() for a in range(len(answers))])
        np.testing.assert_allclose(result.answers[number], expected, rtol=0, atol=1e-9, err_msg=tiny.text_of(steps))


def path_law(trie: TokenTrie, logits: Tensor, steps: Steps) -> np.ndarray:
    """Probability of every answer from rows taken as given, one path at a time."""
    law = {n: tiny.sample_law(logits[n].double().numpy(), steps) for n in range(len(trie)) if forward.needed(trie, n)}
    found = np.zeros(trie.size)
    for node, answer in enumerate(trie.answer):
        if answer < 0:
            continue
        mass = law[node][list(trie.ends)].sum() if trie.ends else 1.0
        here = node
        while here:
            mass *= law[trie.parent[here]][trie.token[here]]
            here = trie.parent[here]
        found[answer] += mass
    return found


@pytest.mark.parametrize("seed", range(12))
def test_equals_products_along_the_paths_of_given_rows(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    vocabulary = int(rng.integers(8, 17))
    ends = tuple(int(e) for e in rng.choice(vocabulary, int(rng.integers(1, 3)), replace=False))
    alphabet = [t for t in range(vocabulary) if t not in ends]
    trie = tiny.trie_of(tiny.random_answers(rng, alphabet, 4, int(rng.integers(1, 30))), ends)
    logits = tiny.random_rows(rng, trie, vocabulary, spread=float(rng.choice([0.5, 2.0, 8.0])))
    if seed % 3 == 0:  # tokens that don't exist
        logits[torch.from_numpy(rng.random(logits.shape) < 0.2)] = -torch.inf
        logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
    result = exact.evaluate(trie, tiny.blocks(logits), [decal.parse(tiny.text_of(steps)) for steps in CHAINS])
    for number, steps in enumerate(CHAINS):
        np.testing.assert_allclose(
            result.answers[number], path_law(trie, logits, steps), rtol=0, atol=1e-9, err_msg=tiny.text_of(steps)
        )


@pytest.mark.parametrize(
    "after",
    [
        [("temperature", 0.02)],
        [("temperature", 0.005), ("top_p", 0.9)],
        [("temperature", 0.01), ("typical", 0.5)],
        [("temperature", 0.02), ("p_less", 1.0), ("temperature", 3.0)],
        [("temperature", 0.01), ("eta", 0.2), ("flatten", 0.5)],
        [("temperature", 0.02), ("top_n_sigma", 0.7)],
        [("temperature", 0)],
    ],
    ids=tiny.text_of,
)
def test_an_isolated_band_keeps_its_digits(after: Steps) -> None:
    # Typical drops the one token that has half of the mass; at a low temperature that would be all but 1e-80 of it.
    p = np.array([0.5, 0.0100, 0.0097, 0.0094, 0.0091, *np.full(3000, 0.4618 / 3000)])
    logits = torch.from_numpy(np.log(p).astype(np.float32))
    steps = [("typical", 0.035), *after]
    expected = tiny.sample_law(logits.double().numpy(), steps)
    assert expected[0] == 0
    assert expected[1:5].sum() == pytest.approx(1)
    trie = tiny.trie_of([(i,) for i in range(12)])
    result = exact.evaluate(trie, [([0], logits[None])], [decal.parse(tiny.text_of(steps))])
    np.testing.assert_allclose(result.answers[0], expected[:12], rtol=1e-9, atol=1e-12)


def adversarial(vocabulary: int) -> Tensor:
    """Float32 rows with ties, flat stretches, extremes and dead tokens."""
    rng = np.random.default_rng(vocabulary)
    spike = np.zeros(vocabulary)
    spike[vocabulary // 2] = 40.0
    half_dead = rng.normal(0, 3, vocabulary)
    half_dead[: vocabulary // 2] = -np.inf
    only_one = np.full(vocabulary, -np.inf)
    only_one[-1] = -5.0
    rows = [
        np.zeros(vocabulary),
        np.full(vocabulary, -1e4),
        rng.integers(-3, 3, vocabulary).astype(float),  # many ties
        spike,
        -spike,
        half_dead,
        only_one,
        np.linspace(-80, 80, vocabulary),
        rng.normal(0, 1, vocabulary) + 1000,  # a large offset
        8 - 2.2 * np.log1p(np.arange(vocabulary)) + rng.normal(0, 0.3, vocabulary),  # Zipf, as models have it
        np.sort(rng.standard_cauchy(vocabulary).clip(-300, 300)),
    ]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def star(logits: Tensor) -> tuple[TokenTrie, list[tuple[list[int], Tensor]]]:
    """A trie of which the root and its first children have these rows (n, V), and many next tokens of each are answers."""
    count, vocabulary = logits.shape
    step = max(1, vocabulary // 60)
    heads = range(count - 1)
    below = [(head, token) for head in heads for token in range(0, vocabulary, step)]
    trie = tiny.trie_of([*below, *((token,) for token in range(count - 1, vocabulary, step))])
    return trie, [([0, *(trie.children[0][head] for head in heads)], logits)]


BIG_CHAINS = [
    *(tiny.text_of(steps) for steps in CHAINS),
    "top_k(50) | temperature(1.4)",
    "top_p(0.95) | top_k(10) | temperature(0.2)",
    "temperature(0.01) | top_p(0.99)",
    "typical(0.9) | temperature(0.01)",
    "typical(0.1) | typical(0.5)",
    "typical(0.5) | p_less(1) | temperature(2)",
    "typical(0.95) | top_n_sigma(1) | flatten(1)",
    "min_p(0.5) | flatten(0.9)",
    "temperature(3) | top_a(0.2) | eta(0.01)",
    "epsilon(0.0009) | typical(0.2) | temperature(0.3)",
]


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17, 300, 5000])
def test_sorted_rows_give_what_full_passes_give(vocabulary: int) -> None:
    # In float64 a full pass doesn't round its answer; the values are those of float32 all the same.
    logits = adversarial(vocabulary).double()
    if vocabulary < 17:  # each row on its own: all tokens of it are answers
        cases = [(tiny.trie_of([(t,) for t in range(vocabulary)]), [([0], row[None])]) for row in logits]
    else:
        cases = [star(logits)]
    chains = [decal.parse(text) for text in BIG_CHAINS]
    groups = exact.group(chains)
    for trie, rows in cases:
        fast = exact.flows(trie, rows, groups, len(chains))
        plain = exact.dense_flow(trie, rows, chains)
        assert (plain.arrive[:, rows[0][0][-1]] > 0).any()
        for name in ("arrive", "end", "stray"):
            a, b = getattr(fast, name), getattr(plain, name)
            worst = int((a - b).abs().amax(-1).argmax())
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m, w=worst: f"{BIG_CHAINS[w]}: {m}")


def test_sorted_rows_give_what_full_passes_give_on_the_quick_grid() -> None:
    rng = np.random.default_rng(5)
    chains = [setting.chain for setting in grid.load("quick") if not setting.chain.needs][::7]
    zipf = 10 - 1.8 * np.log1p(np.arange(2000)) + rng.normal(0, 0.5, (6, 2000))
    trie, rows = star(torch.from_numpy(rng.permuted(zipf, axis=1).astype(np.float32)).double())
    groups = exact.group(chains)
    fast = exact.flows(trie, rows, groups, len(chains)).arrive
    torch.testing.assert_close(fast, exact.dense_flow(trie, rows, chains).arrive, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_in_lower_precision_mean_the_values_they_hold(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    trie = tiny.trie_of(tiny.random_answers(rng, range(1, 12), 3, 10), (0,))
    logits = tiny.random_rows(rng, trie, 12).to(dtype)
    chains = [decal.parse(tiny.text_of(steps)) for steps in CHAINS[::3]]
    narrow, wide = (exact.evaluate(trie, tiny.blocks(part), chains).answers for part in (logits, logits.double()))
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_rows_that_are_missing_or_given_twice(change: str) -> None:
    trie = tiny.trie_of([(1, 2), (3,)], (0,))
    rows = tiny.blocks(torch.zeros(len(trie), 5), 1)
    rows = rows[:-1] if change == "missing" else [*rows, rows[1]]
    message = "rows: 1 of 4 nodes are missing, such as 3" if change == "missing" else "rows: node 1 is given twice"
    with pytest.raises(decal.DecalError, match=message):
        exact.evaluate(trie, rows, [decal.parse("top_k(2)")])
    with pytest.raises(decal.DecalError, match=message):
        exact.dense_flow(trie, rows, [decal.parse("top_k(2)")])


def test_blocks_and_memory_limit_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    trie = tiny.trie_of(tiny.random_answers(rng, range(1, 12), 3, 10), (0,))
    logits = tiny.random_rows(rng, trie, 12)
    chains = [decal.parse(tiny.text_of(steps)) for steps in CHAINS[::3]]
    whole = exact.evaluate(trie, [(list(range(len(trie))), logits)], chains)
    order = rng.permutation(len(trie)).tolist()
    shuffled = [(order[i : i + 3], logits[order[i : i + 3]]) for i in range(0, len(order), 3)]
    monkeypatch.setattr(exact, "MEMORY", 1)
    np.testing.assert_allclose(exact.evaluate(trie, shuffled, chains).answers, whole.answers, rtol=0, atol=1e-12)


def test_several_token_sequences_of_an_answer_add_up() -> None:
    trie = TokenTrie(2, (0,))
    trie.insert([1, 2], 0)
    trie.insert([3], 0, weight=0)
    trie.insert([2], 1)
    trie.strays[1] = (4, 5)
    logits = tiny.random_rows(np.random.default_rng(1), trie, 6)
    result = exact.evaluate(trie, tiny.blocks(logits), [decal.parse("temperature(1.0)")])
    p = [tiny.softmax(row.double().numpy()) for row in logits]
    one, two, three, other = trie.children[0][1], 2, trie.children[0][3], trie.children[0][2]
    expected = [p[0][1] * p[one][2] * p[two][0] + p[0][3] * p[three][0], p[0][2] * p[other][0]]
    np.testing.assert_allclose(result.answers[0], expected, rtol=1e-12)
    assert result.slack[0] == pytest.approx(p[0][1] * (p[one][4] + p[one][5]), rel=1e-12)


def test_diversity_by_hand() -> None:
    answers = np.array([[0.25, 0.25, 0, 0], [0.1, 0.1, 0.1, 0.1], [0.3, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    np.testing.assert_allclose(exact.diversity(answers), [0.5, 1.0, 0.25, np.nan, 2**1.5 / 4], rtol=1e-12)


def test_diversity_stays_in_its_range() -> None:
    for size in range(1, 200):
        even, single = np.full((1, size), 1 / size), np.eye(1, size)
        assert 1 - 1e-12 < exact.diversity(even)[0] <= 1, size
        assert exact.diversity(single)[0] == 1 / size


def test_validity_zero_gives_no_diversity() -> None:
    trie = tiny.trie_of([(1,)], (0,))
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0]])
    result = exact.evaluate(trie, tiny.blocks(logits), [decal.parse("temperature(1.0)")])
    assert result.validity[0] == 0
    assert np.isnan(result.diversity[0])


def test_per_row_parameters_are_refused() -> None:
    with pytest.raises(decal.DecalError, match="one value per parameter"):
        exact.group([decal.parse("temperature([1, 2])")])


@pytest.fixture
def own_rule() -> Iterator[Callable[[Callable[..., Affine]], decal.Rule]]:
    """Declares a rule that is gone after the test."""
    declared: list[str] = []

    def declare(body: Callable[..., Affine]) -> decal.Rule:
        made = decal.rule(paper="none")(body)
        declared.append(made.name)
        return made

    yield declare
    for name in declared:
        del decal.RULES[name]


AMOUNT = decal.Param(0.5, low=0, high=9, off=0.0)


def by_entropy(row: decal.samplers.row.Row, a: Tensor = AMOUNT) -> Affine:
    """Cool a row the more, the higher its entropy."""
    return Affine(1 + a * row.entropy, torch.zeros_like(row.max))


def by_count(row: decal.samplers.row.Row, a: Tensor = AMOUNT) -> Affine:
    """Cool a row the more, the more tokens are left."""
    return Affine(1 + a * torch.log(row.count), torch.zeros_like(row.max))


def if_uncertain(row: decal.samplers.row.Row, a: Tensor = AMOUNT) -> Affine:
    """Cool the rows of high entropy only."""
    return Affine(torch.where(row.entropy > 1.5, 1 + a, 1.0), torch.zeros_like(row.max))


def _own_factor(name: str, z: np.ndarray, a: float) -> float:
    p = tiny.softmax(z)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    return {"by_entropy": 1 + a * entropy, "by_count": 1 + a * np.log((p > 0).sum()), "if_uncertain": 1 + a * (entropy > 1.5)}[
        name
    ]


@pytest.mark.parametrize("body", [by_entropy, by_count, if_uncertain], ids=lambda body: body.__name__)
def test_a_rule_that_scales_each_row_differently_is_evaluated_right(
    body: Callable[..., Affine], own_rule: Callable[..., decal.Rule]
) -> None:
    rule = own_rule(body)
    rng = np.random.default_rng(3)
    trie = tiny.trie_of(tiny.random_answers(rng, range(1, 12), 3, 25), (0,))
    logits = tiny.random_rows(rng, trie, 12, spread=1.5)
    plain = decal.parse("temperature(1.5)")
    chains = [plain, rule(0.7), decal.parse("top_p(0.8)") | rule(0.7), plain | rule(0.3) | decal.parse("min_p(0.1)")]
    result = exact.evaluate(trie, tiny.blocks(logits.double()), chains)

    def law(z: np.ndarray, before: Steps, a: float, after: Steps) -> np.ndarray:
        with np.errstate(divide="ignore"):
            z = np.log(tiny.sample_law(z, before))
        return tiny.sample_law(_own_factor(body.__name__, z, a) * z, after)

    nothing = [("temperature", 1.0)]
    cases = [(nothing, 0.7, nothing), ([("top_p", 0.8)], 0.7, nothing), ([("temperature", 1.5)], 0.3, [("min_p", 0.1)])]
    np.testing.assert_allclose(result.answers[0], path_law(trie, logits, [("temperature", 1.5)]), rtol=0, atol=1e-9)
    for number, case in enumerate(cases, 1):
        expected = np.zeros(trie.size)
        for node, answer in enumerate(trie.answer):
            if answer >= 0:
                mass, path = 1.0, [0, *(_node(trie, trie.path(node)[: i + 1]) for i in range(trie.depth[node]))]
                for here, token in zip(path, [*trie.path(node), 0], strict=True):
                    mass *= law(logits[here].double().numpy(), case[0], case[1], case[2])[token]
                expected[answer] += mass
        np.testing.assert_allclose(result.answers[number], expected, rtol=0, atol=1e-9, err_msg=str(chains[number]))


def _node(trie: TokenTrie, path: list[int]) -> int:
    node = 0
    for token in path:
        node = trie.children[node][token]
    return node


# ---- every rule, against the chain itself on whole rows


def texts_of(rule: decal.Rule) -> list[str]:
    """The rule at several values, alone and beside others."""
    values = list(itertools.product(*(p.sweep[::2] or (p.default,) for p in rule.params.values())))
    own = [str(rule(*value)) for value in values]
    around = ["temperature(1.7) | {}", "{} | temperature(0.6)", "min_p(0.05) | {}", "typical(0.6) | {} | top_p(0.9)"]
    return [*own, *(text.format(one) for text in around for one in own[:2])]


VIEWS = SomeViews.of(40, torch.Generator().manual_seed(9))


def replay(trie: TokenTrie, logits: Tensor, chain: decal.Chain, prompt: Sequence[int], weights: Weights | None) -> np.ndarray:
    """Probability of every answer, by one call of the chain for each prefix, from the root on."""
    chain = decal.Chain(chain.steps, weights, Guide(trie), VIEWS, tuple(trie.ends))
    law: dict[int, np.ndarray] = {}
    state = {0: chain.init(1)}
    for node in range(len(trie)):
        history = decal.History.of([[*prompt, *trie.path(node)]], prompt=len(prompt))
        scores, seen = chain.apply(logits[node : node + 1].double(), state[node], history=history)
        law[node] = tiny.softmax(scores[0].numpy())
        for token, child in trie.children[node].items():
            state[child] = chain.observe(state[node], seen, torch.tensor([token]))
    return answers_of(trie, law)


def answers_of(trie: TokenTrie, law: dict[int, np.ndarray]) -> np.ndarray:
    found = np.zeros(trie.size)
    for node, answer in enumerate(trie.answer):
        if answer >= 0:
            mass, here = law[node][list(trie.ends)].sum(), node
            while here:
                mass *= law[trie.parent[here]][trie.token[here]]
                here = trie.parent[here]
            found[answer] += mass
    return found


@pytest.fixture(scope="module")
def problem() -> tuple[TokenTrie, Tensor, list[int], Weights]:
    rng = np.random.default_rng(4)
    trie = tiny.trie_of(tiny.random_answers(rng, range(2, 24), 4, 30), (0, 1))
    logits = tiny.random_rows(rng, trie, 40, spread=2.0)
    logits[::5] = logits[::5].round()  # ties
    logits[::4, 30:] = -torch.inf
    weights = Weights(*torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return trie, logits, [5, 7, 2, 5, 7, 9, 2, 3], weights


@pytest.mark.parametrize("name", sorted(set(decal.RULES) - {"xtc", "basis_aware"}))
def test_every_rule_gives_what_calls_of_the_chain_give(
    name: str, problem: tuple[TokenTrie, Tensor, list[int], Weights]
) -> None:
    trie, logits, prompt, weights = problem
    chains = [decal.parse(text) for text in texts_of(decal.RULES[name])]
    rows = tiny.blocks(logits, 9)
    result = exact.evaluate(trie, rows, chains, exact.Situation(prompt, weights, VIEWS))
    for number, chain in enumerate(chains):
        expected = replay(trie, logits, chain, prompt, weights if "model" in chain.needs else None)
        np.testing.assert_allclose(result.answers[number], expected, rtol=0, atol=1e-9, err_msg=str(chain))


@pytest.mark.parametrize(
    "text", ["xtc(0.02, {})", "temperature(2) | xtc(0.05, {}) | min_p(0.02)", "quadratic(0.2) | xtc(0.03, {})"]
)
@pytest.mark.parametrize("spared", ["", ", spared=(0, 5, 9)"])
def test_coins_fall_both_ways(text: str, spared: str, problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    """The law of a step is the average of what it is with the rule acting and without."""
    trie, logits, prompt, _ = problem
    text = text.replace("{})", "{}" + spared + ")")
    result = exact.evaluate(trie, tiny.blocks(logits), [decal.parse(text.format(0.3))], exact.Situation(prompt))
    law = {}
    for node in range(len(trie)):
        history = decal.History.of([[*prompt, *trie.path(node)]])
        z = logits[node : node + 1].double()
        acting, idle = (decal.parse(text.format(p))(z, history=history)[0].softmax(-1).numpy() for p in (1.0, 0.0))
        law[node] = 0.3 * acting + 0.7 * idle
    np.testing.assert_allclose(result.answers[0], answers_of(trie, law), rtol=0, atol=1e-9)
    assert not np.allclose(
        result.answers[0], exact.evaluate(trie, tiny.blocks(logits), [decal.parse("xtc(0.02, 0)")]).answers[0]
    )


def test_a_rule_with_a_memory_wants_parents_first(problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    trie, logits, prompt, _ = problem
    backwards = [([node], logits[node : node + 1]) for node in reversed(range(len(trie)))]
    with pytest.raises(decal.DecalError, match="came before its parent, which mirostat has to see first"):
        exact.evaluate(trie, backwards, [decal.parse("mirostat(2)")], exact.Situation(prompt))


@pytest.mark.parametrize("cells", [1, 100, 10**9])
def test_how_many_settings_are_written_out_at_a_time_does_not_matter(
    cells: int, problem: tuple[TokenTrie, Tensor, list[int], Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    trie, logits, prompt, _ = problem
    texts = [
        f"min_p({p}) | {rule}" for p in (0.5, 0.05, 0.01) for rule in ("cap(0.2)", "adaptive_p(0.3)", "dry(1)", "mirostat(3)")
    ]
    texts += [f"top_h({a}) | skew({a})" for a in (0.3, 0.5, 0.9)] + ["ees(1) | edt(1, 1)", "ees(0.5) | edt(1, 2)"]
    chains = [decal.parse(text) for text in texts]
    usual = exact.evaluate(trie, tiny.blocks(logits), chains, exact.Situation(prompt)).answers
    monkeypatch.setattr(exact, "CELLS", cells)
    again = exact.evaluate(trie, tiny.blocks(logits, 4), chains, exact.Situation(prompt)).answers
    np.testing.assert_allclose(again, usual, rtol=0, atol=1e-12)


# ---- what an attack on the numbers found


def exact_answers(problem: tuple[TokenTrie, Tensor, list[int], Weights], *texts: str) -> np.ndarray:
    trie, logits, prompt, weights = problem
    chains = [decal.parse(text) for text in texts]
    return exact.evaluate(trie, tiny.blocks(logits, 9), chains, exact.Situation(prompt, weights)).answers


@pytest.mark.parametrize(
    "text", ["repetition_penalty(1.5, form='legacy')", "{} | min_p(0.02)", "top_p(0.99) | {}", "min_p(0) | {}"]
)
def test_a_rule_that_sees_the_level_of_the_logits_sees_the_model_s(
    text: str, problem: tuple[TokenTrie, Tensor, list[int], Weights]
) -> None:
    trie, logits, prompt, weights = problem
    text = text.format("repetition_penalty(1.5, form='legacy')")
    for shift in (0.0, 7.0):
        moved = (trie, logits + shift, prompt, weights)
        expected = replay(trie, logits + shift, decal.parse(text), prompt, None)
        np.testing.assert_allclose(exact_answers(moved, text)[0], expected, rtol=0, atol=1e-6)


def test_a_coin_that_never_falls_changes_nothing(problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    texts = [
        f"{before}xtc(0.05, {p}){after}"
        for p in (0.0, 1.0)
        for before in ("", "quadratic(0.2) | ")
        for after in ("", " | top_k(9)")
    ]
    together = exact_answers(problem, *texts, "quadratic(0.2) | xtc(0.05, 0.5)")
    for text, found in zip(texts, together, strict=False):
        trie, logits, prompt, _ = problem
        np.testing.assert_allclose(
            found, replay(trie, logits, decal.parse(text), prompt, None), rtol=0, atol=1e-9, err_msg=text
        )


@pytest.mark.parametrize("text", ["xtc(0.03, 1) | {}", "{} | xtc(0.03, 1)"])
@pytest.mark.parametrize("other", ["dry(0.8)", "no_repeat_ngram(2)", "repetition_penalty(1.4)", "mirostat(3, version='1')"])
def test_a_coin_beside_a_rule_of_the_text(text: str, other: str, problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    trie, logits, prompt, _ = problem
    text = text.format(other)
    if text.endswith("'1')"):
        with pytest.raises(decal.DecalError, match="remembers depends on the coins of xtc"):
            exact_answers(problem, text)
        return
    expected = replay(trie, logits, decal.parse(text), prompt, None)
    np.testing.assert_allclose(exact_answers(problem, text)[0], expected, rtol=0, atol=1e-9)


def test_two_coins_are_two(problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    """Independent in the evaluator, and in the sampler with equal seeds too."""
    trie, logits, prompt, _ = problem
    law = {}
    for node in range(len(trie)):
        history = decal.History.of([[*prompt, *trie.path(node)]])
        z = logits[node : node + 1].double()
        parts = [
            0.4 ** (a + b)
            * 0.6 ** (2 - a - b)
            * decal.parse(f"xtc(0.05, {a}) | xtc(0.02, {b})")(z, history=history).softmax(-1)
            for a in (0, 1)
            for b in (0, 1)
        ]
        law[node] = sum(parts)[0].numpy()
    found = exact_answers(problem, "xtc(0.05, 0.4) | xtc(0.02, 0.4)")[0]
    np.testing.assert_allclose(found, answers_of(trie, law), rtol=0, atol=1e-9)
    rows = torch.tensor([[2.0, 1.9, 1.8, 1.7, -3.0]]).expand(4000, -1)
    history = decal.History.of(torch.zeros(4000, 3, dtype=torch.long))
    once, twice = (
        decal.parse(f"xtc(0.1, {p}) | xtc(0.1, 0.5)").mask(rows, history=history)[:, :2].isneginf() for p in (0.0, 0.5)
    )
    assert 0.45 < once[:, 0].double().mean() < 0.55
    assert 0.70 < twice[:, 0].double().mean() < 0.80


def test_counts_beyond_integers(problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    trie, logits, prompt, _ = problem
    for text in (
        "temperature(30) | typical(0.9) | mirostat_k(10)",
        "typical(0.5) | mirostat_k(900)",
        f"typical(0.5) | top_k({10**19})",
    ):
        expected = replay(trie, logits, decal.parse(text), prompt, None)
        np.testing.assert_allclose(exact_answers(problem, text)[0], expected, rtol=0, atol=1e-9, err_msg=text)


@pytest.mark.parametrize(
    "text", ["mirostat(2, version='1')", "top_h(0.5, variant='cumulative')", "l0_bregman(0.01, alpha='2')"]
)
def test_every_word_of_a_rule_alone(text: str, problem: tuple[TokenTrie, Tensor, list[int], Weights]) -> None:
    trie, logits, prompt, _ = problem
    expected = replay(trie, logits, decal.parse(text), prompt, None)
    np.testing.assert_allclose(exact_answers(problem, text)[0], expected, rtol=0, atol=1e-9)


def test_the_evaluator_knows_which_tokens_end_an_answer() -> None:
    """Answer probabilities as products along each path, of a temperature that spares the decision to end."""
    rng = np.random.default_rng(21)
    answers = tiny.random_answers(rng, range(2, 12), 4, 25)
    trie = tiny.trie_of(answers, [0, 1])
    logits = tiny.random_rows(rng, trie, 20, 3.0)
    values = [(3.0, 0.5), (0.4, 1.3), (1.0, 2.0)]
    chains = [decal.parse(f"min_p(0.01) | split_temperature({t}, {end})") for t, end in values]
    found = exact.evaluate(trie, tiny.blocks(logits, 5), chains)
    for number, (t, end) in enumerate(values):
        for i, answer in enumerate(answers):
            p, node = 1.0, 0
            for token in (*answer, None):
                z = logits[node].double().numpy()
                law = tiny.softmax(np.where(z >= z.max() + np.log(0.01), z, -np.inf))
                ending = law[[0, 1]].sum()
                stop = ending ** (1 / end) / (ending ** (1 / end) + (1 - ending) ** (1 / end))
                go = np.where(np.arange(20) < 2, 0, law ** (1 / t))
                if token is None:
                    p *= stop
                    break
                p *= (1 - stop) * go[token] / max(go.sum(), 1e-300)
                node = trie.children[node][token]
            assert found.answers[number][i] == pytest.approx(p, abs=1e-9)
    assert len({round(float(v), 6) for v in found.validity}) == 3
