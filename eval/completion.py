"""Completions of token sequences by a model, in batches, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from decal.eval.frontier import end_tokens
from decal.eval.models import LoadedModel
from decal.samplers.chain import Chain, parse
from decal.samplers.errors import DecalError
from decal.samplers.vocabulary import Vocabulary

Form = Literal["completion", "chat"]


def encode(tokenizer: Any, prompt: str, form: Form) -> list[int]:
    """Token ids of a prompt: as it is, or as a user's message in the chat template.

    Raises:
        DecalError: the model has no chat template, or the prompt has no tokens.
    """
    if form == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DecalError("form chat needs a chat template, which this model lacks; use form completion")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DecalError(f"the prompt needs at least one token, got {prompt!r}")
    return list(ids)


class Writer:
    """Continues token sequences until a token ends the text.

    Args:
        model: as `decal.eval.models.load` gives it.
        stop: texts before which a completion ends, beside the model's own end tokens.
    """

    def __init__(self, model: LoadedModel, stop: Sequence[str] = ()):
        self.model, self.stop = model, tuple(stop)
        self.vocabulary = Vocabulary.of(model.tokenizer)
        self.own_ends = frozenset(end_tokens(model))
        marks = [mark.encode() for mark in self.stop]
        inside = {t for t, written in self.vocabulary.bytes_of.items() if any(mark in written for mark in marks)}
        self.ends = self.own_ends | inside
        """Tokens after which nothing needs to be written."""

    @property
    def room(self) -> int | None:
        """Most tokens of prompt and completion together, if the model says."""
        limit = getattr(self.model.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def check_room(self, longest: int) -> None:
        """Raise DecalError if the model has no room for so many tokens of prompt and completion."""
        if self.room is not None and longest > self.room:
            raise DecalError(f"prompt and completions need {longest} tokens, and the model has room for {self.room}")

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens write, up to the first that ends the text, or to the first of the texts that do."""
        written = b""
        for token in tokens:
            if token in self.own_ends:
                break
            written += self.vocabulary.bytes_of.get(token, b"")
        text = written.decode(errors="replace")
        return text[: min((at for mark in self.stop if (at := text.find(mark)) >= 0), default=len(text))]

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether a text ends within these tokens."""
        if any(token in self.ends for token in tokens):
            return True
        # A text that ends it may be written by several tokens.
        written = b"".join(self.vocabulary.bytes_of.get(token, b"") for token in tokens).decode(errors="replace")
        return any(mark in written for mark in self.stop)

    def token_text(self, token: int) -> str:
        """What one token writes; of a special token its name."""
        written = self.vocabulary.bytes_of.get(token)
        if written is not None:
            return written.decode(errors="replace")
        return str(self.model.tokenizer.convert_ids_to_tokens(token) or f"<{token}>")

    def greedy(self, starts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """The most probable next token, again and again; see `sampled`."""
        return self.sampled(starts, parse("temperature(0)"), [0] * len(starts), most)

    def sampled(self, starts: Sequence[Sequence[int]], chain: Chain, seeds: Sequence[int], most: int) -> list[list[int]]:
        """The tokens that follow each of some sequences, at most so many, with the one that ends the text if it comes.

        A sequence gets the same continuation from the same seed in any batch, up to the rounding of the model's forward pass.

        Args:
            starts: token ids, all together one batch; of any lengths, each at least 1.
            chain: the sampler.
            seeds: one for each, below 2**63.
            most: new tokens, at least 1.
        """
        import torch

        model = self.model.model
        pad = self.model.tokenizer.pad_token_id
        pad = min(self.own_ends, default=0) if pad is None else pad
        width = max(map(len, starts))
        # Sequences are aligned at their ends.
        ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in starts], device=model.device)
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts], device=model.device)
        ends: dict[str, Any] = {"eos_token_id": sorted(self.ends)} if self.ends else {}
        if "model" in chain.needs:
            chain = chain.for_model(model)
        arguments = chain.generate_kwargs(seeds=list(seeds), pad_token_id=pad, max_new_tokens=most, **ends)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, **arguments)
        return [self._until_end(row) for row in out[:, width:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        for place, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: place + 1]
        return tokens
