"""Settings inside files, reference pictures, cropping, writing."""

import base64
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from flux2_local import OutputError, RequestError, files, images
from flux2_local.result import ImageFile, Result, Timings


def picture(width=96, height=64, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    array = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(array.squeeze(), mode)


SETTINGS = {"prompt": 'ein Schild: „Grüße" — 猫', "seed": 2**60, "image_size": {"width": 600, "height": 700}}


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_settings_survive_every_format(tmp_path, form):
    path = tmp_path / "x"
    path.write_bytes(images.encode(picture(), form, SETTINGS))
    assert images.read_settings(path) == SETTINGS
    assert Image.open(path).format.lower() == form


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("prompt", "猫" * 50_000, "猫" * 12_500),
        ("images", ["https://host/" + "a" * 40_000] * 2, ["https://host/" + "a" * 19_993] * 2),
    ],
)
def test_settings_too_long_for_a_jpeg_are_cut_and_the_picture_is_kept(tmp_path, key, value, kept):
    path, settings = tmp_path / "x", {**SETTINGS, key: value}
    for form, want in (("jpeg", {**settings, key: kept}), ("webp", settings), ("png", settings)):
        path.write_bytes(images.encode(picture(), form, settings))
        assert images.read_settings(path) == want


def test_a_prompt_of_twenty_thousand_characters_is_whole_in_a_jpeg(tmp_path):
    settings = {"prompt": "猫" * 20_000, "lora": [["caf\udce9.safetensors", 1.0]]}  # a file name that is no UTF-8
    (tmp_path / "x.jpg").write_bytes(images.encode(picture(), "jpeg", settings))
    assert images.read_settings(tmp_path / "x.jpg") == settings


def test_settings_of_files_from_before_utf8_are_read(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0flux2-local:" + json.dumps(SETTINGS).encode("ascii")
    picture().save(tmp_path / "x.jpg", exif=exif)
    assert images.read_settings(tmp_path / "x.jpg") == SETTINGS


def test_png_is_lossless():
    original = picture()
    back = Image.open(io.BytesIO(images.encode(original, "png", {})))
    assert np.array_equal(np.asarray(back), np.asarray(original))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "cannot be read"),
        (lambda p: p.write_text("hello"), "not a picture of a kind that is known; use PNG"),
        (lambda p: picture().save(p, "PNG"), "no flux2-local settings"),
        (lambda p: p.write_bytes(images.encode(picture(), "png", {})[:-400]), "not a picture"),
        (lambda p: p.mkdir(), "cannot be read"),
    ],
)
def test_files_without_settings_are_refused(tmp_path, make, words):
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(RequestError, match=words):
        images.read_settings(path)


def test_references_of_every_kind(tmp_path):
    original = picture(100, 80)
    path = tmp_path / "a b.png"
    original.save(path)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (original, path, str(path), path.as_uri(), data):
        (got,) = images.references((source,))
        assert np.array_equal(np.asarray(got), np.asarray(original)), source


def test_a_reference_over_http(tmp_path):
    original = picture(100, 80)
    body = images.encode(original, "png", {})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(body if self.path == "/a.png" else b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    try:
        (got,) = images.references((f"{here}/a.png",))
        assert got.size == (100, 80)
        with pytest.raises(RequestError, match="could not be fetched"):
            images.references((f"{here}/b.png",))
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (picture(63, 100), "at least 64"),
        (picture(1000, 100), "8 times"),
        ("nowhere.png", "cannot be read"),
        ("data:image/png;base64,!!", "base64 is broken"),
        ("data:nothing", "comma"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("https://host/my cat.png", "' ' is written %20"),
        ("https://host/ü.png", "'ü' is written %C3%BC"),
        ("http://[x/a.png", "Invalid IPv6 URL. Write it like https"),
        ("file://[x/a.png", "Invalid IPv6 URL"),
        ("http://host:port/a.png", "Port could not be"),
        ("https:///a.png", "names no host"),
        ("~nobody-of-that-name/x.png", "cannot be read"),
        (b"bytes", "bytes was given"),
        (7, "int was given"),
    ],
)
def test_bad_references_are_refused(source, words):
    for check in (images.references, images.check_references):
        with pytest.raises(RequestError, match=words):
            check((source,))


