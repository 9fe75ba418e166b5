"""The conformance suite: what every rule owes, whatever its formula, checked on adversarial and random rows.

    from decal.samplers.testing import check
    check(my_rule)  # raises ConformanceError, naming the law, the chain and what went wrong

Each law of `LAWS` can also be run by itself, as ``LAWS[name](rule)``. They need torch and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decal.samplers.chain import Chain, from_json, parse, run_pass
from decal.samplers.context import Context, History, Weights
from decal.samplers.errors import DecalError
from decal.samplers.guided import Guide
from decal.samplers.rule import Parameter, Rule
from decal.samplers.trie import TokenTrie

SETTINGS = 6
"""How many values a rule declares as worth comparing, so that none is tuned harder than another."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUTS = ("truncation", "band", "selection")


class ConformanceError(AssertionError):
    """A rule breaks a law of the suite."""


def check(rule: Rule) -> list[str]:
    """Check that ``rule`` keeps every law, and return their names. Raises ConformanceError naming the first it breaks."""
    for name, law in LAWS.items():
        try:
            law(rule)
        except ConformanceError as error:
            raise ConformanceError(f"{rule.name} breaks the law {name!r}: {error}") from None
    return list(LAWS)


def require(condition: bool | Tensor, message: str) -> None:
    """Raise ConformanceError with ``message`` unless ``condition`` holds."""
    if not bool(condition):
        raise ConformanceError(message)


# ---- what the laws are tried on


def values(rule: Rule, *, awkward: bool = False) -> list[dict[str, object]]:
    """Parameter values worth trying, one parameter varied at a time. ``awkward`` ones sit at no coincidence, so that no
    threshold lands on a token."""
    default: dict[str, object] = {name: p.default for name, p in rule.params.items()}
    tried = [default]
    for name, p in rule.params.items():
        if isinstance(p, Parameter):
            found = {*p.sweep, p.low} | ({p.high} if math.isfinite(p.high) and p.high < 1000 else set())
            tried += [{**default, name: v} for v in sorted(found)]
        else:
            tried += [{**default, name: option} for option in getattr(p, "options", ())]
    if awkward:
        tried = [{name: _awkward(rule, name, v) for name, v in chosen.items()} for chosen in tried]
    return [chosen for chosen in tried if not rule.step(**chosen).is_off]


def _awkward(rule: Rule, name: str, value: object) -> object:
    p = rule.params[name]
    if not isinstance(p, Parameter) or p.integer or not isinstance(value, (int, float)):
        return value
    moved = value * 0.99173 if value else 0.0137
    return moved if p.low <= moved <= p.high else value


