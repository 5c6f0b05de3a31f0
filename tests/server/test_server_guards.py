"""What keeps the server and its machine safe: keys, origins, hosts, files, addresses, sizes."""

import asyncio
import base64
import http.server
import io
import socket
import ssl
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from harness import COMMAND, EDIT, FLASH, SMALL, STANDARD
from PIL import Image

from flux2_local import errors
from flux2_local.cli import main
from flux2_local.cli.errors import report
from flux2_local.errors import Flux2Error, OutputError, RequestError
from flux2_local.server import calls, desk, outgoing
from flux2_local.server.app import make_app
from flux2_local.server.failures import STATUS, make_failure
from flux2_local.server.generator import may_preview
from flux2_local.server.jobs import Job
from flux2_local.server.settings import Settings, parse_duration, parse_models
from flux2_local.server.signing import Signer
from flux2_local.server.store import Store
from flux2_local.server.tls import make_certificates
from flux2_local.server.worker import WorkerDied, obituary

PROXY = "/api/fal/proxy"


def test_pictures_are_served_in_ranges_with_their_type(server):
    url = server.run(FLASH, output_format="webp").json()["images"][0]["url"]
    whole = httpx.get(url)
    assert whole.headers["content-type"] == "image/webp" and whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["x-content-type-options"] == "nosniff"
    part = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert httpx.get(url, headers={"Range": "bytes=99999999-"}).status_code == 416
    assert httpx.head(url).status_code == 200
    name = url.rpartition("/")[2]
    assert len(name.partition(".")[0]) == 32


