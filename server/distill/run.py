"""A distillation from start to end: read, fuse, teach, measure, and put the student in its place as a whole.

    texts → windows → what the members say of each (kept in the cache) → targets → student, step by step → card

Until it is done all lies in a hidden folder beside `out`; killed at any moment, the same command goes on there.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage, mixture_of
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.kept.content_cache import digest
from ensemble_server.server.compare.kept.provenance import COMPUTING, versions
from ensemble_server.server.compare.measures.windows import Window
from ensemble_server.server.config.averages import model_named
from ensemble_server.server.config.blocks import Config, EngineConfig, VllmEngineConfig
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.disk.whole_file import write_whole
from ensemble_server.server.distill.card import CARD_FILE, Card, Figures
from ensemble_server.server.distill.lessons import Lessons, lessons_of
from ensemble_server.server.distill.listener import Listener
from ensemble_server.server.distill.records import Records
from ensemble_server.server.distill.scoring import ensemble_bits_per_byte, score
from ensemble_server.server.distill.student import Student, load_student, origin_of
from ensemble_server.server.distill.teacher import Teacher, check_room, kept_records, read_records
from ensemble_server.server.distill.texts import Material, check_unseen, read_material
from ensemble_server.server.distill.training import CHECKPOINT_FILE, Progress, train
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.rehearsal import rehearse
from ensemble_server.server.weights.checkpoints import cache_folder
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.vocabularies import family_of

RECORDS_BYTES = 2 * 2**30
_RUN_FILE, _BEFORE_FILE = "run.json", "before.json"


def distill(
    config: Config,
    wanted: Distillation,
    out: Path,
    listener: Listener,
    *,
    tests: Sequence[Path] = (),
    records_bytes: int = RECORDS_BYTES,
    cache: Path | None = None,
) -> Card:
    """Teach `wanted.student` and write it to the folder `out`. Blocks; runs an event loop of its own.

    `tests`: texts that will be measured on; none of them may stand in what is trained on. `records_bytes`: of what is
    kept of the teacher. `cache`: default `$ENSEMBLE_CACHE`. A student that stands in `out` already, made of the same
    things, is left as it is. Raises `ConfigError` and its kinds, `UnknownModelError`, `StorageError`.
    """
    mixture = _teacher_of(config, wanted.ensemble)
    assert isinstance(config.engine, EngineConfig), "others are refused"
    origin = origin_of(config, wanted, mixture)
    material = read_material([Path(path) for path in wanted.text], held_out=wanted.held_out)
    check_unseen(material, tests)
    made_of = _made_of(config, wanted, material)
    if (out / CARD_FILE).is_file() and (card := Card.load(out)).fingerprint == digest(made_of):
        return card
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and holds something else; give another --out")
    with _work_folder(out, made_of) as work:
        reading = _read(config, wanted, mixture, material, cache or cache_folder(), records_bytes, listener)
        if config.engine.num_threads is not None:
            import torch

            torch.set_num_threads(config.engine.num_threads)
        listener.stage(f"loading {origin.base}")
        student = load_student(origin, rank=wanted.rank, is_full=wanted.full, seed=wanted.seed)
        before = _before(student, reading, wanted, work, listener)
        progress = _train(student, reading, wanted, work, listener)
        listener.stage("measuring what was held out")
        after = _score(student, reading, wanted, listener)
        card = Card(
            fingerprint=digest(made_of),
            ensemble=wanted.ensemble,
            student=wanted.student,
            base=origin.base,
            is_adapter=not wanted.full,
            settings=_settings(wanted),
            teacher=config.models[wanted.ensemble].model_dump(mode="json", exclude_defaults=True),
            files=material.sha256,
            num_train_tokens=sum(len(window.documents) for window in reading.train),
            num_held_out_tokens=sum(len(window.documents) for window in reading.held_out),
            share_seen=material.share_seen,
            steps=progress.step,
            minutes=progress.seconds / 60,
            before=before,
            after=after,
            ensemble_bits_per_byte=ensemble_bits_per_byte(mixture, reading.held_out, reading.of_held_out),
            versions=versions(COMPUTING),
        )
        _put_in_place(student, card, progress, work, out)
        return card


def _teacher_of(config: Config, name: str) -> Mixture:
    """Raises `UnknownModelError` or `ConfigError` for what cannot teach."""
    entry = model_named(config, name, param="ensemble")
    if not isinstance(entry, ProbabilityAverage.Config):
        raise ConfigError(
            f"{name!r} gives text, not next-token distributions: only a probability_average can teach what it expects"
        )
    if isinstance(config.engine, VllmEngineConfig):
        raise ConfigError("engine.kind: vllm shows no distributions of a text; distill with `kind: transformers`")
    if entry.when is not None:
        raise ConfigError(
            f"{name!r} has `when`: what is taught is the average itself; name one without it (its cost is that of "
            "reading each text once)"
        )
    return mixture_of(entry.members, entry.pool, entry.share)


def _settings(wanted: Distillation) -> dict[str, Any]:
    """As cards and fingerprints have them: texts by name."""
    settings = wanted.model_dump(mode="json")
    return settings | {"text": [Path(path).name for path in wanted.text]}


def fingerprint(config: Config, wanted: Distillation) -> str:
    """Of all that decides the student. Raises what reading the texts and the models' files raises."""
    return digest(
        _made_of(config, wanted, read_material([Path(path) for path in wanted.text], held_out=wanted.held_out))
    )


