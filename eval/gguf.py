"""Convert a GGUF file, once, to a folder that transformers loads in a second or two.

transformers reads GGUF itself, but slowly, and it needs accelerate for that. The Llama architecture is simple enough
to convert directly; every other one goes through transformers. Weights end up in float32 either way.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from decal.eval.paths import require_space
from decal.samplers.errors import DecalError

# Part of the cache key and of fingerprints: raise it when a conversion comes out differently than before.
VERSION = 1

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Files name one token that ends a text, while chat models are trained to stop at others too.
_END_OF_TEXT = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "</s>")


class _Unmapped(Exception):
    """The file has tensors or settings that the direct conversion does not know."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def transformers_major() -> int:
    """The major version of the installed transformers."""
    return int(version("transformers").split(".")[0])


def require_converter(architecture: str) -> None:
    """Raise DecalError unless the packages that convert a GGUF file of this architecture are installed."""
    if importlib.util.find_spec("gguf") is None:
        raise DecalError("reading a GGUF file needs the package gguf; run: pip install gguf")
    if architecture.startswith("gemma") and transformers_major() < 5:
        # version 4 orders the merges of Gemma's vocabulary by score, and most words come out in wrong pieces
        raise DecalError(f"converting a GGUF file of architecture {architecture!r} needs transformers 5 or newer")
    if architecture != "llama" and importlib.util.find_spec("accelerate") is None:
        raise DecalError(
            f"converting a GGUF file of architecture {architecture!r} needs the package accelerate; run: pip install accelerate"
        )


def convert(path: Path, folder: Path) -> None:
    """Write configuration, float32 weights and tokenizer of the GGUF file `path` into `folder`, which must exist.

    Takes seconds for a Llama of 135 M parameters, a minute for other architectures of that size. Raises DecalError
    if the file is no GGUF file, is one of several parts, uses something that would be lost in conversion, if a
    package is missing, or if the disk has no room for 4 bytes per parameter.
    """
    reader = _open(path)
    architecture = str(_require(reader, "general.architecture"))
    require_converter(architecture)
    _refuse_what_would_be_lost(reader, architecture, path)
    require_space(folder, 4 * sum(int(tensor.n_elements) for tensor in reader.tensors), f"converting {path.name}")
    with quiet():
        try:
            if architecture == "llama":
                try:
                    _convert_llama(reader, folder)
                except _Unmapped as reason:
                    _require_fallback(path, reason)
                    _convert_with_transformers(path, folder)
            else:
                _convert_with_transformers(path, folder)
            _save_tokenizer(reader, path, folder)
            _save_generation_config(reader, folder)
        except DecalError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            # an OSError with a number is the disk's; transformers raises others for what it cannot find in a file
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DecalError(f"cannot convert {path}: {one_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: progress bars and hints meant for someone who calls it directly.

    Everything written to standard error inside the block is dropped, for some of the bars cannot be switched off.
    Errors are exceptions and get through.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _open(path: Path) -> Any:
    require_converter("llama")
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise DecalError(f"{path} is not a readable GGUF file: {one_line(error)}") from error


def _field(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _require(reader: Any, key: str) -> Any:
    value = _field(reader, key)
    if value is None:
        raise DecalError(f"the GGUF file lacks the field {key}")
    return value


def _refuse_what_would_be_lost(reader: Any, architecture: str, path: Path) -> None:
    """Refuse files that would convert without complaint and then give wrong logits."""
    parts = int(_field(reader, "split.count", 0))
    if parts > 1:
        raise DecalError(f"{path} is one of {parts} parts; merge them into one GGUF file first")
    scaling = _field(reader, f"{architecture}.rope.scaling.type", "none")
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))]
    if factors or scaling != "none":
        what = factors[0] if factors else f"rope scaling {scaling!r}"
        raise DecalError(f"{path} rescales rotary frequencies ({what}), which GGUF conversion does not support")


def _require_fallback(path: Path, reason: _Unmapped) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise DecalError(
            f"{path}: {reason}; converting it through transformers needs the package accelerate; run: pip install accelerate"
        )


def _convert_llama(reader: Any, folder: Path) -> None:
    config = _llama_config(reader)
    weights = _llama_weights(reader, config)
    _check_complete(weights, config)
    config.save_pretrained(folder)
    _save_weights(weights, folder)