def small_rows(dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Batches of nasty rows: ties, flat, huge, tiny, one hot, dropped tokens, of few tokens each."""
    g = torch.Generator().manual_seed(7)
    huge = 60000.0 if dtype is torch.float16 else 1e30
    for size in (1, 2, 3, 5, 17, 40):
        bell = torch.randn(size, generator=g, dtype=torch.float64)
        steps = torch.randint(-8, 9, (size,), generator=g).double()
        few = torch.tensor([0.0, -1.0, -2.5, 3.25])[torch.randint(0, 4, (size,), generator=g)].double()
        big = torch.tensor([huge, -huge, huge / 3, 0.0, 1.0, -5.0])[torch.randint(0, 6, (size,), generator=g)].double()
        peak = torch.where(torch.arange(size) == size // 2, 5.0, -20.0 + bell)
        plain = [bell * 8, steps, few, big, bell * 1e-30, torch.full_like(bell, -7.0), torch.full_like(bell, huge), peak]
        dead = torch.rand(len(plain), size, generator=g) < 0.4
        dead[torch.arange(len(plain)), torch.randint(0, size, (len(plain),), generator=g)] = False
        rows = torch.stack(plain)
        yield torch.cat([rows, rows.masked_fill(dead, -torch.inf)]).to(dtype)


def large_rows(size: int = 5003, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bell-shaped, peaked, flat, few-valued and mostly dropped rows over a vocabulary of ``size``."""
    g = torch.Generator().manual_seed(size)
    bell = torch.randn(size, generator=g, dtype=torch.float64) * 3
    peaked = torch.where(torch.arange(size) == size // 2, 40.0, bell)
    few = torch.randint(0, 4, (size,), generator=g).double()
    dropped = torch.where(torch.rand(size, generator=g) < 0.999, -torch.inf, bell)
    dropped[-1] = 0.5
    return torch.stack([bell, peaked, torch.full_like(bell, -2.0), few, dropped]).to(dtype)


def exact_rows(count: int = 12, size: int = 30) -> Tensor:
    """float64 rows of multiples of 2^-8, some dropped, to which constants of that kind can be added without rounding."""
    g = torch.Generator().manual_seed(3)
    z = torch.randint(-(2**12), 2**12, (count, size), generator=g).double() / 2**8
    dead = torch.rand(count, size, generator=g) < 0.3
    dead[:, 0] = False
    return z.masked_fill(dead, -torch.inf)


@dataclass(frozen=True)
class Trial:
    """A rule with parameter values, in a context made up for B rows over V tokens."""

    chain: Chain
    history: History

    @classmethod
    def of(cls, chain: Chain, rows: int, vocabulary: int) -> Trial:
        g = torch.Generator().manual_seed(vocabulary)
        text = torch.randint(0, min(vocabulary, 6), (rows, 9), generator=g)
        vectors = torch.randn(2, vocabulary, 5, generator=g, dtype=torch.float64)
        weights = Weights(vectors[0], vectors[1]) if "model" in chain.needs else None
        answers = some_answers(text[:, 4:].tolist(), vocabulary) if "answers" in chain.needs else []
        guide = guide_of(answers, [vocabulary - 1] if vocabulary > 1 else []) if answers else None
        views = SomeViews.of(vocabulary, g) if "prompts" in chain.needs else None
        ends = (0, vocabulary - 1) if "ends" in chain.needs else None
        return cls(Chain(chain.steps, weights, guide, views, ends), History.of(text, prompt=4))

    def __call__(self, z: Tensor) -> Tensor:
        return self.chain(z, history=self.history, state=self.chain.init(len(z)))

    def mask(self, z: Tensor) -> Tensor:
        return self.chain.mask(z, history=self.history, state=self.chain.init(len(z)))

    def row(self, i: int) -> Trial:
        """The same for one of the rows."""
        return replace(self, history=self.history.rows(torch.tensor([i])))


@dataclass(frozen=True, eq=False)
class SomeViews:
    """Logits of two other prompts, which depend on the last token: ``table`` is (tokens, 2, V)."""

    table: Tensor

    @classmethod
    def of(cls, vocabulary: int, g: torch.Generator) -> SomeViews:
        tokens = vocabulary if vocabulary < 64 else 6  # no others occur in the texts
        return cls(torch.randn(tokens, 2, vocabulary, generator=g, dtype=torch.float64) * 3)

    def logits(self, kind: str, history: History) -> Tensor:
        return self.table[history.tokens[:, -1]]


def guide_of(answers: Sequence[tuple[int, ...]], ends: Sequence[int]) -> Guide:
    """Answers given as tokens, which the tokens ``ends`` end."""
    trie = TokenTrie(len(answers), tuple(ends))
    for number, tokens in enumerate(answers):
        trie.insert(tokens, number)
    return Guide(trie)


def some_answers(texts: Sequence[Sequence[int]], vocabulary: int) -> list[tuple[int, ...]]:
    """Answers that begin with these texts, of several all but the first, and go on or end in several ways."""
    found = (
        (*text, token, *(t % max(vocabulary - 1, 1) for t in range(further)))
        for number, text in enumerate(texts[1:] or texts)
        for further in range(number % 3 + 1)
        for token in range(0, max(vocabulary - 1, 1), further + 2)
    )
    return list(dict.fromkeys(found))


def trials(rule: Rule, z: Tensor, *, awkward: bool = False) -> Iterator[Trial]:
    """The rule at every value worth trying, or at two of them if it is slow."""
    for chosen in values(rule, awkward=awkward)[: 2 if rule.slow else None]:
        yield Trial.of(rule(**chosen), len(z), z.shape[1])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, signs of zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


# ---- the laws


def is_declared_well(rule: Rule) -> None:
    """It says in words what it keeps, cites where it is from, and declares as many values to compare as every rule."""
    require(rule.summary.endswith("."), "the first line of its docstring must be a sentence")
    cited = not rule.paper or "." in rule.paper or ":" in rule.paper
    require(cited, f"paper must be arXiv:..., doi:..., an address or nothing, got {rule.paper!r}")
    tried = math.prod(len(p.sweep or (p.default,)) for p in rule.params.values())
    default = "no parameter declares a sweep" if tried == 1 else f"the sweeps of its parameters make {tried} settings"
    require(tried in (1, SETTINGS) or rule.name == "temperature", f"{default}, every rule compares {SETTINGS}")


def has_a_text_and_a_json_form(rule: Rule) -> None:
    """Both forms are read back as the same chain."""
    for chosen in values(rule):
        chain = rule(**chosen)
        require(parse(str(chain)) == chain, f"{chain} is read back as {parse(str(chain))}")
        require(from_json(chain.to_json()) == chain, f"{chain.to_json()} is read back as {from_json(chain.to_json())}")


def gives_sane_rows(rule: Rule) -> None:
    """Shape and type stay, the input isn't written to, -inf stays, nothing is NaN or +inf, and no row is emptied."""
    for dtype in DTYPES:
        for z in small_rows(dtype):
            for trial in trials(rule, z):
                is_sane(trial, z)
    for z in _large(rule):
        for trial in trials(rule, z):
            is_sane(trial, z)


def _large(rule: Rule) -> list[Tensor]:
    return [] if rule.slow else [large_rows()]


def is_sane(trial: Trial, z: Tensor) -> None:
    """`gives_sane_rows`, of one trial on one batch."""
    before = z.clone()
    masked, processed = trial.mask(z), trial(z)
    kept = masked.isfinite()
    where = f"{trial.chain} on {z.dtype} {tuple(z.shape)}"
    require(same_bits(z, before), f"{where}: the input was written to")
    for out in (masked, processed):
        require(out.shape == z.shape and out.dtype == z.dtype, f"{where}: gave {out.dtype} {tuple(out.shape)}")
    require(torch.equal(kept, processed.isfinite()), f"{where}: mask and call keep different tokens")
    require(not (processed.isnan() | processed.isposinf()).any(), f"{where}: gave NaN or +inf")
    require(not (kept & z.isneginf()).any(), f"{where}: a token at -inf came back")
    require(kept.any(-1).all(), f"{where}: nothing is left of row {_row(~kept.any(-1))}")
    require(same_bits(masked, z.masked_fill(~kept, -math.inf)), f"{where}: mask touched a kept logit")
    require(same_bits(processed, trial(z)), f"{where}: gave something else the second time")


def acts_as_its_kind_says(rule: Rule) -> None:
    """A truncation keeps the top together and untouched, a band a stretch of the ranking; a reshaping keeps the support, or
    just the modes; tokens of equal logit fare alike unless tokens so far, embeddings or ends tell them apart. Which tokens a
    projection keeps that is told the valid answers, is up to them."""
    for z in [*small_rows(), *_large(rule)]:
        for trial in trials(rule, z):
            is_of_its_kind(rule, trial, z)


def is_of_its_kind(rule: Rule, trial: Trial, z: Tensor) -> None:
    """`acts_as_its_kind_says`, of one trial on one batch."""
    masked, processed = trial.mask(z), trial(z)
    kept, where = masked.isfinite(), f"{trial.chain}"
    lowest = torch.where(kept, z, math.inf).amin(-1, keepdim=True)
    highest = torch.where(kept, z, -math.inf).amax(-1, keepdim=True)
    mode = z.amax(-1, keepdim=True)
    if rule.kind in CUTS:
        require(same_bits(processed, masked), f"{where}: a {rule.kind} reshaped")
    projections = () if "answers" in rule.needs else ("projection",)
    if rule.kind in ("truncation", *projections):
        require(torch.equal(highest, mode), f"{where}: the most probable token was dropped")
    if rule.kind in ("truncation", "band", *projections):
        together = (z >= lowest) & (z <= highest) & z.isfinite()
        require(torch.equal(kept, together), f"{where}: kept tokens are not a stretch of the ranking with all ties")
    if rule.kind == "reshaping":
        whole = (kept == z.isfinite()).all(-1) | (kept == (z == mode)).all(-1)
        require(whole.all(), f"{where}: a reshaping dropped tokens; declare Map(..., drops=True)")
    if rule.kind in ("reshaping", "projection"):
        order = z.sort(dim=-1, stable=True).indices
        ranked, before = processed.gather(-1, order), z.gather(-1, order)
        if rule.monotone:
            require((ranked[:, 1:] >= ranked[:, :-1]).all(), f"{where}: changed the order; Map(..., monotone=False)?")
        if not rule.needs & {"history", "model", "ends"}:
            tied = (before[:, 1:] == before[:, :-1]) & ranked[:, :-1].isfinite()
            require((ranked[:, 1:] == ranked[:, :-1])[tied].all(), f"{where}: ties came apart")


def off_changes_no_bit(rule: Rule) -> None:
    """At the values declared as off the rows come back as they are."""
    off = {name: p.off for name, p in rule.params.items() if p.off is not None}
    if not off:
        return
    for z in small_rows():
        trial = Trial.of(rule(**off), len(z), z.shape[1])
        require(same_bits(trial(z), z) and same_bits(trial.mask(z), z), f"{trial.chain} changed something")
        columns = {n: v for n, v in off.items() if not rule.params[n].static}
        if columns:
            per_row = {n: torch.full((len(z), 1), float(v), dtype=torch.float64) for n, v in columns.items()}
            trial = Trial.of(rule(**{**off, **per_row}), len(z), z.shape[1])
            require(same_bits(trial(z), z), f"{rule.name} at off in every row changed something")


def takes_values_per_row(rule: Rule) -> None:
    """Parameters as (B, 1) tensors do what they do row by row."""
    free = [name for name, p in rule.params.items() if not p.static]
    if not free:
        return
    tried = [{name: v for name, v in chosen.items() if name in free} for chosen in values(rule)]
    tried += [{name: rule.params[name].off for name in free if rule.params[name].off is not None}]
    for z in small_rows():
        for start in range(0, len(tried), len(z)):
            chosen = [tried[(start + i) % len(tried)] for i in range(len(z))]
            rows = [{name: row.get(name, rule.params[name].default) for name in free} for row in chosen]
            columns = {n: torch.tensor([[float(row[n])] for row in rows], dtype=torch.float64) for n in free}  # type: ignore[arg-type]
            together = Trial.of(rule(**columns), len(z), z.shape[1])
            batch = together(z)
            for i, row in enumerate(rows):
                alone = replace(together, chain=replace(together.chain, steps=rule(**row).steps)).row(i)
                require(
                    same_bits(batch[i : i + 1], alone(z[i : i + 1])),
                    f"{alone.chain} alone is not what it is as one row of a batch",
                )


def rows_do_not_see_each_other(rule: Rule) -> None:
    """A row gives the same bits whoever shares its batch."""
    for z in small_rows():
        for trial in trials(rule, z):
            together = trial(z)
            alone = torch.cat([trial.row(i)(z[i : i + 1]) for i in range(len(z))])
            require(same_bits(together, alone), f"{trial.chain}: row {_row((together != alone).any(-1))} depends on the others")


def a_shift_changes_nothing(rule: Rule) -> None:
    """Adding a constant to the logits changes no kept set and no law, if the rule is declared so; else it does somewhere."""
    z, changed = exact_rows(), False
    for trial in trials(rule, z, awkward=True):
        for shift in (3.5, -700.25):
            same = torch.equal(trial.mask(z).isfinite(), trial.mask(z + shift).isfinite())
            law = (trial(z).softmax(-1) - trial(z + shift).softmax(-1)).abs().max() < 1e-7
            changed |= not (same and bool(law))
            ignores = trial.chain.steps[0].ignores_shift
            require((same and law) or not ignores, f"{trial.chain} sees a shift of {shift}; declare shift=False?")
    require(changed or rule.shift is True, "no shift changes anything; declare shift=True?")


def a_temperature_changes_what_is_declared(rule: Rule) -> None:
    """A cut declared scale=True keeps the same set after any temperature; of others some set changes; ``moved`` is right."""
    if rule.kind not in CUTS:
        return
    z, changed = torch.cat([exact_rows(), exact_rows(24) / 4]), False
    for t in (0.5, 1.7):
        hot = parse(f"temperature({t})")(z)
        for trial in trials(rule, z, awkward=True):
            same = torch.equal(trial.mask(z).isfinite(), trial.mask(hot).isfinite())
            changed |= not same
            require(same or not rule.scale, f"{trial.chain} sees temperature {t}; declare scale=False?")
            if rule.moved:
                chosen = trial.chain.steps[0].values
                before = Trial.of(rule(**{**chosen, **rule.moved(t, **chosen)}), len(z), z.shape[1])
                same = torch.equal(before.mask(z).isfinite(), trial.mask(hot).isfinite())
                require(same, f"{trial.chain} after temperature({t}) is not {before.chain} before it")
    require(changed or rule.scale, "no temperature changes a kept set; declare scale=True?")


def _renamed(guide: Guide, new: Sequence[int]) -> Guide:
    trie = guide.trie
    assert isinstance(trie, TokenTrie)
    paths = [tuple(new[t] for t in trie.path(node)) for node in range(len(trie)) if trie.answer[node] >= 0]
    return guide_of(paths, [new[token] for token in trie.ends])


def renaming_tokens_renames_the_answer(rule: Rule) -> None:
    """The order of the vocabulary means nothing, with the text and the embeddings renamed too; nor does it matter which tokens
    the columns are, as long as the rule is told."""
    z = exact_rows()
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(1))
    for trial in trials(rule, z, awkward=True):
        w, h = trial.chain.weights, trial.history
        renamed = History(order.argsort()[h.tokens], h.length, h.prompt, h.request)
        weights = None if w is None else Weights(w.embedding[order], w.head[order])
        new = order.argsort().tolist()
        guide = trial.chain.guide and _renamed(trial.chain.guide, new)
        views = trial.chain.views and SomeViews(trial.chain.views.logits("", History.of(order[:, None]))[..., order])
        ends = trial.chain.ends and tuple(new[token] for token in trial.chain.ends)
        other = Trial(Chain(trial.chain.steps, weights, guide, views, ends), renamed)
        law, again = trial(z).softmax(-1)[:, order], other(z[:, order]).softmax(-1)
        require(torch.equal(law > 0, again > 0), f"{trial.chain}: renaming tokens changes the kept set")
        require((law - again).abs().max() < 1e-9, f"{trial.chain}: renaming tokens changes the law")
        context = Context(h, w, trial.chain.guide, trial.chain.views, trial.chain.ends, toss=1)
        state = trial.chain.init(len(z))
        states = {id(step): s for step, s in zip(trial.chain.steps, state, strict=True)}
        columns = z[:, order].double()
        for one in trial.chain.plan:
            columns = run_pass(one, columns, context, states, order.expand(len(z), -1))
        require((law - columns.softmax(-1)).abs().max() < 1e-9, f"{trial.chain}: columns in another order change the law")


def the_type_changes_no_kept_set(rule: Rule) -> None:
    """float32, bfloat16 and float16 logits are cut as the same numbers in float64 are."""
    for dtype in DTYPES[1:]:
        z = (torch.randn(6, 500, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
        for trial in trials(rule, z):
            same = torch.equal(trial.mask(z).isfinite(), trial.mask(z.double()).isfinite())
            require(same, f"{trial.chain} keeps other tokens in {dtype}")


def a_single_token_stays(rule: Rule) -> None:
    """A row with one token left keeps it."""
    for z in (torch.tensor([[-3.5]]), torch.tensor([[-math.inf, 7.0, -math.inf]])):
        for trial in trials(rule, z):
            require(torch.equal(trial.mask(z), z), f"{trial.chain} changed {z.tolist()}")


def bad_rows_harm_no_others(rule: Rule) -> None:
    """Without checks, NaN counts as dropped, +inf as the largest value, an empty row stays empty, and others don't notice."""
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    rows[1], rows[2, 3], rows[3, 4] = -math.inf, math.nan, math.inf
    for z in (rows.to(dtype) for dtype in DTYPES):
        for trial in trials(rule, z):
            out = trial.chain(z, history=trial.history, state=trial.chain.init(5), check=False)
            where = f"{trial.chain} on {z.dtype}"
            for good in (0, 4):
                same = same_bits(out[good : good + 1], trial.row(good)(z[good : good + 1]))
                require(same, f"{where}: a bad row changed another")
            require(out[1].isneginf().all() and out[2, 3].isneginf(), f"{where}: a dropped token came back in a bad row")
            require(not out.isnan().any(), f"{where}: gave NaN")
            require((out[[0, 2, 3, 4]] > -math.inf).any(-1).all(), f"{where}: a bad row was emptied")


def leaves_the_global_generator_alone(rule: Rule) -> None:
    """No rule draws from torch's own random numbers."""
    z = exact_rows()
    before = torch.get_rng_state()
    for trial in trials(rule, z):
        trial(z)
    require(torch.equal(torch.get_rng_state(), before), "it drew from torch's global generator")


def remembers_purely(rule: Rule) -> None:
    """Memory is a function of what was drawn: it has one number a row, changes no input, and ignores tokens not on offer."""
    if rule.feedback is None:
        return
    z = exact_rows()
    for trial in trials(rule, z):
        state = trial.chain.init(len(z))
        before = [{k: v.clone() for k, v in s.items()} for s in state if s]
        scores, seen = trial.chain.apply(z, state, history=trial.history)
        after = trial.chain.observe(state, seen, scores.argmax(-1))
        require(all(v.shape == (len(z), 1) for s in after if s for v in s.values()), f"{trial.chain}: state is not (B, 1)")
        require(all(bool(v.isfinite().all()) for s in after if s for v in s.values()), f"{trial.chain}: state is not finite")
        kept = all(torch.equal(v, s[k]) for s, b in zip([s for s in state if s], before, strict=True) for k, v in b.items())
        require(kept, f"{trial.chain}: update wrote to the state it was given")
        dropped = z.clone()
        dropped[:, 3] = -math.inf
        _, seen = trial.chain.apply(dropped, state, history=trial.history)
        same = trial.chain.observe(state, seen, torch.full((len(z),), 3))
        require(same[0] == {} or all(torch.equal(v, state[0][k]) for k, v in (same[0] or {}).items()),  # type: ignore[index]
                f"{trial.chain}: a token that wasn't on offer changed the memory")  # fmt: skip


def says_what_is_missing(rule: Rule) -> None:
    """Without the tokens so far, the memory or the embeddings it reads, it raises one clear error."""
    z = exact_rows()
    if rule.needs:
        try:
            rule()(z)
        except DecalError as error:
            require("\n" not in str(error), f"its error has several lines: {error}")
        else:
            require(rule.step().is_off, f"it reads {', '.join(sorted(rule.needs))} and runs without")


def _row(bad: Tensor) -> int:
    return int(bad.nonzero()[0]) if bad.any() else -1


LAWS: dict[str, Callable[[Rule], None]] = {
    law.__name__.replace("_", " "): law
    for law in (
        is_declared_well,
        has_a_text_and_a_json_form,
        gives_sane_rows,
        acts_as_its_kind_says,
        off_changes_no_bit,
        takes_values_per_row,
        rows_do_not_see_each_other,
        a_shift_changes_nothing,
        a_temperature_changes_what_is_declared,
        renaming_tokens_renames_the_answer,
        the_type_changes_no_kept_set,
        a_single_token_stays,
        bad_rows_harm_no_others,
        leaves_the_global_generator_alone,
        remembers_purely,
        says_what_is_missing,
    )
}
"""Every law by name."""
