"""Chains of steps: composition in an explicit order, plan, text and JSON form, and what runs.

Steps are applied left to right, each to the survivors of the one before; temperature is a step like any other.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from decal.kernels import dispatch, reference
from decal.kernels.dispatch import choose
from decal.kernels.mass import MOST_TOKENS, wide
from decal.kernels.program import Untraceable
from decal.samplers.context import GIVEN, Context, Given, History, Weights
from decal.samplers.errors import DecalError
from decal.samplers.row import Affine, Band, DenseRow, Keep, Map
from decal.samplers.rule import Rule, Step, TokensParameter, find
from decal.samplers.trace import Traced, trace

if TYPE_CHECKING:
    from decal.samplers.guided import Guide
    from decal.samplers.processor import ChainProcessor
    from decal.samplers.valid_set import ValidSet
    from decal.samplers.views import Views

SURVIVES_CUT = frozenset({"max", "k-th largest", "history", "state", "chance", *GIVEN})
"""What a truncation leaves unchanged, as far as a later truncation is concerned: the largest logit, a threshold at the k-th
largest (where fewer than k tokens are left, the earlier cut is the stricter one), and all that isn't in the logits."""

State = tuple[Mapping[str, Tensor] | None, ...]
"""What the steps of a chain remember: for each step with a memory its (B, 1) tensors by name."""


@dataclass
class Pass:
    """Steps that share one reading of the rows: maps folded into the read, cuts, and maps folded into the write."""

    read: list[Step] = field(default_factory=list)
    cut: list[Step] = field(default_factory=list)
    write: list[Step] = field(default_factory=list)
    reason: str = "first read of the logits"

    @property
    def steps(self) -> list[Step]:
        """All of them, in order."""
        return [*self.read, *self.cut, *self.write]

    @property
    def names(self) -> str:
        """Of its rules."""
        return ", ".join(step.rule.name for step in self.steps)

    def refuses(self, step: Step) -> str | None:
        """Why ``step`` can't join this pass, or None if it can."""
        for one in (*self.steps, step) if self.steps else ():
            if (
                one.rule.tokenwise
                or one.rule.needs & {"state", "chance"}
                or any(isinstance(p, TokensParameter) for p in one.rule.params.values())
            ):
                return "it has a pass of its own" if one is step else f"{one.rule.name} has a pass of its own"
        reads = step.rule.reads
        if step.rule.kind != "reshaping" and self.write:
            return f"{step.rule.name} cuts what {self.write[-1].rule.name} has reshaped"
        if step.rule.kind == "reshaping" and self.write and reads:
            return f"{step.rule.name} reads what {self.write[-1].rule.name} has reshaped"
        for earlier in self.cut:
            # A truncation may not drop the mode, so it reads the largest logit, which a band may have dropped.
            needed = reads | {"max"} if step.rule.kind == "truncation" else reads
            changed = needed if earlier.rule.kind == "band" else needed - SURVIVES_CUT
            if changed:
                return f"{step.rule.name} reads {', '.join(sorted(changed))}, which {earlier.rule.name} changes"
        return None

    def add(self, step: Step) -> None:
        if step.rule.kind in ("truncation", "band", "selection"):
            self.cut.append(step)
        elif self.cut or step.rule.reads or self.write or step.rule.tokenwise:
            self.write.append(step)
        else:
            self.read.append(step)


class Untraced(NamedTuple):
    """A pass that only torch can do, and why."""

    passed: Pass
    reason: str


class Seen(NamedTuple):
    """What a chain's memory needs to know of a step of generation, until the token is drawn: by number of the step of the chain
    the logits it was given, (B, V)."""

    rows: Mapping[int, Tensor]


NOTHING_SEEN = Seen({})


