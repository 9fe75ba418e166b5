"""What each token writes: the bytes behind token ids, and the tokens that continue a text."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from decal.samplers.errors import DecalError


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """``{token id: bytes it writes}``, special tokens left out.

    Reads byte-level BPE and SentencePiece-style tokenizers of the ``tokenizers`` library.

    Raises:
        DecalError: another kind of tokenizer, whose tokens don't say which bytes they write.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DecalError(f"what tokens write needs a fast tokenizer, got {type(tokenizer).__name__}")
    layout = json.loads(backend.to_str())
    # What the tokenizer does decides, not what its tokens look like: SentencePiece vocabularies hold such characters too.
    coding = json.dumps([layout.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    byte_level = "ByteLevel" in coding
    if not byte_level and "\u2581" not in coding and "Metaspace" not in coding:
        raise DecalError("decal reads byte-level BPE and SentencePiece tokenizers, this is neither")
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    alphabet = _byte_level_alphabet()
    table: dict[int, bytes] = {}
    for text, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if number in added:
            table[number] = added[number].content.encode()
        elif byte_level:
            if all(character in alphabet for character in text):
                table[number] = bytes(alphabet[character] for character in text)
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            table[number] = bytes([int(text[3:5], 16)])
        else:
            table[number] = text.replace("\u2581", " ").encode()
    return {number: text for number, text in table.items() if text}


class Letters(NamedTuple):
    """Tokens spelt out.

    Attributes:
        tokens: (N,) ids, in order.
        length: (N,) characters of each.
        start: (N,) where they begin in ``flat``.
        flat: characters of all tokens one after the other, as places in ``characters``.
        characters: all that there are.
        broken: other tokens, which begin or end within a character.
    """

    tokens: np.ndarray
    length: np.ndarray
    start: np.ndarray
    flat: np.ndarray
    characters: list[str]
    broken: list[int]


class Vocabulary:
    """Token ids arranged by the bytes they write."""

    def __init__(self, bytes_of: dict[int, bytes]):
        self.bytes_of = bytes_of
        # A node is (tokens that end here, {byte: node}).
        self.root: tuple[list[int], dict[int, Any]] = ([], {})
        for number, text in sorted(bytes_of.items()):
            node = self.root
            for byte in text:
                node = node[1].setdefault(byte, ([], {}))
            node[0].append(number)

    @cached_property
    def letters(self) -> Letters:
        """The tokens that are whole characters, as arrays."""
        whole, broken = {}, []
        for number, text in sorted(self.bytes_of.items()):
            try:
                whole[number] = text.decode()
            except UnicodeDecodeError:
                broken.append(number)
        # As numbers, since numpy drops NUL at the end of a text.
        written = np.frombuffer("".join(whole.values()).encode("utf-32-le"), dtype=np.uint32)
        characters, flat = np.unique(written, return_inverse=True)
        length = np.array([len(text) for text in whole.values()], dtype=np.int64)
        tokens = np.array(list(whole), dtype=np.int64)
        return Letters(tokens, length, np.cumsum(length) - length, flat, list(map(chr, characters)), broken)

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a transformers tokenizer."""
        return cls(token_bytes(tokenizer))

    @staticmethod
    def below(further: dict[int, Any], text: bytes) -> list[int]:
        """Tokens that begin with ``text``, seen from the node whose further bytes these are."""
        node: tuple[list[int], dict[int, Any]] = ([], further)
        for byte in text:
            if byte not in node[1]:
                return []
            node = node[1][byte]
        found, stack = [], [node]
        while stack:
            tokens, after = stack.pop()
            found += tokens
            stack += after.values()
        return found

    def starting_with(self, text: str) -> list[int]:
        """Tokens whose bytes begin with ``text``."""
        prefix = text.encode()
        return [number for number, written in self.bytes_of.items() if written.startswith(prefix)]
