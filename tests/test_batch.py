"""Pictures in bulk: nothing lost, nothing twice, the same bytes every time."""

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image
from typer.testing import CliRunner

from flux2_local import Flux2, errors, frames, images
from flux2_local.batch import engines, sheet
from flux2_local.batch.forecast import forecast
from flux2_local.batch.job import Sweep, make_job, parse_grid, parse_seeds
from flux2_local.batch.lines import BadLine, Line, read
from flux2_local.batch.manifest import Entry, Manifest
from flux2_local.batch.run import Target, open_batch
from flux2_local.batch.stores import make_store
from flux2_local.batch.worker import failure
from flux2_local.cli import app
from flux2_local.request import derive_seed
from flux2_local.result import ImageFile, Result, Timings
from flux2_local.settings import settings_of

PROMPTS = [
    {"prompt": "a red boat", "num_images": 2},
    {"prompt": "<b>two</b> & three", "seed": 7},
    {"prompt": "a red boat", "output_format": "webp"},
    {"prompt": "a fox"},
]
SMALL = {"image_size": "square", "num_inference_steps": 4, "enable_safety_checker": False}
FAST = ["--size", "square", "--steps", "4", "--no-safety-checker"]


def job_of(entries=PROMPTS, **sweep):
    return make_job([Line(n, e) for n, e in enumerate(entries, 1)], Sweep(defaults=SMALL, **sweep))


def draw(request):
    """A small picture that follows from a request, in place of a model's."""
    noise = hashlib.sha256(f"{request.seed} {request.prompt}".encode()).digest() * 24
    picture = Image.frombytes("RGB", (16, 16), noise)
    settings = {"version": "0", "model": "m", "variant": "standard", "acceleration": "none", "dtype": "float32"}
    settings |= {"seed": request.seed, "steps": 4, "guidance_scale": 2.5, "prompt": request.prompt}
    data = images.encode(picture, request.output_format, settings)
    kind = images.CONTENT_TYPES[request.output_format]
    file = ImageFile(data, 16, 16, kind, "x", settings)
    return Result((file,), Timings(), request.seed, (False,), request.prompt)


def drawing(pictures):
    """An engine that draws."""
    for picture in pictures:
        yield picture, draw(picture.request)


def stopping(after):
    """An engine whose caller cancels after some pictures."""

    def engine(pictures):
        for number, made in enumerate(drawing(pictures)):
            if number == after:
                raise errors.Cancelled("stop")
            yield made

    return engine


class Drawn:
    """An engine of a function of pictures, which are drawn ``together`` at a time."""

    facts: ClassVar = {"fixed": {}, "machine": {}}

    def __init__(self, draw, together=1):
        self.draw, self.together, self.groups = draw, together, []

    def batch(self, request):
        return self.together

    def __call__(self, groups):
        return self.draw(picture for group in groups for picture in self.groups.append(group) or group)


def do(folder, job=None, engine=drawing, together=1, **target):
    with open_batch(job or job_of(), Target(folder, **target)) as batch:
        batch.settle(Drawn.facts)
        batch.work(Drawn(engine, together))
    return batch


