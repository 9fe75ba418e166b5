"""Tiny tokenizers, models and tries for tests, and plain numpy samplers to check decal's against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decal.samplers.trie import Policy, TokenTrie, TrieBuilder
from decal.samplers.valid_set import ValidSet
from decal.samplers.vocabulary import Vocabulary

EOS = "<|end|>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[reply]{% endif %}"


def byte_level(texts: Sequence[str] = (), merges: int = 0, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the 256 bytes and up to ``merges`` merges learnt from ``texts``."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(texts: Sequence[str], newlines: int = 0) -> PreTrainedTokenizerFast:
    """BPE in the manner of SentencePiece: spaces as U+2581, bytes as fallback, runs of line breaks as added tokens."""
    alphabet = sorted(set("".join(texts).replace(" ", "\u2581")) - {"\n"})
    pieces = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    backend = Tokenizer(
        tokenizer_models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", EOS])
    backend.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(1, newlines + 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def builder(tokenizer: PreTrainedTokenizerFast) -> TrieBuilder:
    """As the evaluator makes it for a model with that tokenizer."""
    return TrieBuilder(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        Vocabulary.of(tokenizer),
        [tokenizer.eos_token_id],
    )


def compile_trie(
    tokenizer: PreTrainedTokenizerFast, valid: ValidSet | Sequence[str], policy: Policy | None = None
) -> tuple[TokenTrie, Callable[..., None] | None]:
    """Trie of the answers, and the function that grows it."""
    if not isinstance(valid, ValidSet):
        valid = ValidSet.from_list(valid)
    return builder(tokenizer).build(valid, policy or Policy())


def llama(vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 0.6) -> LlamaForCausalLM:
    """A random Llama; ``spread`` is the standard deviation of its weights, so a larger one makes peakier rows."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return seeded(LlamaForCausalLM, config, seed).to(dtype)


def seeded(kind: type, config: Any, seed: int = 0) -> Any:
    """A model with random weights that depend on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval().requires_grad_(False)


def trie_of(answers: Iterable[Sequence[int]], ends: Sequence[int] = ()) -> TokenTrie:
    """The trie of token sequences, numbered in order."""
    listed = list(answers)
    trie = TokenTrie(len(listed), tuple(ends))
    for number, tokens in enumerate(listed):
        trie.insert(tokens, number)
    return trie


def random_answers(rng: np.random.Generator, alphabet: Sequence[int], depth: int, count: int) -> list[tuple[int, ...]]:
    """Distinct token sequences of 1 to ``depth`` tokens; some are prefixes of others."""
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        length = int(rng.integers(1, depth + 1))
        found[tuple(int(t) for t in rng.choice(alphabet, length))] = None
    return list(found)


def random_rows(rng: np.random.Generator, trie: TokenTrie, vocabulary: int, spread: float = 2.0) -> torch.Tensor:
    """(n, V) logits for every node, float32 values as models give them."""
    return torch.from_numpy(rng.normal(0, spread, (len(trie), vocabulary)).astype(np.float32))


def blocks(logits: torch.Tensor, size: int = 7) -> list[tuple[list[int], torch.Tensor]]:
    """Rows of all nodes, in blocks."""
    return [(list(range(i, min(i + size, len(logits)))), logits[i : i + size]) for i in range(0, len(logits), size)]


Steps = Sequence[tuple[str, float]]


def text_of(steps: Steps) -> str:
    """The chain of these steps, as text."""
    return " | ".join(f"{name}({value})" for name, value in steps)


def softmax(z: np.ndarray) -> np.ndarray:
    """Probabilities of logits (V,), -inf for none."""
    e = np.exp(z - z.max())
    return e / e.sum()


def sample_law(z: np.ndarray, steps: Steps) -> np.ndarray:
    """Next-token probabilities (V,) of logits (V,) under a chain, straight from the papers' definitions."""
    z = z.astype(np.float64)
    for name, value in steps:
        z = _SAMPLERS[name](z, value)
    return softmax(z)


def _cut(z: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Only ``keep``, and the most probable token always."""
    return np.where((keep & np.isfinite(z)) | (z == z.max()), z, -np.inf)


def _temperature(z: np.ndarray, t: float) -> np.ndarray:
    return np.where(z == z.max(), z, -np.inf) if t == 0 else z / t


def _flatten(z: np.ndarray, strength: float) -> np.ndarray:
    return np.where(np.isfinite(z), (1 - strength) * np.where(np.isfinite(z), z, 0.0), -np.inf)


def _top_k(z: np.ndarray, k: float) -> np.ndarray:
    better = (z[None, :] > z[:, None]).sum(-1)
    return _cut(z, better < k)


def _top_p(z: np.ndarray, mass: float) -> np.ndarray:
    p = softmax(z)
    before = np.array([p[p > own].sum() for own in p])
    return _cut(z, before < mass)


def _typical(z: np.ndarray, mass: float) -> np.ndarray:
    p = softmax(z)
    alive = np.isfinite(z)
    surprise = -np.log(np.where(alive, p, 1.0))
    off = np.where(alive, np.abs(surprise - (p * surprise).sum()), np.inf)
    before = np.array([p[off < own].sum() for own in off])
    return np.where((before < mass) & alive, z, -np.inf)


def _entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


_SAMPLERS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "temperature": _temperature,
    "flatten": _flatten,
    "top_k": _top_k,
    "top_p": _top_p,
    "typical": _typical,
    "min_p": lambda z, p: _cut(z, softmax(z) >= p * softmax(z).max()),
    "top_n_sigma": lambda z, n: _cut(z, z >= z.max() - n * z[np.isfinite(z)].std()),
    "epsilon": lambda z, eps: _cut(z, softmax(z) >= eps),
    "eta": lambda z, eps: _cut(z, softmax(z) >= min(eps, np.sqrt(eps) * np.exp(-_entropy(softmax(z))))),
    "top_a": lambda z, a: _cut(z, softmax(z) >= a * softmax(z).max() ** 2),
    "p_less": lambda z, k: _cut(z, softmax(z) >= k * (softmax(z) ** 2).sum()),
}