@dataclass(frozen=True, eq=False)
class Chain:
    """Decoding steps in order. Build one with ``|``: ``temperature(1.4) | min_p(0.1)``.

    Two chains are equal if their text forms are.
    """

    steps: tuple[Step, ...]
    weights: Weights | None = None
    guide: Guide | None = None
    views: Views | None = None
    ends: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise DecalError("a chain needs at least one step; temperature(1) changes nothing")
        # A step that stands twice is two steps, each with a memory of its own.
        twice = [step in self.steps[:place] for place, step in enumerate(self.steps)]
        object.__setattr__(self, "steps", tuple(replace(s) if t else s for s, t in zip(self.steps, twice, strict=True)))
        sizes = {str(s): s.per_row for s in self.steps if s.per_row is not None}
        if len(set(sizes.values())) > 1:
            given = ", ".join(f"{step} for {size}" for step, size in sizes.items())
            raise DecalError(f"the steps of a chain are given for different numbers of rows: {given}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Nothing that was worked out for this process.
        return Chain, (self.steps, self.weights, self.guide, self.views, self.ends)

    def __or__(self, other: Chain | Rule) -> Chain:
        if isinstance(other, Rule):
            other = other()
        if not isinstance(other, Chain):
            return NotImplemented
        both = {}
        for need, given in GIVEN.items():
            mine, theirs = getattr(self, given.name), getattr(other, given.name)
            if mine is not None and theirs is not None and mine != theirs:
                raise DecalError(
                    f"{self} and {other} are for different {given.several}; use for_{need} once, on the whole chain"
                )
            both[given.name] = theirs if mine is None else mine
        return Chain(self.steps + other.steps, **both)

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps))

    def __repr__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @cached_property
    def per_row(self) -> int | None:
        """Number of rows its parameters are given for, or None if every row has the same."""
        return next((s.per_row for s in self.steps if s.per_row is not None), None)

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides the logits: some of ``history``, ``chance``, ``state`` and the names of `GIVEN`."""
        return frozenset().union(*(step.needs for step in self.steps if not step.is_off))

    def for_model(self, model: Any) -> Chain:
        """The chain, with the embeddings of a transformers model, which a few rules read."""
        return replace(self, weights=Weights.of(model))

    def for_answers(
        self,
        answers: Guide | ValidSet | Iterable[str],
        tokenizer: Any = None,
        *,
        ends: Sequence[str] = ("<eos>",),
        leading_space: bool = False,
        free_tokens: int = 64,
    ) -> Chain:
        """The chain, with the valid answers that `guided` follows.

        Args:
            answers: a list of texts, or a `ValidSet` such as ``decal.ValidSet.from_regex("[1-9][0-9]?")``.
            tokenizer: the model's.
            ends, leading_space: what stands behind and before an answer; see `decal.samplers.guided.Guide.of`.
            free_tokens: how many tokens each text may take that the answers leave to the model.

        Raises:
            DecalError: no step follows answers; or as in `Guide.of`.
        """
        from decal.samplers.guided import Guide

        if "answers" not in self.needs:
            raise DecalError(f"no step of {self} follows answers; put guided(...) first")
        if not isinstance(answers, Guide):
            answers = Guide.of(answers, tokenizer, ends=ends, leading_space=leading_space, free_tokens=free_tokens)
        return replace(self, guide=answers)

    def for_prompts(self, views: Views) -> Chain:
        """The chain, with other prompts that `ensemble` and `contrast` read: `Prompts`, or anything that gives their logits."""
        if "prompts" not in self.needs:
            raise DecalError(f"no step of {self} reads other prompts; ensemble and contrast do")
        if not callable(getattr(views, "logits", None)):
            raise DecalError(f"for_prompts takes decal.Prompts(...), got {type(views).__name__}")
        return replace(self, views=views)

    def for_ends(self, tokens: Iterable[int]) -> Chain:
        """The chain, with the tokens that end a text, which `split_temperature` reads: those that ``generate`` stops at.

        Where line breaks end it: ``for_ends([tokenizer.eos_token_id, *decal.tokens_with(tokenizer, "\\n")])``.

        Raises:
            DecalError: no step reads them, or these are no token ids.
        """
        if "ends" not in self.needs:
            raise DecalError(f"no step of {self} reads the tokens that end a text; split_temperature does")
        tokens = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        given = list(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else tokens
        if not isinstance(given, list) or not given:
            raise DecalError(f"for_ends takes token ids such as [2, 198], at least one, got {given!r}")
        return replace(self, ends=tuple(sorted(set(TokensParameter().check("for_ends: tokens", given)))))

    @property
    def usage(self) -> str:
        """How to pass it to ``generate``, in Python, with all that it has to be given."""
        given = "".join(f".{one.how}" for need, one in GIVEN.items() if need in self.needs)
        stop = "eos_token_id=tokens" if "ends" in self.needs else ""
        return f'chain = decal.parse("{self}"){given}, then model.generate(..., **chain.generate_kwargs({stop}))'

    @property
    def missing(self) -> dict[str, Given]:
        """What it reads and was not given, by what `needs` calls it."""
        return {need: one for need, one in GIVEN.items() if need in self.needs and getattr(self, one.name) is None}

    def mask(self, logits: Tensor, *, history: History | None = None, state: State | None = None, check: bool = True) -> Tensor:
        """The logits with dropped tokens at -inf and kept ones untouched.

        Args:
            logits: (B, V), any floating type.
            history: the tokens so far, for chains that read them (see `needs`).
            state: what the chain remembers, for chains that do; see `init`.
            check: raise on rows that no model should produce (NaN, +inf, nothing finite). Without it, which saves a
                synchronisation on GPUs, NaN counts as dropped, +inf as the largest finite value, and a row with nothing
                finite comes back empty.

        Returns:
            (B, V) in the type of ``logits``.

        Raises:
            DecalError: wrong shape or type, bad values, per-row parameters or a history for another number of rows, or
                something missing that the chain reads.
        """
        return self._processed(logits, check, history, state, mask=True)[0]

    def __call__(
        self, logits: Tensor, *, history: History | None = None, state: State | None = None, check: bool = True
    ) -> Tensor:
        """The logits with every step applied: dropped tokens at -inf, kept ones reshaped. Arguments as in `mask`."""
        return self.apply(logits, state, history=history, check=check)[0]

    def apply(
        self, logits: Tensor, state: State | None = None, *, history: History | None = None, check: bool = True
    ) -> tuple[Tensor, Seen]:
        """What a call gives, and what `observe` wants to know once the tokens are drawn. Arguments as in `mask`."""
        return self._processed(logits, check, history, state)

    def sample(
        self,
        logits: Tensor,
        seeds: Tensor | Sequence[int] | int,
        positions: Tensor | Sequence[int] | int,
        *,
        history: History | None = None,
        state: State | None = None,
        check: bool = True,
    ) -> Tensor:
        """Tokens drawn from what the chain makes of the logits: (B,) int64.

        A row's token is a function of its logits, its seed and its position alone: the same in any batch, at any place in it.
        It is the winner of a race of exponentials, each a function of seed, position and token id with 52 random bits, so that
        also a token of probability 1e-15 can be drawn.

        Args:
            logits, history, state, check: as in `mask`; with ``check=False`` a row with nothing finite draws token 0.
            seeds: whole numbers below 2**63, one for each row or one for all: what tells requests apart.
            positions: places in the text, likewise.

        Raises:
            DecalError: as `mask`; or seeds or positions are something else.
        """
        return self.draw(logits, seeds, positions, state, history=history, check=check)[0]

    def draw(
        self,
        logits: Tensor,
        seeds: Tensor | Sequence[int] | int,
        positions: Tensor | Sequence[int] | int,
        state: State | None = None,
        *,
        history: History | None = None,
        check: bool = True,
    ) -> tuple[Tensor, Seen]:
        """What `sample` gives, and what `observe` wants to know of the step. Arguments as in `sample`."""
        if is_compiling():
            operands = _operands(self)
            return torch.ops.decal.sample(logits, seeds, positions, *operands), NOTHING_SEEN
        whole, backend = self._admit(logits, history, state)
        seeds, positions = (_per_row(n, v, logits) for n, v in (("seeds", seeds), ("positions", positions)))
        if whole is not None:
            tokens, flags = backend.sample(whole.program, logits, seeds, positions, whole.parameters(), careful=check)
            self._check(logits, check, flags)
            if _done(flags, backend):
                return tokens, NOTHING_SEEN
        self._check(logits, check)
        z_BV, seen = self._run(logits, history, state, whole is None)
        return reference.draw(z_BV, seeds[:, None], positions[:, None]), seen

    def init(self, rows: int, *, device: torch.device | str = "cpu") -> State:
        """What the chain remembers before the first token, for so many rows. Raises DecalError unless there is one."""
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise DecalError(f"init takes a number of rows, at least 1, got {rows!r}")
        if self.per_row not in (None, rows):
            raise DecalError(f"the chain has parameters for {self.per_row} rows, init is asked for {rows}")
        like = torch.zeros((), dtype=wide(torch.device(device)), device=device)
        states = [step.init(like) for step in self.steps]
        return tuple(state and {name: v.expand(rows, 1) for name, v in state.items()} for state in states)

    def observe(self, state: State, seen: Seen, tokens: Tensor) -> State:
        """What the chain remembers after ``tokens`` (B,) were drawn, from the scores that `apply` gave with ``seen``.

        A token that a step was not offered, such as padding behind the end, leaves that step's memory as it was.

        Raises:
            DecalError: ``tokens`` are not token ids, one for each row.
        """
        for z_BV in seen.rows.values():
            tokens = _admit_tokens(tokens, *z_BV.shape)
        new = list(state)
        for number, z_BV in seen.rows.items():
            step, old = self.steps[number], state[number]
            old = old and {name: v.to(z_BV) for name, v in old.items()}
            logp = z_BV.gather(-1, tokens.to(z_BV.device)[:, None]) - z_BV.logsumexp(-1, keepdim=True)
            feedback, values = step.rule.feedback, step.numbers(z_BV)
            assert feedback is not None
            assert old is not None
            notes = feedback.notes and feedback.notes(DenseRow(z_BV, reference), **values)
            updated = feedback.after(old, logp, notes, values)
            new[number] = {name: torch.where(logp.isfinite(), updated[name], old[name]) for name in old}
        return tuple(new)

    def _processed(
        self, logits: Tensor, check: bool, history: History | None, state: State | None, mask: bool = False
    ) -> tuple[Tensor, Seen]:
        if is_compiling():
            operands = _operands(self)  # registers the operators
            return torch.ops.decal.transform(logits, *operands, mask), NOTHING_SEEN
        whole, backend = self._admit(logits, history, state)
        mask = mask or self.only_cuts
        if whole is not None:
            processed, flags = backend.transform(whole.program, logits, whole.parameters(), mask=mask, careful=check)
            self._check(logits, check, flags)
            if _done(flags, backend):
                return processed, NOTHING_SEEN
        self._check(logits, check)
        z_BV, seen = self._run(logits, history, state, whole is None)
        if mask:
            return logits.masked_fill(z_BV.isneginf(), -torch.inf), seen
        return reference.narrow(z_BV, logits.dtype), seen

    def _admit(self, logits: Tensor, history: History | None, state: State | None) -> tuple[Traced | None, Any]:
        """The chain as one program, and the module that can run it on ``logits``; None if there is none.

        Raises:
            DecalError: they don't go together.
        """
        # Logits like earlier ones need no second look, which would take longer than many a chain.
        key = None
        if history is None and state is None and type(logits) is Tensor and not logits.requires_grad:
            key = logits.shape, logits.dtype, logits.device, dispatch.asked[-1]
            known = self._admitted.get(key)
            if known is not None:
                return known
        self._check_arguments(logits, history, state)
        found = self._whole(logits)
        if key is not None:
            if len(self._admitted) >= 64:
                self._admitted.clear()
            self._admitted[key] = found
        return found

    @cached_property
    def _admitted(self) -> dict[Any, tuple[Traced | None, Any]]:
        return {}

    def _whole(self, logits: Tensor) -> tuple[Traced | None, Any]:
        backend = self._compiled(logits, logits.dtype)
        if backend is None or not self._traceable:
            return None, None
        return cast(Traced, self.segments[0]), backend

    @staticmethod
    def _compiled(logits: Tensor, dtype: torch.dtype) -> Any:
        """The module that runs programs where ``logits`` are, on rows of that type; None if there is none."""
        backend = choose(logits.device.type).module
        if backend is None or dtype not in backend.TYPES or (logits.requires_grad and torch.is_grad_enabled()):
            return None
        return backend

    @cached_property
    def only_cuts(self) -> bool:
        """Whether kept logits stay as they are."""
        return all(s.rule.kind in ("truncation", "band", "selection") or s.is_off for s in self.steps)

    @cached_property
    def _traceable(self) -> bool:
        return len(self.segments) == 1 and isinstance(self.segments[0], Traced)

    @cached_property
    def segments(self) -> tuple[Traced | Untraced, ...]:
        """The plan as programs, which compiled code runs, and the passes between them that only torch can do."""
        found: list[Traced | Untraced] = []
        steps: list[Step] = []

        def close() -> None:
            if steps or not found:
                found.append(trace(steps))
            steps.clear()

        for one in self.plan:
            try:
                trace(one.steps)
            except Untraceable as error:
                if steps:
                    close()
                found.append(Untraced(one, str(error)))
            else:
                steps += one.steps
        if steps or not found:
            close()
        return tuple(found)

    def _run(self, logits: Tensor, history: History | None, state: State | None, compiling: bool = True) -> tuple[Tensor, Seen]:
        """The chain in wide floats, -inf where dropped, pass by pass; ``compiling`` where that can be."""
        context = Context(history, self.weights, self.guide, self.views, self.ends)
        number = {id(step): i for i, step in enumerate(self.steps)}
        # Several coins of a chain are several coins, whatever their seeds; one that is off may be on in another row.
        toss = {id(step): n for n, step in enumerate((s for s in self.steps if "chance" in s.rule.needs), 1)}
        z_BV, seen = reference.clean(logits), {}
        # A row with nothing finite is none of the rules' business.
        dead = ~z_BV.isfinite().any(-1, keepdim=True)
        z_BV = torch.where(dead, 0.0, z_BV)
        compiled = self._compiled(logits, z_BV.dtype) if compiling else None
        for part in self.plan if compiled is None else self.segments:
            if isinstance(part, Traced):
                z_BV = self._run_traced(part, z_BV, compiled)
                continue
            one = part.passed if isinstance(part, Untraced) else part
            for step in one.steps:
                if step.rule.feedback:
                    seen[number[id(step)]] = z_BV.masked_fill(dead, -torch.inf)
                if id(step) in toss:
                    context = replace(context, toss=toss[id(step)])
            states = {id(step): state[number[id(step)]] if state else None for step in one.steps}
            state_of = {key: s and {name: v.to(z_BV) for name, v in s.items()} for key, s in states.items()}
            z_BV = run_pass(one, z_BV, context, state_of)
        return torch.where(dead, -torch.inf, z_BV), Seen(seen)

    def _run_traced(self, part: Traced, z_BV: Tensor, backend: Any) -> Tensor:
        """A compiled part of the chain, in wide floats."""
        after, flags = backend.transform(part.program, z_BV, part.parameters())
        if _done(flags, backend):
            return after
        for one in Chain(part.steps).plan:
            z_BV = run_pass(one, z_BV, Context(), {})
        return z_BV

    def _check_arguments(self, logits: Tensor, history: History | None, state: State | None) -> None:
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point() or 0 in logits.shape:
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise DecalError(f"logits must be a floating-point tensor of shape (B, V), got {got}")
        if logits.shape[1] > MOST_TOKENS:
            raise DecalError(f"logits may be of at most {MOST_TOKENS} tokens, got {logits.shape[1]}")
        if self.per_row not in (None, len(logits)):
            raise DecalError(f"the chain has parameters for {self.per_row} rows, the logits have {len(logits)}")
        if history is not None and not isinstance(history, History):
            raise DecalError(f"history must be a History, such as decal.History.of(input_ids), got {type(history).__name__}")
        if history is not None and len(history) != len(logits):
            raise DecalError(f"the history is of {len(history)} rows, the logits have {len(logits)}")
        if state is not None and len(state) != len(self.steps):
            raise DecalError(f"the state is of a chain of {len(state)} steps, this one has {len(self.steps)}")
        sizes = {len(v) for one in state or () for v in (one or {}).values()}
        if sizes - {len(logits)}:
            raise DecalError(f"the state is of {min(sizes)} rows, the logits have {len(logits)}")
        if self.guide is not None and self.guide.largest >= logits.shape[1]:
            raise DecalError(
                f"the answers have the token {self.guide.largest}, the logits {logits.shape[1]} tokens: another tokenizer's?"
            )
        if self.ends and max(self.ends) >= logits.shape[1]:
            raise DecalError(f"the text ends with token {max(self.ends)}, the logits have {logits.shape[1]} tokens")
        if self.weights is not None and len(self.weights.head) != logits.shape[1]:
            raise DecalError(f"the model has {len(self.weights.head)} output embeddings, the logits {logits.shape[1]} tokens")

    @staticmethod
    def _check(logits: Tensor, check: bool, flags: int | None = None) -> None:
        """Raise on rows that no model should produce. ``flags`` tell whether there are any, if that is known."""
        if not check or flags == 0:
            return
        bad = logits.isnan() | logits.isposinf()
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            raise DecalError(f"logits must be finite or -inf, got {logits[row, token].item()} in row {row} at token {token}")
        empty = ~logits.isfinite().any(-1)
        if empty.any():
            raise DecalError(f"every row of logits needs a finite value, row {int(empty.nonzero()[0])} has none")

    @cached_property
    def plan(self) -> tuple[Pass, ...]:
        """Passes over the vocabulary: a new one begins only where a step reads what an earlier one has changed."""
        passes: list[Pass] = [Pass()]
        for step in self.steps:
            if step.is_off:
                continue
            reason = passes[-1].refuses(step)
            if reason:
                passes.append(Pass(reason=reason))
            passes[-1].add(step)
        return tuple(passes)

    def explain(self, file: TextIO | None = None) -> None:
        """Print what runs, in which order, in how many passes, on which backend, and why."""
        backend = choose()
        lines = [str(self)]
        for number, one in enumerate(self.plan, 1):
            lines.append(f"  pass {number}: {one.reason}")
            for role, steps in (("on reading", one.read), ("cut", one.cut), ("on writing", one.write)):
                for step in steps:
                    reads = ", ".join(sorted({"every logit"} if step.rule.tokenwise else set()) + sorted(step.rule.reads))
                    summary = step.rule.summary.replace("``", "")
                    lines.append(f"    {role:<10}  {step!s:<24}  {summary}  [reads {reads or 'nothing'}]")
        lines += [f"  off: {step}" for step in self.steps if step.is_off]
        lines += [f"  {note}" for note in notes(self)]
        lines.append(f"  backend: {backend.name} ({backend.reason})")
        if backend.module is not None:
            lines += [
                f"    but plain torch for {one.passed.names}: {one.reason}"
                for one in self.segments
                if isinstance(one, Untraced)
            ]
        print("\n".join(lines), file=file or sys.stdout)

    def to_json(self) -> str:
        """JSON form; `from_json` reads it back. Per-row parameters are lists, infinity is the string "inf". What
        `for_model` and its like gave the chain is not in it."""
        steps = [{"rule": s.rule.name, **{name: _plain(value) for name, value in s.values.items()}} for s in self.steps]
        return json.dumps({"chain": steps}, allow_nan=False)

    def processor(
        self,
        pad_token_id: int | None = None,
        requests: Tensor | Sequence[int] | None = None,
        beams: int = 1,
        seeds: Tensor | Sequence[int] | None = None,
    ) -> ChainProcessor:
        """The chain as a transformers ``LogitsProcessor``. Needs transformers.

        Use a new one for each ``generate``, unless it continues a text. Padding, requests and beams matter to chains that read
        the tokens so far, remember, or toss coins (see `needs`).

        Args:
            pad_token_id: a run of this token on the left is padding; without it padding counts as text.
            requests: request numbers for random choices, one per request; by default the places in the batch. The same number
                gives the same choices in any batch.
            beams: beams per request; they share its random choices.
            seeds: one per request: the processor draws the tokens itself, see `generate_kwargs`.

        Raises:
            DecalError: the chain reads a model's embeddings and has none; see `for_model`.
        """
        from decal.samplers.processor import ChainProcessor

        return ChainProcessor(self, pad_token_id, requests, beams, seeds)

    def generate_kwargs(
        self,
        *,
        requests: Tensor | Sequence[int] | None = None,
        direct: bool = False,
        seeds: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments for ``model.generate`` under which this chain alone decides the distribution.

        They carry the processor and neutralise every built-in warper, penalty, bias and guidance, whatever the model's own
        generation config says; what it bans or demands (``bad_words_ids``, ``min_length``, a watermark) stays. Chains that read
        the tokens so far want ``pad_token_id`` for batches padded on the left. Ask for new ones for each ``generate``.

        Args:
            requests: see `processor`.
            direct: run the sampling loop through the chain: rules with feedback are told of each token as soon as it is drawn,
                not when the next one is due, and nothing is stored by the tokens of a text. The tokens are the same. It can't
                go with beams or assistants, and a text that is taken up again begins afresh.
            seeds: one whole number per request. Tokens are then drawn by `sample`, whatever torch's generator is, from the seed
                of the request and the length of its text: a request gives the same text alone and in any batch, up to what its
                logits themselves owe to the batch (models round differently for other batch sizes). Say ``pad_token_id`` where
                the batch is padded. Scores that ``generate`` returns are 0 for the token drawn and -inf for others;
                ``output_logits=True`` has the model's. Can't go with beams.
            kwargs: added as they are (``max_new_tokens=20``). A chain that follows answers adds the tokenizer's end token and
                ``max_new_tokens``, what the longest answer takes, and refuses what would cut an answer.

        Raises:
            DecalError: a keyword would reshape the distribution beside the chain, or doesn't go with ``direct``; or the chain
                reads a model's embeddings and has none, see `for_model`.
        """
        from decal.samplers.generate import generate_kwargs

        return generate_kwargs(self, kwargs, requests, direct, seeds)