def test_checking_references_fetches_nothing():
    images.check_references((picture(), "https://nowhere.invalid/a.png?b=c%20d", "HTTP://nowhere.invalid:80/"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled(mode):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "=i4"}[mode]
    (got,) = images.references((Image.frombytes(mode, (64, 64), values.astype(kind).tobytes()),))
    assert np.array_equal(np.asarray(got), np.repeat((values / 257).round().astype("uint8")[..., None], 3, 2))


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    assert images.references((clear,))[0].getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(100, 130), (64, 64), (1500, 1100), (2000, 300), (1024, 1024)])
def test_reference_pixels_are_the_pipelines(size):
    original = picture(*size)
    ours = images.reference_pixels(original, 16)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    theirs = original
    if size[0] * size[1] > 1024 * 1024:
        theirs = processor._resize_to_target_area(original, 1024 * 1024)
    w, h = theirs.width // 16 * 16, theirs.height // 16 * 16
    want = processor.preprocess(theirs, height=h, width=w, resize_mode="crop")
    assert np.array_equal(ours.numpy(), want.numpy()) and ours.stride() == want.stride()
    assert images.reference_size(*size, 16) == (w, h)


def file_of(image, form="png"):
    return ImageFile(
        images.encode(image, form, SETTINGS),
        image.width,
        image.height,
        images.CONTENT_TYPES[form],
        f"a-1.{form}",
        SETTINGS,
    )


def test_save_chooses_the_format_by_the_ending(tmp_path):
    one = file_of(picture())
    for name, form in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP"), ("d", "PNG")):
        path = one.save(tmp_path / "deep" / name)
        assert Image.open(path).format == form
        assert images.read_settings(path) == SETTINGS
    with pytest.raises(OutputError, match=r"\.gif"):
        one.save(tmp_path / "e.gif")
    assert not list((tmp_path / "deep").glob(".*")), "no temporary file stays behind"


def test_kept_never_overwrites_and_gives_a_file_url(tmp_path):
    result = Result((file_of(picture()),), Timings(denoise=1.0), 1, (False,), "p")
    first, second = result.kept(tmp_path), result.kept(tmp_path)
    assert [r.images[0].path.name for r in (first, second)] == ["a-1.png", "a-1-2.png"]
    assert first.images[0].url == (tmp_path / "a-1.png").as_uri()
    answer = first.to_dict()
    assert set(answer) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert set(answer["images"][0]) == {"url", "content_type", "file_name", "file_size", "width", "height"}
    assert answer["timings"]["inference"] == 1.0
    assert result.images[0].url.startswith("data:image/png;base64,")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Nothing can be written to"):
        files.check_folder(tmp_path / "x", 1)


def test_a_target_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is no folder: a file has that name"):
        files.check_folder(tmp_path / "file" / "below", 1)
    with pytest.raises(OutputError, match="are needed"):
        files.check_folder(tmp_path, 2**60)
    with pytest.raises(OutputError, match="cannot be written"):
        files.write(tmp_path / "file" / "x.png", b"x")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        files.write(tmp_path / "x.png", b"x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_the_permissions_that_the_umask_leaves_and_the_umask_stays(tmp_path, monkeypatch):
    umask = os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads would write with it"))
    try:
        mode = files.write(tmp_path / "x.png", b"x").stat().st_mode & 0o777
    finally:
        monkeypatch.undo()
        os.umask(umask)
    assert mode == 0o640 or os.name == "nt"


def test_crop_takes_the_middle():
    original = picture(96, 64)
    cut = images.crop(original, 90, 61)
    assert cut.size == (90, 61)
    assert np.array_equal(np.asarray(cut), np.asarray(original)[1:62, 3:93])
    assert images.crop(original, 96, 64) is original


def test_black_is_black():
    assert not np.asarray(images.black(picture())).any()


def test_uri_paths_are_decoded(tmp_path):
    path = tmp_path / "ü %.png"
    picture().save(path)
    assert images.references((Path(path).as_uri(),))[0].size == (96, 64)
