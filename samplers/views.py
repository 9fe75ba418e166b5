"""The same request put in other ways, read beside it: what several prompts agree on is more likely to be valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from decal.kernels.reference import wide
from decal.samplers.errors import DecalError
from decal.samplers.row import Map, Row
from decal.samplers.rule import Choice, Param, rule

if TYPE_CHECKING:
    from decal.samplers.chain import Chain
    from decal.samplers.context import History

Text = tuple[int, ...]
KINDS = ("others", "blank", "smaller")
"""Prompts that ask for the same, prompts that ask for nothing in particular, and the prompt itself for a smaller model."""
LOWEST = -50.0
"""Log-probabilities below this count as this: a token that one prompt rules out is unlikely, not lost."""


MISSING = {
    "others": "this chain reads other ways to ask, and knows none for a prompt of this batch: Prompts(..., others="
    "{prompt: [...]}), with the prompt as generate gets it; batches need pad_token_id",
    "blank": "this chain reads prompts that ask for nothing in particular, and has none: Prompts(..., blank=[...])",
    "smaller": "this chain reads a smaller model, and has none: Prompts(..., smaller=model)",
}
"""What is said where there are none."""


class Views(Protocol):
    """Next-token logits behind other prompts."""

    def logits(self, kind: str, history: History) -> Tensor:
        """(B, K, V) where the generated tokens of each row stand behind each of its K other prompts of that kind (`KINDS`).

        Raises:
            DecalError: there are none.
        """


class NoViews:
    """One other prompt that says nothing, for declaring rules. It remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def logits(self, kind: str, history: History) -> Tensor:
        """See `Views`."""
        self.asked.add(kind)
        return torch.zeros(len(history), 1, 2)


def kinds(chain: Chain) -> set[str]:
    """Which `KINDS` a chain reads, found by running it."""
    from decal.samplers.context import History

    views, rows = NoViews(), chain.per_row or 1
    for step in chain.steps:
        if "prompts" in step.rule.needs and not step.is_off:
            replace(chain, steps=(step,), views=views)(torch.zeros(rows, 2), history=History.of([[0]] * rows))
    return views.asked


def price(chain: Chain) -> str:
    """What a chain reads at every step beside the row itself, in words."""
    count, read = chain.views.count if isinstance(chain.views, Prompts) else {}, kinds(chain)
    said = {
        "others": "a row of the model for each other way to ask",
        "blank": "a row of the model for each blank prompt",
        "smaller": "a row of the smaller model",
    }
    many = {kind: f" (at most {count[kind]})" if kind != "smaller" and kind in count else "" for kind in KINDS}
    return ", ".join(said[kind] + many[kind] for kind in KINDS if kind in read)