def _done(flags: int | None, backend: Any) -> bool:
    """Whether compiled code could do every row; what it couldn't, plain torch does again, all of it."""
    return not flags or not flags & backend.UNFIT


def _operands(chain: Chain) -> tuple[Any, ...]:
    """The chain as operands of `decal.kernels.ops`, for a graph of ``torch.compile``. Raises DecalError if it is no program."""
    from decal.kernels import ops

    part = chain.segments[0]
    if len(chain.segments) > 1 or not isinstance(part, Traced):
        why = next(one.reason for one in chain.segments if isinstance(one, Untraced))
        raise DecalError(f"{chain} can't be in a graph of torch.compile: {why}")
    return (*ops.arguments_of(part.program), part.parameters())


# What torch.compiler.assume_constant_result does, without importing all of torch's compiler with decal.
_operands._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_pass(
    one: Pass,
    z_BV: Tensor,
    context: Context,
    state_of: Mapping[int, Mapping[str, Tensor] | None],
    tokens: Tensor | None = None,
) -> Tensor:
    """One pass over logits in wide floats. ``state_of`` is by id of the step; ``tokens`` as in `DenseRow`."""
    for step in one.read:
        z_BV = transform(z_BV, step.answer(DenseRow(z_BV, reference, context, None, tokens), z_BV))
    # A step with a memory has the pass to itself.
    row = DenseRow(z_BV, reference, context, next(filter(None, map(state_of.get, map(id, one.steps))), None), tokens)
    if len(one.cut) == 1:
        z_BV = transform(z_BV, one.cut[0].answer(row, z_BV), row)
    elif one.cut:
        bands = [cast(Band, step.answer(row, z_BV)) for step in one.cut]
        low, high = reduce(torch.maximum, (b.low for b in bands)), reduce(torch.minimum, (b.high for b in bands))
        z_BV = transform(z_BV, Band(low, high))
    for step in one.write:
        z_BV = transform(z_BV, step.answer(row, z_BV))
    return z_BV


