"""A distillation from start to end: read, fuse, teach, measure, and put the student in its place as a whole.

    texts → windows → what the members say of each (kept in the cache) → targets → student, step by step → card
    prompts → what the ensemble answers (kept there, too) → windows of which the answers are scored → as above

A probability average says what it expects of every token, of answers as of texts. Of other ensembles, and of single
models, there are answers alone, which are taught as plain text.

Until it is done all lies in a hidden folder beside `out`; killed at any moment, the same command goes on there.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage, mixture_of
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.kept.content_cache import digest
from ensemble_server.server.compare.kept.provenance import COMPUTING, versions
from ensemble_server.server.compare.measures.windows import Window
from ensemble_server.server.compare.planning.held_out import shared_sequences
from ensemble_server.server.config.averages import model_named
from ensemble_server.server.config.blocks import Config, EngineConfig, VllmEngineConfig
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.disk.whole_file import write_whole
from ensemble_server.server.distill.answers import answers_to
from ensemble_server.server.distill.card import CARD_FILE, Card, Figures
from ensemble_server.server.distill.chats import Prompts, read_prompts
from ensemble_server.server.distill.dialogues import Dialogues, cut_dialogues, rendered
from ensemble_server.server.distill.lessons import Lessons, lessons_of
from ensemble_server.server.distill.listener import Listener
from ensemble_server.server.distill.merged_start import check_tokens, merged_start
from ensemble_server.server.distill.records import Records
from ensemble_server.server.distill.scoring import ensemble_bits_per_byte, score
from ensemble_server.server.distill.student import Origin, Student, load_student, origin_of
from ensemble_server.server.distill.teacher import Teacher, check_room, kept_records, read_records
from ensemble_server.server.distill.texts import (
    Material,
    check_unseen,
    read_material,
    read_tests,
    windows_sha256,
)
from ensemble_server.server.distill.training import CHECKPOINT_FILE, Progress, train
from ensemble_server.server.distill.translation import Translation
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.rehearsal import rehearse
from ensemble_server.server.weights.checkpoints import cache_folder
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.vocabularies import family_of

RECORDS_BYTES = 2 * 2**30
_RUN_FILE, _BEFORE_FILE, _WINDOWS_FILE = "run.json", "before.json", "windows.sha256"


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
    mixture = _teacher_of(config, wanted)
    assert isinstance(config.engine, EngineConfig), "others are refused"
    origin = origin_of(config, wanted, mixture)
    material, prompts = _learnt_from(wanted)
    taught = material.train.whole_texts
    measured = read_tests(tests)
    check_unseen([*taught, *prompts.texts(held_out=False)], measured)
    made_of = _made_of(config, wanted, material, prompts)
    if (out / CARD_FILE).is_file() and (card := Card.load(out)).fingerprint == digest(made_of):
        return card
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and holds something else; give another --out")
    with _work_folder(out, made_of) as work:
        cache = cache or cache_folder()
        readers = _readers(config, wanted, mixture, listener)
        if wanted.chat and readers.translation is not None:
            mixture = None  # members would have to read each conversation in templates and tokens of their own
        dialogues = _dialogues(config, wanted, material, prompts, readers, cache, listener)
        if dialogues.texts_train:
            taught += dialogues.texts_train
            check_unseen(taught, measured)
        reading = _read(config, wanted, mixture, material, dialogues, readers, cache, records_bytes, listener)
        _hold_to(work, [*reading.train, *reading.held_out])
        if config.engine.num_threads is not None:
            import torch

            torch.set_num_threads(config.engine.num_threads)
        origin = _begun(origin, config, wanted, readers, cache, listener)
        listener.stage(f"loading {origin.base if origin.merge is None else origin.merge.path.name}")
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
            start=None if origin.merge is None else origin.merge.told,
            start_folder=None if wanted.full else origin.start_folder,
            settings=_settings(wanted),
            teacher=config.models[wanted.ensemble].model_dump(mode="json", exclude_defaults=True, exclude={"url"}),
            files=material.sha256 | dict(zip((Path(path).name for path in wanted.chat), prompts.sha256, strict=True)),
            has_targets=reading.lessons.records is not None,
            align=None if mixture is None or readers.translation is None else wanted.align,
            answers=dict(dialogues.counts),
            num_train_tokens=sum(len(window.documents) for window in reading.train),
            num_held_out_tokens=sum(len(window.documents) for window in reading.held_out),
            share_seen=shared_sequences([*material.held_out.whole_texts, *dialogues.texts_held_out], taught),
            steps=progress.step,
            minutes=progress.seconds / 60,
            before=before,
            after=after,
            ensemble_bits_per_byte=None
            if mixture is None or reading.of_held_out is None
            else ensemble_bits_per_byte(mixture, reading.held_out, reading.of_held_out),
            versions=versions(COMPUTING),
        )
        _put_in_place(student, card, progress, work, out)
        return card


def _teacher_of(config: Config, wanted: Distillation) -> Mixture | None:
    """None: it gives answers alone. Raises `UnknownModelError` or `ConfigError` for what cannot teach."""
    name = wanted.ensemble
    entry = model_named(config, name, param="ensemble")
    if isinstance(entry, ProbabilityAverage.Config):
        if isinstance(config.engine, VllmEngineConfig):
            raise ConfigError("engine.kind: vllm shows no distributions of a text; distill with `kind: transformers`")
        if entry.when is not None:
            raise ConfigError(
                f"{name!r} has `when`: what is taught is the average itself; name one without it (its cost is that of "
                "reading each text once)"
            )
        if entry.gate is not None:
            raise ConfigError(
                f"{name!r} has `gate`: what is taught is what the members gave, weighed as the text goes on; name an "
                "ensemble without it, the posterior pool itself"
            )
        return mixture_of(entry.members, entry.pool, entry.share)
    what = f"{name!r} gives text, not next-token distributions: only a probability_average can teach what it expects"
    if wanted.text:
        raise ConfigError(f"{what} of a text; what {name!r} answers to prompts can be taught: --chat, without --text")
    if wanted.model_fields_set & {"target", "level"} or ("clm" in wanted.model_fields_set and wanted.clm < 1):
        raise ConfigError(f"{what}; its answers are taught as plain text: leave target, level and clm out")
    if isinstance(config.engine, VllmEngineConfig):
        raise ConfigError("engine.kind: vllm trains nothing; distill with `kind: transformers`")
    return None


def _learnt_from(wanted: Distillation) -> tuple[Material, Prompts]:
    """Raises `ConfigError` for files that are not what they should be."""
    return (
        read_material([Path(path) for path in wanted.text], held_out=wanted.held_out),
        read_prompts([Path(path) for path in wanted.chat], held_out=wanted.held_out),
    )


def _settings(wanted: Distillation) -> dict[str, Any]:
    """As cards and fingerprints have them: files by name, and what is said of chats only where there are some."""
    settings = wanted.model_dump(mode="json", exclude=None if wanted.chat else {"chat", "answer_tokens", "temperature"})
    if wanted.align == "exact":
        del settings["align"]  # as in cards from before there were others
    if wanted.init_path is not None:
        settings["init"] = wanted.init_path.name
    return settings | {key: [Path(path).name for path in settings[key]] for key in ("text", "chat") if key in settings}


def fingerprint(config: Config, wanted: Distillation) -> str:
    """Of all that decides the student. Raises what reading the texts and the models' files raises."""
    return digest(_made_of(config, wanted, *_learnt_from(wanted)))