def contents(folder):
    """Every file below a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def whole(tmp_path):
    """A folder that was written without interruption."""
    do(tmp_path / "whole")
    return contents(tmp_path / "whole")


# Reading lines


def written(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return list(read(path))


def test_jsonl(tmp_path):
    data = b'\xef\xbb\xbf{"prompt":"a","seed":3,"image_size":"768x512"}\r\n\n"b"\n[1]\n{bad\n\xff\n{"prompt":"c"}'
    found = written(tmp_path, "p.jsonl", data)
    assert found[0] == Line(1, {"prompt": "a", "seed": 3, "image_size": {"width": 768, "height": 512}})
    assert found[1] == Line(3, {"prompt": "b"}) and found[-1] == Line(7, {"prompt": "c"})
    assert [(bad.number, isinstance(bad, BadLine)) for bad in found[2:5]] == [(4, True), (5, True), (6, True)]
    assert "JSON" in found[3].reason and "UTF-8" in found[4].reason


def test_null_leaves_a_field_to_the_options(tmp_path):
    """As an empty cell of a CSV does."""
    found = written(
        tmp_path, "p.jsonl", b'{"prompt": "a", "num_inference_steps": null, "image_size": null, "seed": null}'
    )
    (picture,) = make_job(found, Sweep(defaults=SMALL, grid={"seed": (3,)})).pictures()
    assert picture.request.num_inference_steps == SMALL["num_inference_steps"] and picture.request.seed == 3
    assert picture.request.image_size == SMALL["image_size"]


def test_csv(tmp_path):
    data = b'prompt,seed,images\r\na fox,3,\r\n\r\n"two\nlines",,a.png|b.png\r\nx,1,2,3\r\nb\xff,,\r\n"open,,\r\n'
    found = written(tmp_path, "p.csv", data)
    assert found[0] == Line(2, {"prompt": "a fox", "seed": "3"})
    assert found[1] == Line(4, {"prompt": "two\nlines", "images": ["a.png", "b.png"]})
    assert [bad.number for bad in found[2:]] == [6, 7, 8]
    assert "cells" in found[2].reason and "UTF-8" in found[3].reason and "CSV" in found[4].reason
    with pytest.raises(errors.RequestError, match="'size' is none of"):
        written(tmp_path, "p.csv", b"prompt,size\na,b\n")
    with pytest.raises(errors.RequestError, match="twice"):
        written(tmp_path, "p.csv", b"prompt,prompt\na,b\n")


def test_text_and_standard_input(tmp_path, monkeypatch):
    assert written(tmp_path, "p.txt", b"a\n\n  b  \n") == [Line(1, {"prompt": "a"}), Line(3, {"prompt": "b"})]
    for data, want in ((b'{"prompt":"a"}\n', "a"), (b"a boat\n", "a boat")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert list(read(Path("-"))) == [Line(1, {"prompt": want})]
    with pytest.raises(errors.RequestError, match="cannot be read"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(errors.RequestError, match="input-format"):
        read(tmp_path / "p.txt", "xml")


def test_bad_lines_are_told_with_number_and_reason(tmp_path):
    job = job_of([
        {"prompt": "a"},
        {"prompt": "a", "seeds": 3},
        {"prompt": " "},
        {"prompt": "a", "guidance_scale": 99},
        {"prompt": "a", "images": [str(tmp_path / "no.png")]},
        {"prompt": "a", "sync_mode": True},
        {"prompt": "b"},
    ])  # fmt: skip
    assert job.count == 2 and [line.number for line in job.lines] == [1, 7]
    words = ["seeds is not a field", "prompt is empty", "guidance_scale", "no picture", "sync_mode"]
    assert [bad.number for bad in job.bad] == [2, 3, 4, 5, 6]
    assert all(word in bad.reason for word, bad in zip(words, job.bad, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", ["~no-such-user/a.png"]),
        ("images", ["~backup.png"]),
        ("images", ["a" * 300]),
        ("images", ["http://[a"]),
        ("image_size", "512²x512"),
        ("image_size", f"{'9' * 5000}x512"),
    ],
)
def test_values_that_are_none_make_a_bad_line(tmp_path, field, value):
    job = make_job(written(tmp_path, "p.jsonl", json.dumps({"prompt": "a", field: value}).encode()), Sweep())
    assert not job.lines and job.bad[0].reason


# Sweeps


def test_a_grid_makes_every_combination():
    grid = {**parse_grid(["guidance_scale=2,3.5", "image_size=square,768x512"]), "seed": parse_seeds("1,5-6")}
    pictures = list(job_of([{"prompt": "a"}], grid=grid, repeat=2).pictures())
    assert len(pictures) == 2 * 2 * 3 * 2 and len({p.file_name for p in pictures}) == 24
    assert [p.place for p in pictures] == list(range(24)) == [p.number for p in pictures]
    assert [p.request.seed for p in pictures[:6]] == [1, 2, 5, 6, 6, 7]
    assert pictures[0].request.guidance_scale == 2 and pictures[-1].request.size == (768, 512)
    assert pictures[0].file_name == "000001-000-a.png"
    clash = job_of([{"prompt": "a", "seed": 3}], grid={"seed": (1,)})
    assert clash.count == 0 and "seed is given by the line and by the grid" in clash.bad[0].reason


@pytest.mark.parametrize("text", ["guidance=1,2", "seed", "prompt=a,b", "images=x", "seed=", "seed=1,1"])
def test_a_grid_that_is_none(text):
    with pytest.raises(errors.RequestError, match="--grid"):
        parse_grid([text])


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "1-2-3", "0-99999999"])
def test_seeds_that_are_none(text):
    with pytest.raises(errors.RequestError, match="--seeds"):
        parse_seeds(text)


def test_seeds_follow_from_the_place_and_the_job_seed():
    first, again, other = (list(job_of(job_seed=s).pictures()) for s in (0, 0, 1))
    assert first == again
    assert [p.request.seed for p in first][:3] == [derive_seed(0, 1), derive_seed(0, 1) + 1, 7]
    assert first[0].request.seed != other[0].request.seed and other[2].request.seed == 7
    assert derive_seed(0, 1) == 1032553591954910, "written down: it may never change"


# Nothing lost, nothing twice


def test_a_batch_writes_pictures_and_a_line_for_each(tmp_path):
    batch = do(tmp_path)
    assert (batch.made, batch.before, batch.failures) == (5, 0, [])
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text("utf-8").splitlines()]
    assert [(r["line"], r["picture"]) for r in records] == [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]
    for record in records:
        data = (tmp_path / record["file_name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record["sha256"] and len(data) == record["bytes"]
    assert records[3]["file_name"] == "000003-000-a-red-boat.webp" and records[2]["seed"] == 7
    assert len({tuple(r) for r in records}) == 1, "every line has the same names"


@pytest.mark.parametrize("layout", ["files", "imagefolder", "webdataset"])
@pytest.mark.parametrize("after", range(5))
def test_stopped_anywhere_and_resumed_is_the_same(tmp_path, layout, after):
    target = {"layout": layout, "shard_size": 2}
    do(tmp_path / "whole", **target)
    with pytest.raises(errors.Cancelled):
        do(tmp_path / "parts", engine=stopping(after), **target)
    batch = do(tmp_path / "parts", resume=True, **target)
    assert (batch.before, batch.made) == (after, 5 - after)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert do(tmp_path / "parts", resume=True, **target).made == 0


def test_what_is_denoised_together_follows_from_the_job(tmp_path):
    """Groups after an interruption are those of a run without one, whole, so that no last bit can depend on it."""
    job = job_of([{"prompt": f"number {n}"} for n in range(7)] + [{"prompt": "b", "guidance_scale": 3}] * 2)
    first, second, whole = (Drawn(drawing, 3), Drawn(drawing, 3), Drawn(drawing, 3))
    with open_batch(job, Target(tmp_path / "whole")) as batch:
        batch.work(whole)
    first.draw = stopping(4)
    with open_batch(job, Target(tmp_path / "parts")) as batch, pytest.raises(errors.Cancelled):
        batch.work(first)
    with open_batch(job, Target(tmp_path / "parts", resume=True)) as batch:
        batch.work(second)
    assert [[p.line for p in group] for group in whole.groups] == [[1, 2, 3], [4, 5, 6], [7], [8, 9]]
    assert [[p.line for p in group] for group in second.groups] == [[4, 5, 6], [7], [8, 9]]
    assert batch.made == 5 and contents(tmp_path / "parts") == contents(tmp_path / "whole")


def damage_torn(folder):
    path = folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-9])


def damage_zeros(folder):
    with (folder / "manifest.jsonl").open("ab") as f:
        f.write(bytes(100))


def damage_lost_line(folder):
    path = folder / "manifest.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def damage_lost_picture(folder):
    (folder / "000002-000-b-two-b-three.png").unlink()


def damage_short_picture(folder):
    (folder / "000004-000-a-fox.png").write_bytes(b"x")
    damage_lost_line(folder)
    (folder / "000004-000-a-fox.png").unlink()
    (folder / ".000004-000-a-fox.png.abc.part").write_bytes(b"x")


def damage_doubled_line(folder):
    path = folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])


@pytest.mark.parametrize(
    "damage",
    [damage_torn, damage_zeros, damage_lost_line, damage_lost_picture, damage_short_picture, damage_doubled_line],
)
def test_what_a_crash_can_leave_is_mended(tmp_path, whole, damage):
    folder = tmp_path / "whole"
    damage(folder)
    do(folder, resume=True)
    after = contents(folder)
    lines, want = (sorted(c.pop("manifest.jsonl").splitlines()) for c in (after, whole))
    assert after == whole and lines == want


def test_a_shard_is_cut_where_its_manifest_ends(tmp_path):
    target = {"layout": "webdataset", "shard_size": 3}
    do(tmp_path / "whole", **target)
    with pytest.raises(errors.Cancelled):
        do(tmp_path / "parts", engine=stopping(2), **target)
    with (tmp_path / "parts" / "shard-000000.tar").open("ab") as f:
        f.write(b"half a picture")
    (tmp_path / "parts" / "shard-000001.tar").write_bytes(b"another half")
    do(tmp_path / "parts", resume=True, **target)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    with tarfile.open(tmp_path / "parts" / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["000001-000-a-red-boat.png", "000001-000-a-red-boat.json"] and len(names) == 6
        assert Image.open(tar.extractfile(names[0])).size == (16, 16)
        assert json.load(tar.extractfile(names[1]))["line"] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_killed_at_ten_random_moments(tmp_path, layout):
    """The real thing: kill -9 wherever it happens to be, between and within writes."""
    entries = [{"prompt": f"number {n}"} for n in range(60)]
    target = {"layout": layout, "shard_size": 7}
    do(tmp_path / "whole", job_of(entries), **target)
    folder, dice = tmp_path / "parts", random.Random(5)
    for _ in range(10):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                do(folder, job_of(entries), resume=True, **target)
            os._exit(0)
        done = len(list(folder.glob("*.*")))
        deadline = time.perf_counter() + 5
        while len(list(folder.glob("*.*"))) == done and time.perf_counter() < deadline and layout == "files":
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    do(folder, job_of(entries), resume=True, **target)
    assert contents(folder) == contents(tmp_path / "whole")


def test_nothing_is_written_over_unasked(tmp_path, whole):
    folder = tmp_path / "whole"
    with pytest.raises(errors.OutputError, match="--resume"):
        do(folder)
    other = tmp_path / "other"
    other.mkdir()
    mine = other / "000004-000-a-fox.png"
    mine.write_bytes(b"mine")
    with pytest.raises(errors.OutputError, match="a-fox.png exists"):
        do(other)
    assert contents(other) == {mine.name: b"mine"}
    damage_lost_line(folder)
    for taken in (b"mine", draw(next(job_of([{"prompt": "a fox", "seed": 1}]).pictures()).request).images[0].data):
        (folder / mine.name).write_bytes(taken)
        with (
            pytest.raises(errors.OutputError, match=r"a-fox.png is there already and is not this batch's"),
            open_batch(job_of(), Target(folder, resume=True)),
        ):
            pass
        assert (folder / mine.name).read_bytes() == taken
    do(folder, overwrite=True)
    assert contents(folder) == whole


LAYOUT_CHANGES = [
    ("files", "files"),
    ("webdataset", "webdataset"),
    ("files", "webdataset"),
    ("webdataset", "imagefolder"),
]


@pytest.mark.parametrize(("old", "new"), LAYOUT_CHANGES)
def test_an_interrupted_overwrite_is_resumed(tmp_path, old, new):
    folder, other = tmp_path / "parts", job_of([*PROMPTS[:3], {"prompt": "a fox", "guidance_scale": 3}], job_seed=1)
    do(tmp_path / "whole", other, layout=new, shard_size=2)
    do(folder, layout=old, shard_size=2)
    with pytest.raises(errors.Cancelled):
        do(folder, other, stopping(2), layout=new, shard_size=2, overwrite=True)
    batch = do(folder, other, layout=new, shard_size=2, resume=True)
    assert (batch.before, batch.made, batch.failures) == (2, 3, [])
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("old", "new"), LAYOUT_CHANGES)
def test_what_is_to_be_written_over_stays_until_the_model_is_loaded(tmp_path, old, new):
    do(tmp_path / "o", layout=old)
    before = contents(tmp_path / "o")
    (tmp_path / "p.txt").write_text("a fox\n", "utf-8")
    arguments = [
        str(tmp_path / "p.txt"),
        "-o",
        str(tmp_path / "o"),
        "--layout",
        new,
        "--overwrite",
        "-m",
        "no-such-model",
    ]
    done = CliRunner().invoke(app, ["batch", *arguments])
    assert isinstance(done.exception, errors.UnknownModelError)
    assert {name: contents(tmp_path / "o")[name] for name in before} == before


def test_what_a_manifest_names_elsewhere_is_not_removed(tmp_path):
    do(tmp_path / "o")
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    path = tmp_path / "o" / "manifest.jsonl"
    record = json.loads(path.read_text("utf-8").splitlines()[0])
    with path.open("a", encoding="utf-8") as f:
        f.writelines(json.dumps({**record, "file_name": name}) + "\n" for name in (str(mine), "../mine.png"))
    do(tmp_path / "o", overwrite=True)
    assert mine.read_bytes() == b"mine"


def test_other_lines_or_options_do_not_resume(tmp_path, whole):
    with pytest.raises(errors.OutputError, match="Line 2 asks for something else"):
        do(tmp_path / "whole", job_of([PROMPTS[0], PROMPTS[3]]), resume=True)
    facts = {"fixed": {"model": "a"}, "machine": {"threads": 1}}
    other = {"fixed": {"model": "b"}, "machine": {"threads": 1}}
    with open_batch(job_of(), Target(tmp_path / "new")) as batch:
        assert batch.settle(facts) == []
        batch.work(Drawn(drawing))
    with open_batch(job_of(), Target(tmp_path / "new", resume=True)) as batch:
        assert "threads 1 then, 2 now" in batch.settle({**facts, "machine": {"threads": 2}})[0]
        with pytest.raises(errors.OutputError, match="model a then, b now"):
            batch.settle(other)
    more = job_of([*PROMPTS, {"prompt": "one more"}])
    assert do(tmp_path / "whole", more, resume=True).made == 1, "lines may be added at the end"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layout": "files"}, "layout webdataset then, files now"),
        ({"layout": "imagefolder"}, "layout webdataset then, imagefolder now"),
        ({"shard_size": 3}, "shard_size 2 then, 3 now"),
        ({"job": job_of(job_seed=1)}, "job_seed 0 then, 1 now"),
    ],
)
def test_a_resume_with_other_options_changes_nothing(tmp_path, wrong, words):
    target = {"layout": "webdataset", "shard_size": 2}
    do(tmp_path / "whole", **target)
    with pytest.raises(errors.Cancelled):
        do(tmp_path / "parts", engine=stopping(3), **target)
    before = contents(tmp_path / "parts")
    with pytest.raises(errors.OutputError, match=words):
        do(tmp_path / "parts", **{**target, **wrong}, resume=True)
    assert contents(tmp_path / "parts") == before
    assert do(tmp_path / "parts", **target, resume=True).before == 3
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_folder_without_pictures_keeps_its_options_too(tmp_path):
    facts = {"fixed": {"model": "a"}, "machine": {}}
    with open_batch(job_of(), Target(tmp_path)) as batch:
        batch.settle(facts)
    before = contents(tmp_path)
    with open_batch(job_of(), Target(tmp_path, resume=True)) as batch:
        with pytest.raises(errors.OutputError, match="model a then, b now"):
            batch.settle({**facts, "fixed": {"model": "b"}})
        assert contents(tmp_path) == before
        assert batch.settle({**facts, "machine": {"threads": 2}}) == []


def test_a_picture_in_a_file_of_its_own_is_in_no_shard(tmp_path):
    assert not make_store("webdataset", tmp_path).intact(Entry("a.png", "", 1))


def test_one_batch_at_a_time_in_a_folder(tmp_path):
    with (
        open_batch(job_of(), Target(tmp_path)),
        pytest.raises(errors.OutputError, match="at work"),
        open_batch(job_of(), Target(tmp_path, resume=True)),
    ):
        pass


def test_a_failed_picture_does_not_stop_the_rest_and_is_tried_again(tmp_path, whole):
    def failing(pictures):
        for picture, result in drawing(pictures):
            yield picture, errors.OutOfMemoryError("too large") if picture.line == 2 else result

    batch = do(tmp_path / "parts", engine=failing)
    assert batch.made == 4 and [(f.line, f.reason) for f in batch.failures] == [(2, "too large")]
    assert do(tmp_path / "parts", resume=True).made == 1


@contextlib.contextmanager
def file_limit(size):
    """Files cannot grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_manifest_line_that_does_not_fit_leaves_no_trace(tmp_path, whole):
    path = tmp_path / "whole" / "manifest.jsonl"
    before = path.read_bytes()
    with Manifest(path, lambda entry: True) as manifest:
        with file_limit(len(before) + 20), pytest.raises(errors.OutputError, match="cannot be written"):
            manifest.append({**json.loads(before.splitlines()[0]), "line": 99})
        assert path.read_bytes() == before and (99, 0) not in manifest.done


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_a_full_disk(tmp_path, layout):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip("needs to mount a tmpfs")
    try:
        job = job_of([{"prompt": f"number {n}"} for n in range(600)])
        do(tmp_path / "whole", job, layout=layout)
        with pytest.raises(errors.OutputError, match="No space left"):
            do(disk / "out", job, layout=layout)
        assert 10 < len((disk / "out" / "manifest.jsonl").read_bytes().splitlines()) < 600
        with pytest.raises(errors.OutputError, match="left"):
            do(disk / "out", job, layout=layout, resume=True)
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        do(disk / "out", job, layout=layout, resume=True)
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