class Prompts:
    """Other prompts for each prompt, which the model itself reads as it generates.

    What it costs: a row for every other prompt, with keys and values of its own; all of a step are read in one pass.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        others: for each prompt the ways to ask for the same, the same number for all: ``{prompt: [other, ...]}``.
        blank: prompts that ask for nothing in particular, for all requests.
        smaller: a smaller model with the same tokenizer, which reads the prompts as they are; it costs a row of its own.

    Raises:
        DecalError: not of this form, numbers of other prompts differ, or a prompt has no tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        others: Mapping[str, Sequence[str]] | None = None,
        blank: Sequence[str] = (),
        smaller: Any = None,
    ):
        others = others or {}
        if not callable(model) or not callable(tokenizer):
            raise DecalError(
                f"Prompts takes a model and its tokenizer, got {type(model).__name__} and {type(tokenizer).__name__}"
            )
        if not isinstance(others, Mapping) or not (others or blank or smaller is not None):
            raise DecalError(
                f"others are {{prompt: [other, ...]}}, and others or blank are needed, or a smaller model, got {others!r}"
            )
        if smaller is not None and not callable(smaller):
            raise DecalError(f"smaller is a model, got {type(smaller).__name__}")
        for ways in (list(others), blank, *others.values()):
            if isinstance(ways, str) or not isinstance(ways, Sequence) or not all(isinstance(text, str) for text in ways):
                raise DecalError(f"prompts are texts, and other prompts lists of texts, got {ways!r}")
        counts = {len(ways) for ways in others.values()}
        if len(counts) > 1 or 0 in counts:
            raise DecalError(f"every prompt needs the same number of other ways to ask, at least 1, got {sorted(counts)}")

        def ids(text: str) -> Text:
            tokens = tuple(tokenizer(text)["input_ids"])
            if not tokens:
                raise DecalError(f"a prompt needs at least one token, got {text!r}")
            return tokens

        self.others = {ids(prompt): [ids(way) for way in ways] for prompt, ways in others.items()}
        self.blank = [ids(text) for text in blank]
        self.smaller = smaller
        self._pad = getattr(tokenizer, "pad_token_id", None)
        self._begins = self._pad == getattr(tokenizer, "bos_token_id", None)
        self._readers = {kind: Reader(smaller if kind == "smaller" else model) for kind in KINDS}

    @property
    def count(self) -> dict[str, int]:
        """Prompts that are read for a row at the most, by kind."""
        others = max(map(len, self.others.values()), default=0)
        return {"others": others, "blank": len(self.blank), "smaller": int(self.smaller is not None)}

    def logits(self, kind: str, history: History) -> Tensor:
        """See `Views`."""
        texts = []
        for prompt, generated in history.split():
            ways = self._ways(kind, prompt)
            if not ways:
                raise DecalError(MISSING[kind])
            texts += [(*way, *generated) for way in ways]
        if kind == "smaller":
            self._check_tokens(texts)
        found = self._readers[kind](texts)
        return found.reshape(len(history), len(texts) // len(history), -1)

    def _ways(self, kind: str, prompt: Text) -> Sequence[Text] | None:
        if kind != "smaller":
            return self.blank if kind == "blank" else self.others.get(prompt)
        if self.smaller is None:
            return None
        # Nothing else tells a padded prompt from one that was meant like that.
        if self._pad is not None and (prompt[:2] == (self._pad,) * 2 or (prompt[:1] == (self._pad,) and not self._begins)):
            raise DecalError("a prompt begins with padding, which a smaller model would read: batches need pad_token_id")
        return [prompt]

    def _check_tokens(self, texts: Sequence[Text]) -> None:
        embedding = getattr(self.smaller, "get_input_embeddings", lambda: None)()
        size = getattr(embedding, "num_embeddings", None)
        largest = max(map(max, texts))
        if size is not None and largest >= size:
            raise DecalError(f"the smaller model knows {size} tokens, and not the token {largest}: another tokenizer's?")


class Reader:
    """Next-token logits of texts that grow token by token, with a cache of keys and values that follows them.

    Texts may come in another order than before, some more than once and some no more, as in beam search; texts that are no
    continuations by one token are read anew.
    """

    def __init__(self, model: Any):
        self.model = model
        self._texts: dict[Text, int] = {}
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._last = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """(n, V) float32."""
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        if place != self._texts:  # several steps of a chain may ask for the same
            follows = [self._texts.get(text[:-1]) for text in place]
            grown = [number for number in follows if number is not None]
            read = self._go_on(list(place), grown) if len(grown) == len(place) else self._begin(list(place))
            self._last, self._texts = read.float(), place
        return self._last[[place[text] for text in texts]]

    def _begin(self, texts: Sequence[Text]) -> Tensor:
        from transformers import DynamicCache

        width = max(map(len, texts))
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts], device=device)
        self._mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=device)
        self._cache = DynamicCache()
        places = (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._read(ids, places)

    def _go_on(self, texts: Sequence[Text], follows: Sequence[int]) -> Tensor:
        if list(follows) != list(range(len(self._mask))):
            index = torch.tensor(follows, device=self._mask.device)
            self._cache.batch_select_indices(index)
            self._mask = self._mask[index]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(texts), 1)], 1)
        ids = torch.tensor([[text[-1]] for text in texts], device=self._mask.device)
        return self._read(ids, self._mask.sum(-1, keepdim=True) - 1)

    def _read(self, ids: Tensor, places: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, attention_mask=self._mask, position_ids=places, past_key_values=self._cache, use_cache=True
        )
        last: Tensor = out.logits[:, -1]
        return last


def _behind(row: Row, kind: str) -> Callable[[Tensor, str], Tensor]:
    """A function that gives the ``mean`` or the ``least`` log-probability behind other prompts of the tokens of z (B, W)."""
    row.history  # noqa: B018 (asked for at once, so that a missing one shows early)
    views = row.views

    def behind(z: Tensor, form: str) -> Tensor:
        # Where the columns are some of the tokens, each prompt still normalises over all of its own.
        def told(history: History, vocabulary: int) -> Tensor:
            logits = views.logits(kind, history)
            if logits.shape[-1] < vocabulary:
                whose = "of the smaller model" if kind == "smaller" else "behind other prompts"
                raise DecalError(f"{whose} are logits of {logits.shape[-1]} tokens, here of {vocabulary}")
            logp = logits.to(wide(logits.device)).log_softmax(-1)[..., :vocabulary]
            return logp.amin(1) if form == "least" else logp.mean(1)

        return row.per_token(told).to(z).clamp(min=LOWEST)

    return behind


@rule(paper="arXiv:1911.12543", slow="it reads other prompts")
def ensemble(
    row: Row,
    weight: Tensor = Param(0.67, low=0, high=1, off=0.0, sweep=(0.2, 0.4, 0.5, 0.67, 0.8, 1.0)),
    form: str = Choice("mean", "least"),
) -> Map:
    """Replace log-probabilities by their mean with those behind other ways to ask for the same.

    Maps log p_i to (1 - weight) log p_i + weight m_i, m_i the mean of log p_i over the other prompts; in the form ``least`` the
    least of them, so that a token has to be likely whatever the wording. Jiang et al. 2020, where weights are fitted.

    Elsewhere: contrastive and ensemble decoding scripts; no serving stack.
    """
    behind = _behind(row, "others")

    def together(z: Tensor) -> Tensor:
        other = behind(z, form)
        return torch.where(z.isfinite(), (1 - weight) * (z - row.max) + weight * other, -torch.inf)

    return Map(together, monotone=False)


@rule(paper="arXiv:2104.08315", slow="it reads other prompts")
def contrast(
    row: Row,
    strength: Tensor = Param(0.5, low=0, high=2, off=0.0, sweep=(0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    against: str = Choice("blank", "smaller"),
) -> Map:
    """Lower the tokens that are likely whatever is asked, or that a smaller model finds likely too.

    Maps log p_i to log p_i - strength b_i, b_i the mean of log p_i behind prompts that ask for nothing in particular; at
    strength 1 pointwise mutual information (Holtzman et al. 2021). Against a smaller model b_i is its log p_i behind the same
    text: contrastive decoding (Li et al., arXiv 2210.15097), which is ``min_p(0.1) | contrast(1, against="smaller")``. Cut
    first: rare tokens gain most.

    Elsewhere: `guidance_scale` of transformers and vLLM's negative prompts do the same with one prompt, g log p - (g - 1) b.
    O'Brien and Lewis (arXiv 2309.09117) write (1 + beta) log p - beta b: strength beta / (1 + beta), and a temperature of
    1 / (1 + beta) behind it.
    """
    behind = _behind(row, against)

    def lowered(z: Tensor) -> Tensor:
        return torch.where(z.isfinite(), z - strength * behind(z, "mean"), -torch.inf)

    return Map(lowered, monotone=False)