def _made_of(config: Config, wanted: Distillation, material: Material) -> dict[str, Any]:
    """All that decides the result, but the time that there is for it."""
    settings = {key: value for key, value in _settings(wanted).items() if key not in ("minutes", "text")}
    models = [wanted.ensemble, wanted.student, *([wanted.init] if wanted.init in config.models else [])]
    return {
        "settings": settings,
        "texts": list(material.sha256.values()),
        "models": [identity(config, name) for name in models],
    }


@contextmanager
def _work_folder(out: Path, made_of: Mapping[str, Any]) -> Iterator[Path]:
    """Beside `out`, for one process at a time, and for one run: the checkpoint of a killed one is gone on with. What
    ends before there is a checkpoint leaves nothing."""
    from filelock import FileLock, Timeout

    work = out.with_name(f".{out.name}.distilling")
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as exc:
        raise ConfigError(f"{out}: another process is distilling there; wait for it, or give another --out") from exc
    try:
        _claim(work, made_of)
        yield work
        shutil.rmtree(work)
    finally:
        if not (work / CHECKPOINT_FILE).exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def _claim(work: Path, made_of: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if the checkpoint there is that of another run."""
    told = work / _RUN_FILE
    if (other := _differences(json.loads(told.read_bytes()), made_of) if told.is_file() else None) is not None:
        if other and (work / CHECKPOINT_FILE).exists():
            raise ConfigError(
                f"{work} holds a run that was begun with another {other[0]}; delete that folder, or give another --out"
            )
        if other:
            (work / _BEFORE_FILE).unlink(missing_ok=True)
    write_whole(told, json.dumps(made_of, indent=1).encode())


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    settings = [key for key, value in other["settings"].items() if one["settings"].get(key) != value]
    return [*settings, *(key for key in ("texts", "models") if one[key] != other[key])]


# --- the teacher ---


@dataclass(frozen=True)
class _Reading:
    """`lessons`: what is learnt; `test`: what the ensemble says of the held-out text. `vocab_size`: of the student."""

    train: list[Window]
    held_out: list[Window]
    lessons: Lessons
    test: Lessons
    of_held_out: Records
    vocab_size: int


def _read(
    config: Config,
    wanted: Distillation,
    mixture: Mixture,
    material: Material,
    cache: Path,
    records_bytes: int,
    listener: Listener,
) -> _Reading:
    listener.stage("reading the texts")
    names = [*mixture.weights, wanted.student]
    part = excerpt(config, [wanted.ensemble, wanted.student])
    rehearsal = rehearse(part)
    rehearsal.check(part)
    views = rehearsal.files.views
    _check_vocabularies(wanted, [views[name] for name in dict.fromkeys(names)])
    shortest = min(names, key=lambda name: views[name].max_model_len)
    if views[shortest].max_model_len < wanted.window:
        raise ConfigError(
            f"window: {wanted.window} tokens do not fit into the context of {shortest!r}, "
            f"{views[shortest].max_model_len}"
        )
    surface = views[next(iter(config.models[wanted.ensemble].members))].surface  # type: ignore[union-attr]
    train = material.train.windows(surface, window=wanted.window)
    held_out = material.held_out.windows(surface, window=wanted.window)
    if not train or not held_out:
        raise ConfigError("text: there is no token to learn or to hold out; give more text")
    wants = {"held out": held_out} | ({} if wanted.clm == 1 else {"trained on": train})
    check_room(
        [window for windows in wants.values() for window in windows],
        mixture,
        top_k=wanted.top_k,
        limit_bytes=records_bytes,
    )
    records = {
        what: kept_records(mixture, config, windows, top_k=wanted.top_k, cache=cache) for what, windows in wants.items()
    }
    if missing := {what: wants[what] for what, found in records.items() if found is None}:
        records |= asyncio.run(_ask(config, wanted, missing, cache, listener))
    of_held_out, of_train = records["held out"], records.get("trained on")
    assert of_held_out is not None, "what was missing has been read"
    return _Reading(
        train,
        held_out,
        Lessons(train) if of_train is None else lessons_of(wanted, mixture, train, of_train),
        lessons_of(wanted, mixture, held_out, of_held_out, is_test=True),
        of_held_out,
        views[wanted.student].vocab_size,
    )


def _check_vocabularies(wanted: Distillation, views: Sequence[MemberView]) -> None:
    """Raises `ConfigError` unless the student knows every token that a member may expect."""
    try:
        family = family_of(views)
    except ModelLoadError as exc:
        raise ConfigError(f"{wanted.ensemble!r} cannot teach {wanted.student!r} across vocabularies: {exc}") from exc
    place = [view.name for view in views].index(wanted.student)
    if family.lacking[place]:
        raise ConfigError(
            f"student: {wanted.student!r} lacks {len(family.lacking[place])} tokens that members of "
            f"{wanted.ensemble!r} have; resize its embeddings, or take a member that has them as the student"
        )


async def _ask(
    config: Config, wanted: Distillation, missing: Mapping[str, Sequence[Window]], cache: Path, listener: Listener
) -> dict[str, Records | None]:
    listener.stage(f"loading the members of {wanted.ensemble}")
    async with Hosting.open(excerpt(config, [wanted.ensemble])) as hosting:
        model = hosting.models[wanted.ensemble]
        assert isinstance(model, ProbabilityAverage), "as its config says"
        teacher = Teacher(wanted.ensemble, model.mixture, model)
        found: dict[str, Records | None] = {}
        for what, windows in missing.items():
            listener.stage(f"{wanted.ensemble} reads what is {what}")
            found[what] = await read_records(
                teacher, config, windows, top_k=wanted.top_k, cache=cache, on_window=listener.progress
            )
    return found


# --- the student ---


def _before(student: Student, reading: _Reading, wanted: Distillation, work: Path, listener: Listener) -> Figures:
    """Of the student as it starts; measured once, however often the run goes on."""
    known = work / _BEFORE_FILE
    if known.is_file():
        return Figures.model_validate_json(known.read_bytes())
    listener.stage("measuring what is held out")
    before = _score(student, reading, wanted, listener)
    write_whole(known, before.model_dump_json().encode())
    return before


def _score(student: Student, reading: _Reading, wanted: Distillation, listener: Listener) -> Figures:
    return score(
        student.model,
        reading.test,
        vocab_size=reading.vocab_size,
        device=student.device,
        batch_size=wanted.batch_size,
        on_window=listener.progress,
    )


def _train(student: Student, reading: _Reading, wanted: Distillation, work: Path, listener: Listener) -> Progress:
    listener.stage("training")

    def on_step(progress: Progress) -> None:
        last = progress.losses[-1]
        listener.losses(last.clm, last.kl)
        listener.progress(progress.step, progress.num_steps)

    return train(student, reading.lessons, wanted, vocab_size=reading.vocab_size, folder=work, on_step=on_step)


def _put_in_place(student: Student, card: Card, progress: Progress, work: Path, out: Path) -> None:
    """All files are there before the folder has its name."""
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    student.save(finished)
    card.write(finished, progress.losses)
    if out.exists():
        out.rmdir()
    finished.rename(out)