# Seeing it


@pytest.mark.parametrize("layout", ["files", "imagefolder", "webdataset"])
def test_sheet_and_gallery(tmp_path, layout):
    do(tmp_path, layout=layout)
    done = CliRunner().invoke(app, ["sheet", str(tmp_path), "--columns", "3"])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "sheet.png").size == (3 * 264 + 8, 2 * 282 + 8)
    page = (tmp_path / "gallery.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 5 and "&lt;b&gt;two&lt;/b&gt; &amp; three" in page
    assert "<b>two" not in page and "http" not in page
    with pytest.raises(errors.OutputError, match="--overwrite"):
        sheet.make_sheets(tmp_path, tmp_path / "sheet.png", tmp_path / "gallery.html")
    with pytest.raises(errors.OutputError, match=r"manifest\.jsonl"):
        sheet.make_sheets(tmp_path / "nowhere", tmp_path / "s.png", tmp_path / "g.html")


def test_the_gallery_in_a_browser(tmp_path, browser):
    do(tmp_path)
    sheet.make_sheets(tmp_path, tmp_path / "sheet.png", tmp_path / "gallery.html")
    page = browser.new_page()
    problems, asked = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    address = (tmp_path / "gallery.html").as_uri()
    page.goto(address)
    assert page.locator("figure:visible").count() == 5
    sizes = page.eval_on_selector_all("img", "all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))")
    assert sizes == [16] * 5
    assert page.locator("figcaption").nth(2).inner_text().startswith("<b>two</b> & three")
    page.fill("input", "FOX a")
    assert page.locator("figure:visible").count() == 1
    page.locator("figure:visible a").click()
    page.wait_for_url("**/000004-000-a-fox.png")
    assert not problems and all(url.startswith(("data:", address.rsplit("/", 1)[0])) for url in asked)
    page.close()


# With a model


def test_generate_many_is_generate_with_prompts_encoded_once(dev_folder):
    from flux2_local.text.memory import remembering

    flux = Flux2.load(dev_folder)
    plain = flux._components
    alone = [flux.generate(e["prompt"], seed=derive_seed(0, n), **SMALL) for n, e in enumerate(PROMPTS[::2], 1)]
    many = flux.generate_many(
        [{"prompt": e["prompt"], **SMALL} for e in (*PROMPTS[::2], {"prompt": " "})], return_errors=True
    )
    first = next(many)
    memory = flux._components.text_encoder
    assert remembering(flux._components) is flux._components
    second, bad = many
    assert [r.images[0].data for r in (first, second)] == [r.images[0].data for r in alone]
    assert memory.encoded == 1 and isinstance(bad, errors.RequestError) and flux._components == plain
    with pytest.raises(errors.RequestError):
        list(flux.generate_many([" "]))


def lines_in(folder):
    path = folder / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process, folder, number):
    while lines_in(folder) < number and process.poll() is None:
        time.sleep(0.01)