def _llama_config(reader: Any) -> Any:
    from transformers import LlamaConfig

    heads, width = _whole(reader, "attention.head_count"), _whole(reader, "embedding_length")
    head_dim = _whole(reader, "attention.key_length", width // heads)
    if _whole(reader, "rope.dimension_count", head_dim) != head_dim:
        raise _Unmapped("rotary embeddings cover only a part of each head")
    theta = float(_field(reader, "llama.rope.freq_base", 10000.0))
    embeddings = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embeddings is None:
        raise DecalError("the GGUF file lacks the tensor token_embd.weight")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=int(embeddings.shape[1]),
        hidden_size=width,
        intermediate_size=_whole(reader, "feed_forward_length"),
        num_hidden_layers=_whole(reader, "block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_whole(reader, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_whole(reader, "context_length"),
        rms_norm_eps=float(_require(reader, "llama.attention.layer_norm_rms_epsilon")),
        # transformers 4 reads the first of these and transformers 5 the second
        rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _whole(reader: Any, key: str, default: int | None = None) -> int:
    """A whole number of the Llama section, which some files give per layer instead."""
    value = _field(reader, f"llama.{key}", default)
    if value is None:
        raise DecalError(f"the GGUF file lacks the field llama.{key}")
    if isinstance(value, list):
        raise _Unmapped(f"llama.{key} differs between layers")
    return int(value)


def _llama_weights(reader: Any, config: Any) -> dict[str, Any]:
    import gguf
    import numpy as np
    import torch

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        *block, part, kind = tensor.name.split(".")
        if part not in _LLAMA_NAMES or kind != "weight":
            raise _Unmapped(f"the tensor {tensor.name} is not part of a plain Llama")
        if part in heads:
            values = _unpermute(values, heads[part])
        prefix = f"model.layers.{block[1]}." if block else ""
        # a copy, for the file's own memory map is read-only and goes away
        weights[f"{prefix}{_LLAMA_NAMES[part]}.weight"] = torch.from_numpy(np.array(values, dtype=np.float32))
    return weights


def _unpermute(values: Any, heads: int) -> Any:
    """Undo llama.cpp's order of rows, which interleaves the two halves of each head for its rotary embedding."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _check_complete(weights: dict[str, Any], config: Any) -> None:
    """Raise _Unmapped unless the weights are those of the model that `config` describes, in name and shape."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {name: value.shape for name, value in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise _Unmapped(f"{len(wrong)} tensors are missing or of another shape, {wrong[0]} first")


def _save_weights(weights: dict[str, Any], folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise DecalError(f"cannot write the converted weights in {folder}: {one_line(error)}") from error


def _convert_with_transformers(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with _alone(path, folder) as source:
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, **_unpacked())
    # the weights are plain float32 by now, but transformers refuses to save, or to reload, what it calls quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)


def _unpacked() -> dict[str, Any]:
    """The argument that keeps newer versions of transformers from leaving weights in their quantised blocks."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


@contextlib.contextmanager
def _alone(path: Path, folder: Path) -> Iterator[Path]:
    """The GGUF file in a folder of its own, lest transformers pick up a tokenizer that lies beside it."""
    place = folder / "source"
    place.mkdir()
    source = place / "model.gguf"
    try:
        os.symlink(path.resolve(), source)
    except OSError:
        shutil.copyfile(path, source)
    try:
        yield source
    finally:
        shutil.rmtree(place)


def _save_tokenizer(reader: Any, path: Path, folder: Path) -> None:
    if _field(reader, "tokenizer.ggml.model") == "gpt2" and _pre_tokenizer(reader) is not None:
        _byte_level_tokenizer(reader).save_pretrained(folder)
        return
    from transformers import AutoTokenizer

    with _alone(path, folder) as source:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)


def _pre_tokenizer(reader: Any) -> Any:
    """How a byte-level vocabulary splits text before merging, or None if transformers has to find out.

    SmolLM is here because transformers takes it for GPT-2 and so splits spaces before digits differently.
    """
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    return known.get(_field(reader, "tokenizer.ggml.pre", ""))


def _byte_level_tokenizer(reader: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _require(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _require(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer(reader)
    backend.decoder = decoders.ByteLevel()
    kinds = _token_kinds(reader, tokens)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    named = _named_tokens(reader, tokens)
    if _field(reader, "tokenizer.ggml.add_bos_token", False) and "bos_token" in named:
        backend.post_processor = _start_with(named["bos_token"], tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[
            token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL and token not in named.values()
        ],
        model_max_length=int(_field(reader, "llama.context_length", 1 << 30)),
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    return tokenizer


def _start_with(token: str, tokens: list[str]) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B:1"], special_tokens=[(token, tokens.index(token))]
    )


def _named_tokens(reader: Any, tokens: list[str]) -> dict[str, str]:
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: _field(reader, f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _token_kinds(reader: Any, tokens: list[str]) -> list[int]:
    return _field(reader, "tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)


def _save_generation_config(reader: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    ends = _end_ids(reader)
    GenerationConfig(
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=ends or None,
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id", ends[0] if ends else None),
    ).save_pretrained(folder)


def _end_ids(reader: Any) -> list[int]:
    """Ids of the tokens that end a text, the one the file names first."""
    tokens: list[str] = _require(reader, "tokenizer.ggml.tokens")
    kinds = _token_kinds(reader, tokens)
    named = [_field(reader, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    known = [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL and token in _END_OF_TEXT
    ]
    return list(dict.fromkeys(int(index) for index in [*named, *known] if index is not None))