def transform(z_BV: Tensor, answer: Band | Affine | Map | Keep, row: DenseRow | None = None) -> Tensor:
    """What a step's answer makes of logits in wide floats; ``row`` is needed where a band spares tokens."""
    if isinstance(answer, Affine):
        return reference.affine(z_BV, *answer)
    if isinstance(answer, Map):
        return reference.remap(z_BV, answer.fn)
    if isinstance(answer, Keep):
        return reference.keep(z_BV, answer.fn(z_BV))
    kept = reference.keep_between(z_BV, answer.low, answer.high)
    if answer.spared:
        assert row is not None
        return torch.where(row.is_one_of(answer.spared), z_BV, kept)
    return kept


def notes(chain: Chain) -> list[str]:
    """Where the order of a chain is not what its rules were made for, and what it is equivalent to."""
    found = []
    for number, step in enumerate(chain.steps):
        if step.is_off:
            continue
        before, after = (_temperatures(steps) for steps in (chain.steps[:number], chain.steps[number + 1 :]))
        side = step.rule.side
        if step.rule.wants_cut and all(s.is_off or s.rule.kind == "reshaping" for s in chain.steps[:number]):
            found.append(f"warning: {step.rule.name} was made to stand behind a cut; here it lifts the whole vocabulary")
        cuts = [s for s in chain.steps[:number] if not s.is_off and s.rule.kind != "reshaping"]
        if "answers" in step.rule.needs and cuts:
            found.append(f"warning: {cuts[0]} may drop every valid token before {step.rule.name} sees the row; put that first")
        if side == "before" and before:
            found.append(f"warning: {step.rule.name} was made to stand before temperature; here it comes after {before[-1]}")
        if side == "after" and after:
            found.append(f"warning: {step.rule.name} was made to stand after temperature; here it comes before {after[0]}")
        last = chain.steps[number - 1] if number else None
        if (
            last is None
            or last not in before
            or "t" not in last.values
            or len(last.values) > 1
            or step.per_row
            or last.per_row
            or not last.values["t"]
        ):
            continue
        if step.rule.scale:
            found.append(f"note: {step} keeps the same tokens before {last} as after it")
        elif step.rule.moved:
            moved = step.rule.step(**{**step.values, **step.rule.moved(last.values["t"], **step.values)})
            found.append(f"note: {step} after {last} keeps the same tokens as {moved} before it")
    if "prompts" in chain.needs:
        from decal.samplers.views import price

        found.append(f"note: every step reads more than its own row: {price(chain)}")
    for step in chain.steps:
        if step.rule.slow and "prompts" not in step.rule.needs and not step.is_off:
            found.append(f"note: {step.rule.name} is slow: {step.rule.slow}")
    return found