def test_interrupted_killed_and_resumed_with_a_model(tmp_path, dev_folder):
    """One job in real processes: Ctrl-C, then kill -9, then to the end by two processes; against one without any of it."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a boat"}\n{"prompt": ""}\n{"prompt": "a fox", "seed": 3}\n', "utf-8")
    arguments = [str(prompts), "-m", str(dev_folder), "--repeat", "4", *FAST]
    done = CliRunner().invoke(app, ["batch", *arguments, "-o", str(tmp_path / "whole"), "--json"])
    answer = json.loads(done.stdout)
    assert done.exit_code == 1 and answer["made"] == 8 and answer["bad_lines"][0]["line"] == 2, done.output
    folder = tmp_path / "parts"
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom flux2_local.cli import main; main()"
    run = [sys.executable, "-c", code, "batch", *arguments, "-o", str(folder)]

    first = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    wait_for_lines(first, folder, 1)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=240)
    assert first.returncode == 130 and "are finished and kept" in said and "Traceback" not in said, said
    kept = lines_in(folder)
    assert 1 <= kept < 8 and not list(folder.glob(".*.part"))

    second = subprocess.Popen([*run, "--resume"], stderr=subprocess.DEVNULL)
    wait_for_lines(second, folder, kept + 1)
    time.sleep(random.Random(1).uniform(0, 0.3))
    second.kill()
    second.wait()
    assert kept < lines_in(folder) < 8

    done = CliRunner().invoke(app, ["batch", *arguments, "-o", str(folder), "--resume", "--devices", "cpu,cpu"])
    assert done.exit_code == 1, done.output
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_lost_process_is_replaced(tmp_path, dev_folder):
    job = job_of([{"prompt": "a boat"}, {"prompt": "a fox"}])
    with engines.Pool(engines.processes(["cpu"], {"model": str(dev_folder), "variant": "standard"})) as pool:
        made = pool([picture] for picture in job.pictures())
        next(made)
        pool.workers[0]._process.kill()
        assert [p.line for p, _ in made] == [2] and pool.lost == 1


def test_a_message_that_ends_early_is_none():
    sent = frames.pack({"a": 1}, b"picture")
    assert frames.read(io.BytesIO(sent)) == ({"a": 1}, b"picture")
    assert [frames.read(io.BytesIO(sent[:size])) for size in range(len(sent))] == [None] * len(sent)


def saying(*answers):
    """A process that has said this and ended."""
    process = engines.Process({"device": "cpu"})
    said = b"".join(frames.pack(*answer) for answer in answers)
    process._process = SimpleNamespace(stdin=io.BytesIO(), stdout=io.BytesIO(said))
    return process


def test_what_ends_a_process_is_told_from_its_death():
    group = list(job_of([{"prompt": "a", "num_images": 3}]).pictures())
    facts = {
        "size": (16, 16),
        "nsfw": False,
        "content_type": "",
        "file_name": "",
        "settings": {},
        "prompt": "a",
        "seed": 0,
    }
    picture, end = (facts, b"picture"), (failure(errors.SafetyUnavailableError("no classifier")),)
    for before in ([], [picture]):
        with pytest.raises(errors.SafetyUnavailableError, match="no classifier"):
            saying(*before, end).make(group)
    with pytest.raises(errors.SafetyUnavailableError, match="no classifier"):
        saying(end).batch(group[0].request)
    own = ({**failure(errors.OutOfMemoryError("too large")), "ends": False},)
    assert [type(made) for made in saying(own, picture, own).make(group)] == [
        errors.OutOfMemoryError,
        Result,
        errors.OutOfMemoryError,
    ]
    with pytest.raises(ConnectionError):
        saying(picture, picture).make(group)


def test_mistakes(tmp_path, dev_folder):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a boat\n", "utf-8")

    def call(*more):
        return CliRunner().invoke(app, ["batch", str(prompts), "-m", str(dev_folder), "-o", str(tmp_path / "o"), *more])

    for more, words in (
        (["--size", "9x9"], "512 to 2048"),
        (["--layout", "zip"], "webdataset"),
        (["--repeat", "0"], "at least 1"),
        (["--resume", "--overwrite"], "say one of them"),
        (["--variant", "flash", "--steps", "5"], "num_inference_steps"),
    ):
        done = call(*more)
        assert isinstance(done.exception, errors.RequestError) and words in str(done.exception), more
    if not has_arrow():
        assert "flux2-local[parquet]" in str(call("--parquet").exception)
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "x": 1}\n', "utf-8")
    done = call("--strict", "--input-format", "jsonl")
    assert "nothing was done" in str(done.exception) and "line 2" in str(done.exception)
    assert not (tmp_path / "o").exists()


def has_arrow():
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path, dev_folder):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a boat\na fox\n", "utf-8")
    arguments = [
        "batch",
        str(prompts),
        "-m",
        str(dev_folder),
        "-o",
        str(tmp_path / "o"),
        "--repeat",
        "3",
        "--dry-run",
        *FAST,
    ]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert told["pictures"] == 6 and told["prompts"] == 2 and told["seconds"] > 0 and told["bytes"] > 10_000
    assert told["pictures_per_hour"] == pytest.approx(6 * 3600 / told["seconds"])
    text = CliRunner().invoke(app, arguments).stdout
    assert "6 pictures of 2 lines" in text and "predicted" in text and "placement" in text
    assert not (tmp_path / "o").exists()


def test_a_forecast_counts_references_and_expansion(tmp_path, tiny):
    for name, size in (("a.jpg", (200, 300)), ("b.jpg", (205, 310))):
        Image.new("RGB", size).save(tmp_path / name)
    a, b = (str(tmp_path / name) for name in ("a.jpg", "b.jpg"))
    job = job_of([{"prompt": "a", "images": names} for names in ([], [a], [b], [b])])
    told = forecast(job, "tiny", settings_of({}), None)
    alone, edited, *_ = (tiny._plan_for(p.request, images.references(p.request.images)).work for p in job.pictures())
    assert {s.plan.work: s.count for s in told.shares} == {alone: 1, edited: 3}, "both pictures are of about one size"

    def on_a_card(**fields):
        return forecast(job_of([{"prompt": "a", "num_images": 2, **fields}]), "klein-4b", settings_of({}), "h200")

    plain, expanded = on_a_card(), on_a_card(enable_prompt_expansion=True)
    far = on_a_card(images=["https://a.example/b.png"])
    assert (plain.prompts, expanded.prompts) == (1, 2)
    assert expanded.seconds > 2 * expanded.shares[0].plan.expand_seconds > 0 and far.seconds > plain.seconds


def test_a_million_pictures_are_sized_without_making_them_up(tmp_path):
    """For a card that is not here and a model that is not on the disk."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a boat\n", "utf-8")
    arguments = [
        "batch",
        str(prompts),
        "--repeat",
        "1000000",
        "--dry-run",
        "--json",
        "--device",
        "h200",
        "-m",
        "klein-4b",
    ]
    start = time.perf_counter()
    told = json.loads(CliRunner().invoke(app, [*arguments, "-v", "flash", "--size", "square_hd"]).stdout)
    assert time.perf_counter() - start < 10 and told["pictures"] == 1_000_000 and told["prompts"] == 1
    assert told["bytes"] > 10**12 and told["seconds"] == pytest.approx(1e6 * told["plans"][0]["seconds_each"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "spark"], "local or ray"),
        (["--engine", "ray", "--devices", "cpu"], "--workers"),
        (["--workers", "2"], "--engine ray"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_engines_that_are_none(tmp_path, options, words):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a boat\n", "utf-8")
    done = CliRunner().invoke(app, ["batch", str(prompts), "-m", "tiny", "-o", str(tmp_path / "o"), *options])
    assert isinstance(done.exception, errors.RequestError) and words in str(done.exception)
    assert not (tmp_path / "o").exists()


def test_ray_that_is_not_installed_is_said_with_its_command(monkeypatch):
    from flux2_local.batch.cluster import require_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(errors.BackendUnavailableError, match=r"flux2-local\[ray\]"):
        require_ray()


class Failing:
    """A worker whose model is another one, or does not load."""

    def __init__(self, model="a", problem=None):
        self.facts, self.problem = {"fixed": {"model": model}}, problem

    def start(self):
        if self.problem:
            raise self.problem

    def stop(self):
        pass


class Artist(Failing):
    """A worker that draws."""

    made = 0

    def batch(self, request):
        return 2

    def make(self, group):
        self.made += len(group)
        return [draw(picture.request) for picture in group]


class Mortal(Artist):
    """A worker that dies when it is asked anything, and may not be able to start again."""

    def __init__(self, lives):
        super().__init__()
        self.lives = lives

    def start(self):
        self.lives -= 1
        if self.lives < 0:
            raise errors.ModelError("the card is gone")

    def batch(self, request):
        raise ConnectionError

    make = batch


def test_a_worker_that_cannot_start_again_is_left_out():
    pictures = list(job_of([{"prompt": "a", "num_images": 4}] * 4).pictures())
    with engines.Pool([Mortal(1), Artist(), Mortal(1)]) as pool:
        made = list(pool([picture] for picture in pictures))
        assert pool.lost == 2 and pool.left == 1
    assert [p for p, _ in made] == pictures and all(isinstance(result, Result) for _, result in made)
    for number in (1, 3):
        with (
            engines.Pool([Mortal(1) for _ in range(number)]) as pool,
            pytest.raises(errors.ModelError, match="the card is gone"),
        ):
            list(pool([picture] for picture in pictures))


def test_a_worker_that_dies_again_and_again():
    (picture,) = job_of([{"prompt": "a"}]).pictures()
    with engines.Pool([Mortal(9)]) as pool:
        ((_, result),) = pool([[picture]])
        assert "died 3 times" in str(result) and pool.lost == engines.TRIES
        with pytest.raises(errors.Flux2Error, match="died 3 times"):
            pool.batch(picture.request)


def test_workers_must_draw_the_same():
    with (
        pytest.raises(errors.PlanError, match="model (a and b|b and a)"),
        engines.Pool([Failing("a"), Failing("b")]),
    ):
        pass
    with (
        pytest.raises(errors.ModelError, match="no weights"),
        engines.Pool([Failing(problem=errors.ModelError("no weights"))]),
    ):
        pass


def test_a_pool_begins_with_the_first_worker_that_is_ready(tmp_path):
    ready = threading.Event()

    class Late(Artist):
        def start(self):
            assert ready.wait(60)

    first, late = Artist(), Late()
    job = job_of([{"prompt": f"number {n}"} for n in range(40)])

    def tell(batch):
        ready.set()
        time.sleep(0.01)

    with open_batch(job, Target(tmp_path)) as batch, engines.Pool([first, late], gradual=True) as pool:
        batch.work(pool, tell)
    assert batch.made == 40 and first.made and late.made and first.made + late.made == 40


@pytest.mark.skipif(not has_arrow(), reason="needs pyarrow")
def test_parquet_says_what_the_manifest_says(tmp_path):
    from pyarrow import parquet

    from flux2_local.batch.manifest import to_parquet

    do(tmp_path, layout="webdataset")
    table = parquet.read_table(to_parquet(tmp_path / "manifest.jsonl", tmp_path / "manifest.parquet"))
    assert table.to_pylist() == [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