@pytest.mark.parametrize(
    "path",
    ["../queue.sqlite", "..%2fqueue.sqlite", "%2e%2e/queue.sqlite", "..\\queue.sqlite", "queue.sqlite", "a" * 32 + ".png",
     "%00.png", "/etc/passwd", "....//queue.sqlite"],
)  # fmt: skip
def test_nothing_else_is_served(server, path):
    for root in ("/files/", "/playground/"):
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as line:  # no client normalises it
            line.sendall(f"GET {root}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: line.recv(65536), b""))
        assert answer.split()[1] in (b"404", b"400"), answer[:200]
        assert b"SQLite" not in answer and b"root:" not in answer


def test_the_proxy_goes_nowhere_else(server):
    assert server.client.post(PROXY, json=SMALL).status_code == 400
    for target in (
        "https://example.com/fal-ai/flux-2",
        "https://fal.run.example.com/x",
        "http://[",
        "https://fal.run@evil/x",
    ):
        answer = server.client.post(PROXY, json=SMALL, headers={"x-fal-target-url": target})
        assert answer.status_code == 400 and answer.json()["error_type"] == "bad_target"
    target = {"x-fal-target-url": f"https://queue.fal.run/{STANDARD}/requests/nobody/status?logs=1"}
    assert server.client.get(PROXY, headers=target).status_code == 404


def test_pages_of_this_machine_may_call_and_others_may_not(server):
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-fal-target-url",
    }
    answer = server.client.options(f"/{STANDARD}", headers={"Origin": "http://localhost:3000", **asked})
    assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    allowed = answer.headers["access-control-allow-headers"]
    assert "authorization" in allowed and "x-fal-target-url" in allowed
    assert "x-fal-request-id" in answer.headers["access-control-expose-headers"]
    for origin in ("https://example.com", "null", "http://localhost.example.com"):
        answer = server.client.post(f"/{STANDARD}", json=SMALL, headers={"Origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert server.client.get("/health", headers={"Host": "rebound.example.com"}).status_code == 403


@pytest.mark.parametrize(
    ("path", "limit"), [(f"/{STANDARD}", 2), (f"/queue/{FLASH}", 2), (f"/{EDIT}", 64), (PROXY, 64)]
)
def test_bodies_are_bounded(server, path, limit):
    host = server.url.removeprefix("http://")
    start = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    start += f"X-Fal-Target-Url: https://fal.run/{EDIT}\r\n"
    with socket.create_connection(host.split(":"), timeout=60) as line:
        line.sendall(f"{start}Content-Length: {limit * 2**20 + 1}\r\n\r\n".encode())
        assert line.recv(65536).split()[1] == b"413", "announced"
    with socket.create_connection(host.split(":"), timeout=60) as line:
        line.sendall(f"{start}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(limit):
            line.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
        line.sendall(b"1\r\nx\r\n")
        assert line.recv(65536).split()[1] == b"413", "unannounced"
    assert server.client.get("/health").status_code == 200


def test_nothing_is_taken_that_could_not_be_written(tmp_path, monkeypatch):
    async def main():
        taken = desk.Desk(Settings(tmp_path), Store(tmp_path / "queue.sqlite"), lambda job: None)
        try:
            await taken.submit(Job(FLASH, "flash", SMALL, {"sync_mode": True}))
            with pytest.raises(OutputError, match="--folder"):
                await taken.submit(Job(FLASH, "flash", SMALL, {}))
            return len(taken.waiting)
        finally:
            await taken.store.close()

    monkeypatch.setattr(desk, "ROOM", 2**60)
    assert asyncio.run(main()) == 1


def call_without_worker(folder, *bodies, **facts):
    """What a server whose worker never starts answers to edits that are queued; returns the waiting jobs too."""

    async def main():
        store = Store(folder / "queue.sqlite")
        gate = make_app(Settings(folder, **facts), store)
        taken = gate.app.state.desk = desk.Desk(gate.settings, store, lambda job: None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://127.0.0.1") as client:
            answers = [await client.post(f"/queue/{EDIT}", json=body) for body in bodies]
        await store.close()
        return answers, list(taken.waiting)

    return asyncio.run(main())


def an_edit(**more):
    out = io.BytesIO()
    Image.new("RGB", (96, 80)).save(out, "PNG")
    return {**SMALL, "image_urls": [f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"], **more}


def test_a_request_that_is_not_taken_leaves_no_pictures(tmp_path, monkeypatch):
    async def refuse(*_):
        raise OutputError("The disk is full.")

    [full], _ = call_without_worker(tmp_path, an_edit(), queue_limit=0)
    assert full.status_code == 429 and not list((tmp_path / "files").iterdir())
    monkeypatch.setattr(Store, "add", refuse)
    [unwritten], _ = call_without_worker(tmp_path, an_edit())
    assert unwritten.status_code == 500 and not list((tmp_path / "files").iterdir())
    monkeypatch.setattr(desk, "ROOM", 2**60)
    monkeypatch.setattr(calls, "collect", lambda *_: pytest.fail("asked before a picture is fetched"))
    answers, _ = call_without_worker(tmp_path, an_edit())
    answers += call_without_worker(tmp_path, an_edit(sync_mode=True), queue_limit=0)[0]
    assert [answer.status_code for answer in answers] == [500, 429]


def test_a_request_is_kept_as_it_was_understood(tmp_path):
    [answer], [job] = call_without_worker(tmp_path, an_edit(sync_mode="false", guidance_scale="4", nonsense=1))
    assert answer.status_code == 200 and not job.sync and 0 <= job.fields["seed"] < 2**53
    assert job.arguments == {**SMALL, "sync_mode": False, "guidance_scale": 4.0, "image_urls": job.images}


def test_an_answer_that_may_not_be_kept_is_forgotten_later_where_the_disk_is_full(tmp_path, monkeypatch, capsys):
    async def main():
        taken = desk.Desk(Settings(tmp_path), Store(tmp_path / "queue.sqlite"), lambda job: None)
        job = await taken.submit(Job(FLASH, "flash", SMALL, {"sync_mode": True}))
        full, forget = 2, taken.store.forget

        async def forget_when_there_is_room(request_id):
            nonlocal full
            if full := max(0, full - 1):
                raise OutputError("The disk is full.")
            await forget(request_id)

        monkeypatch.setattr(taken.store, "forget", forget_when_there_is_room)
        await taken.fetched(job)
        full = 2
        while await taken.find(job.id):
            await asyncio.sleep(0.01)
        await taken.store.close()

    monkeypatch.setattr(desk, "GRACE_SECONDS", 0.01)
    asyncio.run(asyncio.wait_for(main(), 20))
    complaints = capsys.readouterr().err
    assert "would run again" in complaints and "forgotten later" in complaints and "Traceback" not in complaints


def test_an_upload_goes_where_it_was_announced_once_and_must_be_a_picture(server):
    out = io.BytesIO()
    Image.effect_noise((96, 80), 80).save(out, "PNG")
    announce = {"content_type": "image/png", "file_name": "photo.png"}
    before = len(list((server.folder / "files").iterdir()))
    places = server.client.post("/storage/upload/initiate", json=announce).json()
    assert httpx.get(places["file_url"]).status_code == 404
    assert httpx.put(places["upload_url"], content=out.getvalue()).status_code == 200
    assert httpx.get(places["file_url"]).content == out.getvalue()
    assert httpx.put(places["upload_url"], content=out.getvalue()).status_code == 400, "once"
    tall = io.BytesIO()
    Image.new("L", (64, 1000)).save(tall, "PNG")
    for data, status in ((b"MZ\x90", 422), (b"", 422), (tall.getvalue(), 422), (b"x" * (33 * 2**20), 413)):
        places = server.client.post("/storage/upload/initiate", json=announce).json()
        assert httpx.put(places["upload_url"], content=data).status_code == status
        assert httpx.get(places["file_url"]).status_code == 404
    assert len(list((server.folder / "files").iterdir())) == before + 1
    assert server.client.post("/storage/upload/initiate", json={"content_type": "video/mp4"}).status_code == 422
    assert server.client.post("/storage/upload/initiate-multipart", json=announce).status_code == 413
    wrong = {"Content-Type": "image/png", "X-Fal-Object-Lifecycle": "[]"}
    assert server.client.post("/files/upload", content=out.getvalue(), headers=wrong).status_code == 400
    assert (server.folder / "webhooks.key").stat().st_mode & 0o077 == 0 or sys.platform == "win32"


def test_a_key_is_asked_for_where_one_is_set(start):
    server = start("--api-key", "a-long-enough-key", "--allow-origin", "https://app.example.com", "--max-queue", "1")
    assert server.client.get("/health").status_code == 200 and server.client.get("/").status_code == 200
    for header in ({}, {"Authorization": "Key wrong"}, {"Authorization": "a-long-enough-key"}):
        for path in ("/api/history", "/metrics", "/openapi.json", f"/queue/{STANDARD}/requests/x/status"):
            answer = server.client.get(path, headers=header)
            assert answer.status_code == 401 and answer.json()["error_type"] == "unauthorized"
        assert (
            server.client.post(PROXY, headers={**header, "x-fal-target-url": f"https://fal.run/{STANDARD}"}).status_code
            == 401
        )
    assert server.client.post("/files/upload", content=b"x", headers={"Content-Type": "image/png"}).status_code == 401
    assert server.client.get("/.well-known/jwks.json").status_code == 200
    good = {"Authorization": "Key a-long-enough-key", "Origin": "https://app.example.com"}
    assert server.client.get("/api/history", headers=good).status_code == 200
    assert "YOUR_KEY" in server.text and "a-long-enough-key" not in server.text
    full = [server.client.post(f"/queue/{STANDARD}", json=SMALL, headers=good).status_code for _ in range(4)]
    assert full[0] == 200 and full[-1] == 429, "the queue is bounded"


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls ``serve`` with options that it refuses before it listens; returns its exit code and words."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["flux2-local", "serve", *options])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--allow-remote"),
        (["--host", "0.0.0.0", "--allow-remote"], "--api-key"),
        (["--host", "0.0.0.0", "--allow-remote", "--api-key", "short"], "at least 12"),
        (["--keep", "soon"], "7d, 12h"),
        (["--variant-models", "ultra=dev"], "standard, turbo, flash"),
    ],
)
def test_mistakes_are_refused_before_listening(refused, options, words):
    code, said = refused(*options)
    assert code == 2 and words in said


def test_a_worker_that_the_system_ended_is_explained(capsys):
    assert report(WorkerDied(obituary(-9))) == 1
    said = capsys.readouterr().err
    assert "ended with code -9: memory probably ran out" in said and "--vram" in said and "--model" in said
    assert obituary(1) == "The worker process ended with code 1."


def test_a_model_that_is_not_there_ends_the_server_with_its_code(tmp_path):
    command = [*COMMAND, "--port", "0", "--folder", str(tmp_path), "--model", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "no model 'nope'" in done.stderr and "Traceback" not in done.stderr


def test_a_second_server_on_the_same_folder_or_port_says_so(server, refused, tmp_path):
    command = [*COMMAND, "--port", "0", "--folder", str(server.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 6 and "Traceback" not in done.stderr and "another `flux2-local serve`" in done.stderr
    code, said = refused("--port", server.url.rpartition(":")[2], "--folder", str(tmp_path))
    assert code == 1 and "Choose another one with --port" in said


def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    code, said = refused("--folder", str(tmp_path / "file" / "below"))
    assert code == 6 and "--folder" in said
    (tmp_path / "webhooks.key").write_text("no key")
    with pytest.raises(OutputError, match="webhooks.key"):
        Signer(tmp_path / "webhooks.key")


def test_durations_and_models_are_read():
    assert parse_duration("7d") == 604800 and parse_duration("90s") == 90 and parse_duration("forever") is None
    assert (
        parse_models("standard=dev, turbo=klein-4b") == {"standard": "dev", "turbo": "klein-4b"}
        and parse_models(None) == {}
    )


def test_every_error_has_a_status(tmp_path):
    for kind in (v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Flux2Error)):
        facts = make_failure(kind("words", 1) if kind.__name__ == "BudgetError" else kind("words"))
        assert facts["status"] in {status for _, status, _ in STATUS} - {429, 503} and facts["message"] == "words"
    assert make_failure(ZeroDivisionError())["status"] == 500
    assert Settings(tmp_path).queue_limit == 100


def test_the_authority_passes_strict_verification_and_lasts(tmp_path):
    made = make_certificates(tmp_path, "127.0.0.1")
    before = made.certificate.read_bytes()
    assert make_certificates(tmp_path, "127.0.0.1").certificate.read_bytes() == before
    assert make_certificates(tmp_path, "10.1.2.3").certificate.read_bytes() != before
    context = ssl.create_default_context(cafile=made.bundle)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made.certificate, made.key)
    assert made.key.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    for name in ("localhost", "127.0.0.1"):
        near, far = ssl.MemoryBIO(), ssl.MemoryBIO()
        client, server = (
            context.wrap_bio(near, far, server_hostname=name),
            serving.wrap_bio(far, near, server_side=True),
        )
        for side in (client, server, client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        assert client.getpeercert()


class _Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(int(self.path.strip("/"))):
                self.wfile.write(b"x" * 1000)
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(url, **limits):
    return outgoing.exchange(
        outgoing.Call(url), outgoing.Limits(**{"seconds": 10, "size": 10**6, "private": True, **limits})
    )


def test_fetching_is_bounded_in_size_time_and_redirects(site):
    assert fetch(f"{site}/2") == (200, b"x" * 2000)
    assert fetch(f"{site}/to/{site}/1") == (200, b"x" * 1000)
    with pytest.raises(RequestError, match="larger than"):
        fetch(f"{site}/30", size=5000)
    start = time.monotonic()
    with pytest.raises(RequestError, match="longer than"):
        fetch(f"{site}/500", seconds=0.5)
    assert time.monotonic() - start < 5
    with pytest.raises(RequestError, match="redirects more"):
        fetch(f"{site}/to/{site}/to/{site}/to/{site}/to/{site}/to/{site}/1")
    with pytest.raises(RequestError, match="not an http"):
        fetch(f"{site}/to/file:///etc/passwd")


def test_a_redirect_into_the_network_is_refused(site, monkeypatch):
    monkeypatch.setattr(outgoing, "is_public", lambda address: address == "127.0.0.1")
    assert fetch(f"{site}/1", private=False)[0] == 200
    with pytest.raises(RequestError, match="private address"):
        fetch(f"{site}/to/http://127.0.0.2:9/1", private=False)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1", "fc00::1", "::ffff:10.0.0.1", "2002:0a00:0001::1", "64:ff9b::a00:1", "::"],
)  # fmt: skip
def test_private_addresses_are_known(address):
    assert not outgoing.is_public(address)


def test_public_addresses_are_known():
    assert outgoing.is_public("93.184.216.34") and outgoing.is_public("2606:2800:220:1::1")


@pytest.mark.parametrize(
    ("harmless", "fields", "shown"),
    [
        (None, {}, False),
        (None, {"enable_safety_checker": True}, False),
        (None, {"enable_safety_checker": False}, True),
        ("it draws landscapes", {}, True),
    ],
)
def test_no_step_is_shown_of_what_a_checker_has_still_to_see(harmless, fields, shown):
    checkpoint = SimpleNamespace(preset=SimpleNamespace(harmless=harmless))
    assert may_preview(fields, SimpleNamespace(checkpoint=checkpoint)) is shown
