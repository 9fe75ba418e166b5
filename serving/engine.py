"""What `decal.serving.verify` asks of a running engine. Each adapter implements it as its ``Live``."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from decal.samplers.errors import DecalError


class Written(NamedTuple):
    """What an engine wrote behind a prompt.

    Attributes:
        tokens: the new ones, an end token included.
        laws: (len(tokens), V) the log-probabilities each was drawn from, -inf where it could not be; None if the engine
            doesn't tell.
    """

    tokens: list[int]
    laws: Tensor | None


class Engine(Protocol):
    """A running engine with a model.

    Attributes:
        name, version: of the engine.
        tokenizer: of its model, a fast one of transformers.
        takes_seeds: whether decal draws there for a request with ``decal_seed``.
    """

    name: str
    version: str
    tokenizer: Any
    takes_seeds: bool

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """(texts, V) logits of the model behind each text, up to a constant of the row, before anything is done to them.

        None if the engine doesn't tell.
        """

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """Continue every prompt, all in one batch, by at most ``length`` tokens, as a user's requests with the keys of
        `decal.serving.request.KEYS` in ``asked`` would be. ``laws`` asks for what was drawn from.

        Raises:
            DecalError: the engine refused a request, with its words.
        """

    def notes(self) -> list[str]:
        """What of the engine's configuration may act beside a chain."""

    def close(self) -> None:
        """Stop the engine, if it was started for this."""


def http(url: str, body: Any = None, timeout: float = 600) -> Any:
    """What a server answers in JSON, to a GET, or a POST of ``body``. Raises DecalError with its words if it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise DecalError(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise DecalError(f"{url} could not be asked: {error}") from error