def _made_of(config: Config, wanted: Distillation, material: Material, prompts: Prompts) -> dict[str, Any]:
    """All that decides the result, but the time that there is for it."""
    settings = {key: value for key, value in _settings(wanted).items() if key not in ("minutes", "text", "chat")}
    models = [wanted.ensemble, wanted.student, *([wanted.init] if wanted.init in config.models else [])]
    merge = merged_start(config, wanted)
    chats = {"chats": list(prompts.sha256)} if wanted.chat else {}
    return {
        "settings": settings,
        "texts": list(material.sha256.values()),
        "models": [
            *(identity(config, name) for name in models),
            *([] if merge is None else [merge.digest(config, cache_folder())]),
        ],
        **chats,
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
    return [*settings, *(key for key in ("texts", "models", "chats") if one.get(key) != other.get(key))]


def _hold_to(work: Path, windows: Sequence[Window]) -> None:
    """Answers may have been deleted, and given anew, since the checkpoint was written. Raises `ConfigError` then."""
    told, sha256 = work / _WINDOWS_FILE, windows_sha256(windows)
    if told.is_file() and told.read_text(encoding="utf-8") != sha256:
        if (work / CHECKPOINT_FILE).exists():
            raise ConfigError(
                f"{work} holds a run that was begun with other answers; delete that folder, or give another --out"
            )
        (work / _BEFORE_FILE).unlink(missing_ok=True)
    write_whole(told, sha256.encode())


# --- the teacher ---


@dataclass(frozen=True)
class _Readers:
    """Who reads what is taught. `views`: the student's, and those of an average's members before it, by name.

    `strange`: ids that one of them does not know; `translation`: where one has another vocabulary than the student.
    """

    student: MemberView
    views: Mapping[str, MemberView]
    strange: frozenset[int]
    translation: Translation | None

    @property
    def shortest(self) -> MemberView:
        return min(self.views.values(), key=lambda view: view.max_model_len)


@dataclass(frozen=True)
class _Reading:
    """`lessons`: what is learnt; `test`: what the ensemble says of what is held out, where it says anything of tokens.
    `vocab_size`: of the student."""

    train: list[Window]
    held_out: list[Window]
    lessons: Lessons
    test: Lessons
    of_held_out: Records | None
    vocab_size: int


def _readers(config: Config, wanted: Distillation, mixture: Mixture | None, listener: Listener) -> _Readers:
    """Raises `ConfigError` for members and students that cannot read the same."""
    listener.stage("reading the texts" if wanted.text else "reading the prompts")
    part = excerpt(config, [wanted.ensemble, wanted.student])
    rehearsal = rehearse(part)
    rehearsal.check(part)
    names = dict.fromkeys([*(mixture.weights if mixture is not None else ()), wanted.student])
    views = {name: rehearsal.files.views[name] for name in names}
    is_over_bytes = rehearsal.averaged_over.get(wanted.ensemble) == "bytes"
    translation = None if mixture is None else _translation(wanted, mixture, views, is_over_bytes=is_over_bytes)
    strange = frozenset[int]() if translation else _strange_tokens(wanted, list(views.values()))
    readers = _Readers(views[wanted.student], views, strange, translation)
    shortest = readers.shortest
    if wanted.text and shortest.max_model_len < wanted.window:
        raise ConfigError(
            f"window: {wanted.window} tokens do not fit into the context of {shortest.name!r}, {shortest.max_model_len}"
        )
    if wanted.chat and not readers.student.surface.has_chat_template:
        raise ConfigError(
            f"student: {wanted.student!r} has no chat template in which it could read prompts; give its entry in the "
            "config a `chat_template`"
        )
    return readers


def _dialogues(
    config: Config,
    wanted: Distillation,
    material: Material,
    prompts: Prompts,
    readers: _Readers,
    cache: Path,
    listener: Listener,
) -> Dialogues:
    """The prompts with the ensemble's answers, which it gives now as far as it has not."""
    if not wanted.chat:
        return Dialogues()
    limit = readers.shortest.max_model_len
    ids = rendered(
        prompts.prompts,
        readers.student,
        limit=limit,
        answer_tokens=wanted.answer_tokens,
        strange=readers.strange,
    )
    answers = answers_to(prompts.prompts, config, wanted, cache=cache, listener=listener)
    num_before = sum(len(documents) for part in (material.train, material.held_out) for documents in part.texts)
    return cut_dialogues(prompts, ids, answers, readers.student, limit=limit, num_before=num_before)


def _read(
    config: Config,
    wanted: Distillation,
    mixture: Mixture | None,
    material: Material,
    dialogues: Dialogues,
    readers: _Readers,
    cache: Path,
    records_bytes: int,
    listener: Listener,
) -> _Reading:
    translation = readers.translation
    reader = next(iter(readers.views.values())) if translation is None else readers.student
    surface = reader.surface  # of a text: as the ensemble's first member reads it, or a student of other tokens
    train = [*material.train.windows(surface, window=wanted.window), *dialogues.train]
    held_out = [*material.held_out.windows(surface, window=wanted.window), *dialogues.held_out]
    if not train or not held_out:
        raise ConfigError("text: there is no token to learn or to hold out; give more text")
    vocab_size = readers.student.vocab_size
    if mixture is None:
        return _Reading(train, held_out, Lessons(train), Lessons(held_out), None, vocab_size)
    wants = {"held out": held_out} | ({} if wanted.clm == 1 else {"trained on": train})
    check_room(
        [window for windows in wants.values() for window in windows],
        mixture,
        top_k=wanted.top_k,
        limit_bytes=records_bytes,
    )
    records = {
        what: kept_records(mixture, config, windows, top_k=wanted.top_k, cache=cache, translation=translation)
        for what, windows in wants.items()
    }
    if missing := {what: wants[what] for what, found in records.items() if found is None}:
        records |= asyncio.run(_ask(config, wanted, missing, translation, cache, listener))
    of_held_out, of_train = records["held out"], records.get("trained on")
    assert of_held_out is not None, "what was missing has been read"
    return _Reading(
        train,
        held_out,
        Lessons(train) if of_train is None else lessons_of(wanted, mixture, train, of_train),
        lessons_of(wanted, mixture, held_out, of_held_out, is_test=True),
        of_held_out,
        vocab_size,
    )


def _translation(
    wanted: Distillation, mixture: Mixture, views: Mapping[str, MemberView], *, is_over_bytes: bool
) -> Translation | None:
    """None if all have one vocabulary. Raises `ConfigError` for what cannot be told in other tokens."""
    try:
        family_of(list(views.values()))
        if not is_over_bytes:
            if "align" in wanted.model_fields_set:
                raise ConfigError(
                    f"align: {wanted.student!r} and the members of {wanted.ensemble!r} have one vocabulary"
                )
            return None
    except ModelLoadError:  # of no family
        pass
    if mixture.pool == "geometric":
        raise ConfigError(
            f"{wanted.ensemble!r} cannot teach {wanted.student!r} across vocabularies: its geometric pool is "
            "normalised over bytes, and is no average of what its members expect of a token; take an arithmetic "
            "or a posterior one"
        )
    if wanted.chat and (wanted.text or wanted.model_fields_set & {"target", "level", "clm", "align"}):
        raise ConfigError(
            f"chat: answers of {wanted.ensemble!r} are taught to {wanted.student!r} as plain text, since they have "
            "different vocabularies; leave out target, level, clm, align and --text"
        )
    try:
        return Translation(wanted.align, views[wanted.student], [views[name] for name in mixture.weights])
    except ModelLoadError as exc:
        raise ConfigError(f"{wanted.ensemble!r} cannot teach {wanted.student!r} across vocabularies: {exc}") from exc


def _strange_tokens(wanted: Distillation, views: Sequence[MemberView]) -> frozenset[int]:
    """Ids that not all know. Raises `ConfigError` unless the student knows every token that a member may expect."""
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
    return frozenset().union(*family.lacking)


async def _ask(
    config: Config,
    wanted: Distillation,
    missing: Mapping[str, Sequence[Window]],
    translation: Translation | None,
    cache: Path,
    listener: Listener,
) -> dict[str, Records | None]:
    listener.stage(f"loading the members of {wanted.ensemble}")
    async with Hosting.open(excerpt(config, [wanted.ensemble])) as hosting:
        model = hosting.models[wanted.ensemble]
        assert isinstance(model, ProbabilityAverage), "as its config says"
        teacher = Teacher(wanted.ensemble, model.mixture, model, translation)
        found: dict[str, Records | None] = {}
        for what, windows in missing.items():
            listener.stage(f"{wanted.ensemble} reads what is {what}")
            found[what] = await read_records(
                teacher, config, windows, top_k=wanted.top_k, cache=cache, on_window=listener.progress
            )
    return found


# --- the student ---


def _begun(
    origin: Origin, config: Config, wanted: Distillation, readers: _Readers, cache: Path, listener: Listener
) -> Origin:
    """With the weights of the merge that it starts from, where it starts from one. Raises what making them raises."""
    if origin.merge is None:
        return origin
    folder = origin.merge.folder(config, cache, listener.stage)
    check_tokens(folder, readers.student.surface.token_ids, wanted.student)
    return replace(origin, folder=folder, path=str(folder))


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
