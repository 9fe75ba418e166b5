"""One text at a time, for engines that call a function for each text with nothing but its tokens and its row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from decal.serving.batch import Group, Member, histories, reads_text
from decal.serving.request import Request

BACK = 32
"""How many steps a text may fall back, as where drafts are rejected, and still be known."""


class Follower:
    """Applies a request's chain to the rows of one text, step by step.

    A text that goes on where the last one was, or where that was up to `BACK` steps ago, is the same text: what the chain
    remembers is a function of its tokens, also where the last of them has changed. Any other text is new, and all of it is
    prompt. So a prompt that is one token longer than a text seen so far counts as its continuation; `reset` says that it isn't.
    """

    def __init__(self, request: Request):
        self.request = request
        self.reads_text = request.seed is not None or reads_text(request.chain)
        self.reset()

    def reset(self) -> None:
        """The next text is a new one."""
        self._group: Group | None = None
        self._text = np.empty(0, np.int64)
        self._prompt = 0

    def __call__(self, row: Tensor, text: Sequence[int] | np.ndarray) -> Tensor:
        """What the chain makes of ``row`` (1, V) behind the tokens ``text``; 0 for the token drawn and -inf elsewhere with a
        seed."""
        if not self.reads_text:
            return self.request.chain(row, check=False)
        tokens = np.array(text, np.int64)
        group = self._follow(tokens)
        member, length = group.members[0], len(tokens)
        parts = tokens[: self._prompt].tolist(), tokens[self._prompt :].tolist()
        history = histories(group, [parts]) if group.reads_text else None
        places = member.places
        out = group(row, torch.tensor([[length]]), history)
        # A group forgets what lies behind its last rows; here a later call may go back.
        both = {**places, **member.places}
        member.places = {place: known for place, known in both.items() if length - BACK < place <= length}
        return out

    def _follow(self, text: np.ndarray) -> Group:
        last = len(text) - 1
        goes_on = len(text) > self._prompt and last <= len(self._text) and np.array_equal(text[:last], self._text[:last])
        if self._group is not None and goes_on:
            forgets = "state" in self.request.chain.needs and last not in self._group.members[0].places
            goes_on = not forgets
        if self._group is None or not goes_on:
            self._group, self._prompt = Group([0], [Member.of(self.request)]), len(text)
        self._text = text
        return self._group
