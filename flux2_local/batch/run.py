"""Doing a job: open the folder, skip what is finished, store every picture and then its manifest line."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import files
from ..errors import Flux2Error, OutputError
from ..many import grouped
from .job import Job, Picture
from .manifest import Manifest, Record
from .stores import Store, TakenError, clear, discard, make_store, manifest_of

if TYPE_CHECKING:
    from ..request import Request
    from ..result import Result


class Engine(Protocol):
    """Makes pictures."""

    @property
    def facts(self) -> Record:
        """What decides the pixels, as :meth:`Batch.settle` takes it."""

    def batch(self, request: Request) -> int:
        """How many pictures like this one are denoised together."""

    def __call__(self, groups: Iterator[list[Picture]]) -> Iterator[tuple[Picture, Result | Flux2Error]]:
        """Make groups that are each denoised together; every picture, in order, with its result or why there is none."""


FACTS = "batch.json"


@dataclass(frozen=True)
class Target:
    """Where a batch goes.

    Attributes:
        folder: for pictures and manifest.
        layout: "files", "imagefolder" or "webdataset".
        shard_size: pictures per WebDataset shard.
        resume: go on with what is there.
        overwrite: begin anew and write over what is there.
    """

    folder: Path
    layout: str = "files"
    shard_size: int = 1000
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Failure:
    """A picture that was not made, and why."""

    line: int
    number: int
    reason: str


@dataclass
class Batch:
    """A job on its way into its folder. Make one with :func:`open_batch`.

    Attributes:
        before: pictures that an earlier run had finished.
        made: pictures that this run has finished.
        failures: pictures that could not be made; the next run tries them again.
    """

    job: Job
    target: Target
    store: Store
    manifest: Manifest
    before: int
    made: int = 0
    failures: list[Failure] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since work began."""
        return time.perf_counter() - self.start

    @property
    def rate(self) -> float:
        """Pictures per second of this run."""
        return self.made / self.seconds

    @property
    def left(self) -> int:
        """Pictures still to be made or tried."""
        return self.job.count - self.before - self.made - len(self.failures)

    def settle(self, facts: Record) -> list[str]:
        """Compare what makes the pictures with what made those that are there; where these are to be written over, remove them.
        To be called once the model is loaded, before :meth:`work`.

        Args:
            facts: ``fixed``, which pictures of one batch must share, and ``machine``, which may move their last bits.

        Returns:
            Notes on what differs without being wrong.

        Raises:
            OutputError: something fixed differs, or what is there cannot be removed.
        """
        folder, known = self.target.folder, read_facts(self.target.folder)
        facts = {"fixed": {**facts["fixed"], **options(self.job, self.target)}, "machine": facts["machine"]}
        if self.target.overwrite:
            self.begin_anew(known)
        elif known is not None:
            check_fixed(folder, known["fixed"], facts["fixed"])
            if self.before:
                moved = differences(known["machine"], facts["machine"])
                note = f"The folder was begun on another machine or setup, which can move last bits: {moved}."
                return [note] if moved else []
        files.write(folder / FACTS, json.dumps(facts, indent=1).encode() + b"\n")
        return []

    def begin_anew(self, known: Record | None) -> None:
        """Remove the batch that is there: the pictures that its manifest names, then its manifest, in whatever layout it was."""
        fixed = known["fixed"] if known else {}
        old = manifest_of(fixed.get("layout", self.target.layout), self.target.folder)
        discard(old)
        if old != self.manifest.path:
            old.unlink(missing_ok=True)
        self.manifest.clear()
        self.store.begin(())

    def work(self, engine: Engine, tell: Callable[[Batch], Any] = lambda batch: None) -> None:
        """Make and store every picture that is not there yet.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            Cancelled: the caller stopped it. What is finished is kept.
            Flux2Error: something that no picture could be made under.
        """
        self.start = time.perf_counter()
        for picture, result in engine(self.groups(engine.batch)):
            if self.has(picture):
                continue
            if isinstance(result, Flux2Error):
                self.failures.append(Failure(picture.line, picture.number, str(result)))
            else:
                self.keep(picture, result)
            tell(self)

    def has(self, picture: Picture) -> bool:
        """Whether it is finished."""
        return (picture.line, picture.number) in self.manifest.done

    def groups(self, batch: Callable[[Request], int]) -> Iterator[list[Picture]]:
        """What is denoised together, where any of it is not finished. A group is always made whole: it follows from the job,
        so that no last bit depends on where an earlier run ended."""
        groups = grouped(self.job.pictures(), lambda p: p.request, lambda p: batch(p.request))
        return (group for group in groups if not all(map(self.has, group)))

    def keep(self, picture: Picture, result: Result) -> None:
        """Store a picture, then say so in the manifest."""
        try:
            stored = self.store.keep(picture, result.images[0], make_record(picture, result))
        except TakenError as error:
            self.failures.append(Failure(picture.line, picture.number, f"{error}."))
            return
        self.manifest.append(stored)
        self.made += 1