def _temperatures(steps: Sequence[Step]) -> list[Step]:
    """Those that are a temperature, whether fixed or the row's own."""
    return [s for s in steps if s.rule.kind == "reshaping" and not (s.rule.tokenwise or s.rule.wants_cut or s.is_off)]


def _admit_tokens(tokens: Any, rows: int, vocabulary: int) -> Tensor:
    """Drawn tokens as (B,). Raises DecalError."""
    wanted = f"observe: tokens must be {rows} token ids in [0, {vocabulary}), as a tensor of shape ({rows},)"
    if not isinstance(tokens, Tensor):
        raise DecalError(f"{wanted}, got {tokens!r}")
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.numel() != rows or tokens.dim() > 2:
        raise DecalError(f"{wanted}, got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and not bool(((tokens >= 0) & (tokens < vocabulary)).all()):  # elsewhere it would wait
        raise DecalError(f"{wanted}, got {tokens.flatten().tolist()}")
    return tokens.reshape(rows).long()


def _per_row(name: str, value: Any, logits: Tensor) -> Tensor:
    """``value`` as (B,) int64. Raises DecalError."""
    rows = logits.shape[0]
    # The usual ones, with few operators.
    if type(value) is Tensor and value.dtype == torch.int64 and value.shape == (rows,) and value.device == logits.device:
        return value
    if type(value) is int and -(2**63) <= value < 2**63:
        return torch.full((rows,), value, dtype=torch.int64, device=logits.device)
    wanted = f"{name} must be a whole number, or {rows} of them, one for each row"
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DecalError(f"{wanted}, below 2**63, got {value!r}") from None
    # A number is for all rows; a list has one for each, lest requests share their noise unawares.
    many = numbers.dim() == 0 or (numbers.dim() == 1 and len(numbers) == rows) or numbers.shape == (rows, 1)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool or not many:
        raise DecalError(f"{wanted}, got {value!r}")
    return numbers.to(logits.device, torch.int64).reshape(-1).expand(rows)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [_plain(v) for v in value[:, 0].tolist()]
    if isinstance(value, tuple):
        return {"numbers" if any(isinstance(v, float) for v in value) else "tokens": list(value)}
    return "inf" if value == math.inf else value


def parse(text: str) -> Chain:
    """The chain written as ``"temperature(1.4) | min_p(0.1)"``; ``str(chain)`` gives such a text back.

    Values are numbers, ``inf``, or a list with one number per row. A rule with default values needs no brackets.

    Raises:
        DecalError: not of this form, an unknown rule or parameter, or a value out of range.
    """
    if not isinstance(text, str):
        raise DecalError(f"parse takes a text such as 'min_p(0.1)', got {type(text).__name__}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        steps = tuple(_parse_steps(tree, text))
    except DecalError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = ""
        if isinstance(error, SyntaxError) and text.strip():
            place = error.offset or len(text.strip()) + 1  # Python says 0 for the end
            where = f": {error.msg}, character {place + len(text) - len(text.lstrip())}"
        raise DecalError(f"a chain is written rule(value) | rule(value) | ..., got {text!r}{where}") from None
    return Chain(steps)


def _parse_steps(node: ast.expr, text: str) -> list[Step]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _parse_steps(node.left, text) + _parse_steps(node.right, text)
    if isinstance(node, ast.Name):
        return [find(node.id).step()]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise DecalError(f"{node.func.id}: * and ** have no meaning in a chain's text, got {text!r}")
        rule = find(node.func.id)
        names = [k.arg for k in node.keywords]
        for name in names:
            if names.count(name) > 1:
                raise DecalError(f"{rule.name}: {name} was given twice")
        args = [_parse_value(a, rule.name) for a in node.args]
        return [rule.step(*args, **{str(k.arg): _parse_value(k.value, rule.name) for k in node.keywords})]
    raise DecalError(f"a chain is written rule(value) | rule(value) | ..., got {ast.unparse(node)!r} in {text!r}")


def _parse_value(node: ast.expr, rule: str) -> Any:
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.List):
        return _column([_parse_value(element, rule) for element in node.elts], rule)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        wanted = "a number, inf, a list of them, a word in quotes, or token ids in brackets"
        raise DecalError(f"{rule}: a value must be {wanted}, got {ast.unparse(node)}") from None


def _column(values: Iterable[Any], rule: str) -> Tensor:
    column = list(values)
    if not column or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in column):
        raise DecalError(f"{rule}: a list must hold one number per row, got {column!r}")
    return torch.tensor(column, dtype=torch.float64)[:, None]


def from_json(text: str) -> Chain:
    """The chain that `Chain.to_json` wrote.

    Raises:
        DecalError: not of that form, an unknown rule or parameter, or a value out of range.
    """
    try:
        steps = json.loads(text)["chain"]
        named = [(step["rule"], {k: v for k, v in step.items() if k != "rule"}) for step in steps]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DecalError(f'a chain in JSON is {{"chain": [{{"rule": name, parameter: value}}, ...]}}, got {text!r}') from None
    return Chain(tuple(find(name).step(**{k: _unplain(v, name) for k, v in values.items()}) for name, values in named))


def _unplain(value: Any, rule: str) -> Any:
    if isinstance(value, list):
        return _column([_unplain(v, rule) for v in value], rule)
    if isinstance(value, dict) and set(value) in ({"tokens"}, {"numbers"}) and all(isinstance(v, list) for v in value.values()):
        return tuple(next(iter(value.values())))
    return math.inf if value == "inf" else value