@contextmanager
def open_batch(job: Job, target: Target) -> Iterator[Batch]:
    """Check the target and open it, before any model is loaded. No other process can work on it meanwhile.

    Raises:
        OutputError: it holds pictures and neither resuming nor overwriting was asked for; it is at work already; it was
            made from other lines or with other options; files of others are in the way; it cannot be written.
        RequestError: no such layout.
    """
    store = make_store(target.layout, target.folder, target.shard_size, target.overwrite)
    files.check_folder(target.folder, 2**20)
    with ExitStack() as stack:
        stack.enter_context(lock(target.folder))
        check_options(job, target)
        for folder in {target.folder, store.manifest.parent}:
            clear(folder)
        check_free(job, target, store)
        manifest = stack.enter_context(Manifest(store.manifest, store.intact, anew=target.overwrite))
        check_same(job, manifest)
        if target.resume:
            check_left(job, store, manifest)
        if not target.overwrite:
            store.begin(manifest.done.values())
        batch = Batch(job, target, store, manifest, count_done(job, manifest))
        try:
            yield batch
        except BaseException:
            with suppress(OSError):
                store.end(manifest.done.values())
            raise
        try:
            store.end(manifest.done.values())
        except OSError as error:
            raise OutputError(f"{target.folder} cannot be completed: {files.reason(error)}.") from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other batches out of ``folder``; ends with the process, however it ends.

    Raises:
        OutputError: another batch is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two batches in one folder are the user's care
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"Another batch is at work in {folder}. Wait for it, or name another folder.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def check_free(job: Job, target: Target, store: Store) -> None:
    """Never write over what is there unasked.

    Raises:
        OutputError: a manifest without --resume, or a file in the way.
    """
    if target.overwrite or (target.resume and store.manifest.exists()):
        return
    if store.manifest.exists():
        raise OutputError(
            f"{target.folder} holds a batch already. Say --resume to go on with it, --overwrite to begin anew, or name "
            f"another folder with -o."
        )
    facts = target.folder / FACTS
    if (path := facts if facts.exists() else store.clash(job.pictures())) is not None:
        raise OutputError(f"{path} exists and would be written over. Name another folder with -o, or say --overwrite.")


def check_options(job: Job, target: Target) -> None:
    """Make sure that what is gone on with was begun with these options, before its manifest is read by them.

    Raises:
        OutputError: it was not.
    """
    if target.resume and (known := read_facts(target.folder)) is not None:
        now = options(job, target)
        check_fixed(target.folder, {name: value for name, value in known["fixed"].items() if name in now}, now)


def check_same(job: Job, manifest: Manifest) -> None:
    """Make sure that what is there was made from these lines.

    Raises:
        OutputError: naming the first line that has changed.
    """
    if not manifest.done:
        return
    for picture in job.pictures():
        entry = manifest.done.get((picture.line, picture.number))
        if entry is not None and entry.request != picture.digest:
            raise OutputError(
                f"Line {picture.line} asks for something else than {entry.file_name} was made from. Resume with the same "
                f"lines and options (new lines go at the end), or name another folder with -o."
            )


def check_left(job: Job, store: Store, manifest: Manifest) -> None:
    """Make sure that pictures not finished yet have their places, before any is generated.

    Raises:
        OutputError: naming a file in the way that cannot be theirs.
    """
    left = (p for p in job.pictures() if (p.line, p.number) not in manifest.done)
    if (path := store.clash(left, resumed=True)) is not None:
        raise OutputError(f"{path} is there already and is not this batch's. Move it, then resume.")


def count_done(job: Job, manifest: Manifest) -> int:
    """How many of the job's pictures are finished."""
    return sum((p.line, p.number) in manifest.done for p in job.pictures()) if manifest.done else 0


def options(job: Job, target: Target) -> Record:
    """What pictures of one batch share beside what makes them."""
    size = {"shard_size": target.shard_size} if target.layout == "webdataset" else {}
    return {"job_seed": job.sweep.job_seed, "layout": target.layout, **size}


def read_facts(folder: Path) -> Record | None:
    """What made the pictures that are there, where that can be read."""
    try:
        known = json.loads((folder / FACTS).read_bytes())
        return {name: dict(known[name]) for name in ("fixed", "machine")}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_fixed(folder: Path, before: Record, now: Record) -> None:
    """Make sure that a folder is gone on with as it was begun.

    Raises:
        OutputError: naming what differs.
    """
    if wrong := differences(before, now):
        raise OutputError(
            f"{folder} was begun with other options: {wrong}. Use the same ones, or another folder with -o."
        )


def differences(before: Record, now: Record) -> str:
    """What two records say differently, in words."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)} then, {now.get(name)} now" for name in names)


def make_record(picture: Picture, result: Result) -> Record:
    """A picture's manifest line: flat, with the same names in every line, and nothing that differs between two runs."""
    image = result.images[0]
    kept = image.settings
    return {
        "file_name": picture.file_name,
        "line": picture.line,
        "picture": picture.number,
        "prompt": picture.request.prompt,
        "expanded_prompt": kept.get("expanded_prompt"),
        "seed": result.seed,
        "width": image.width,
        "height": image.height,
        "nsfw": result.has_nsfw_concepts[0],
        **{name: kept[name] for name in ("guidance_scale", "steps", "model", "variant", "acceleration", "dtype")},
        "lora": [f"{name}={strength}" for name, strength in kept.get("lora", [])],
        "images": kept.get("images", []),
        "output_format": picture.request.output_format,
        "version": kept["version"],
        "request": picture.digest,
        "bytes": image.file_size,
        "sha256": hashlib.sha256(image.data).hexdigest(),
    }
