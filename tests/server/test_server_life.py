"""Crashes, restarts, webhooks, expiry, metrics."""

import asyncio
import base64
import contextlib
import hashlib
import http.server
import io
import json
import threading
import time

import httpx
import psutil
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from harness import EDIT, FLASH, LONG, SMALL, STANDARD, TURBO
from PIL import Image

from flux2_local.server import desk as desks
from flux2_local.server import webhooks
from flux2_local.server.app import make_app
from flux2_local.server.jobs import Job
from flux2_local.server.settings import Settings
from flux2_local.server.signing import Signer
from flux2_local.server.store import Store
from flux2_local.server.worker import Worker

JOBS = 20


def worker_of(server):
    return psutil.Process(server.process.pid).children()[0]


def pictures(server):
    return sorted(p.name for p in (server.folder / "files").iterdir())


def test_killed_in_mid_job_with_twenty_queued_every_one_ends_exactly_once(start):
    server = start()
    assert (server.client.get("/ready").status_code, server.client.get("/health").status_code) == (503, 200)
    server.wait_ready()
    jobs = [server.submit(FLASH, seed=i) for i in range(JOBS)]
    server.running(jobs[2])
    done = {j["request_id"]: server.result(j).json() for j in jobs[:2]}
    worker = worker_of(server)
    server.kill()
    assert not psutil.wait_procs([worker], timeout=15)[1], "the worker ends with its server"
    server.start()
    results = [server.result(job).json() for job in jobs]
    assert [r["seed"] for r in results] == list(range(JOBS))
    files = [r["images"][0]["url"].rpartition("/")[2] for r in results]
    assert sorted(files) == pictures(server), "no picture twice, none left over"
    for job in jobs[:2]:
        before, after = done[job["request_id"]], server.result(job).json()
        assert before["timings"] == after["timings"], "what was done was not done again"
    entries = server.client.get("/api/history?limit=100").json()["requests"]
    assert sorted(e["request_id"] for e in entries) == sorted(j["request_id"] for j in jobs)
    assert all(httpx.get(r["images"][0]["url"]).status_code == 200 for r in results)


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(start):
    server = start()
    server.wait_ready()
    job, next_one = server.submit(STANDARD, num_inference_steps=30), server.submit(FLASH)
    server.running(job)
    worker_of(server).kill()
    assert server.result(job).status_code == 200 and server.result(next_one).status_code == 200
    assert server.client.get("/ready").status_code == 200
    assert "The worker process ended" in "".join(server.complained)


def test_what_a_crash_leaves_of_sync_requests_callers_on_the_line_and_uploads(start):
    server = start()
    server.wait_ready()
    headers = {"Content-Type": "image/png"}
    upload = server.client.post("/files/upload", content=some_png(), headers=headers).json()["access_url"]
    with (
        pytest.raises(httpx.TransportError),
        httpx.stream("POST", f"{server.url}/{STANDARD}/stream", json=LONG) as answer,
    ):
        for number, _ in enumerate(answer.iter_lines()):
            if number == 0:
                sync = server.submit(FLASH, sync_mode=True, seed=4)
                server.kill()
    server.start()
    result = server.result(sync).json()
    assert result["seed"] == 4 and result["images"][0]["url"].startswith("data:")
    entries = server.client.get("/api/history").json()["requests"]
    assert len(entries) == 1 and "The server stopped" in entries[0]["error"], "nobody waits for it any more"
    assert pictures(server) == [upload.rpartition("/")[2]], "the upload alone"
    assert server.client.get(f"/files/{pictures(server)[0]}").content == some_png()


def some_png():
    out = io.BytesIO()
    Image.linear_gradient("L").save(out, "PNG")
    return out.getvalue()


def test_ctrl_c_stops_at_once_and_loses_nothing(start):
    server = start()
    server.wait_ready()
    running, waiting = server.submit(STANDARD, image_size="square_hd", num_inference_steps=20), server.submit(FLASH)
    server.running(running)
    with server.client.stream("GET", running["status_url"] + "/stream") as watching:
        next(watching.iter_lines())
        begin = time.monotonic()
        assert server.stop() == 0
    assert time.monotonic() - begin < 10
    assert "Traceback" not in "".join(server.complained) and "done when it starts again" in server.text
    server.start()
    assert server.result(running).status_code == 200 and server.result(waiting).status_code == 200
    begun = [log["message"] for log in server.status(running)["logs"]].count("step 1/20")
    assert begun == 2 and len(server.client.get("/api/history").json()["requests"]) == 2


def make_desk(folder):
    """A desk that calls webhooks and has no worker."""
    hooks = webhooks.Webhooks(Signer(folder / "webhooks.key"))
    desk = desks.Desk(Settings(folder), Store(folder / "queue.sqlite"), lambda job: hooks.deliver(desk, job))
    return desk, hooks


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


def test_ctrl_c_ends_a_request_whose_caller_is_on_the_line(tmp_path, capsys):
    async def main():
        desk, _ = make_desk(tmp_path)
        job = desk.current = await desk.submit(Job(FLASH, "flash", SMALL, {}, attached=True))
        job.begin()
        await desk.close()
        store = Store(tmp_path / "queue.sqlite")
        kept = await store.load(job.id)
        await store.close()
        return kept

    kept = asyncio.run(main())
    assert kept.done and kept.failure["error_type"] == "client_cancelled"
    assert "done when it starts again" not in capsys.readouterr().out


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.calls.append((dict(self.headers), body))
        self.server.got.append(json.loads(body))
        self.send_response(500 if len(self.server.got) == 1 else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook)
    server.got, server.calls = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_webhooks_are_told_how_it_ended_and_tried_again(server, hook):
    target = {"fal_webhook": f"http://127.0.0.1:{hook.server_port}/hook?x=1"}
    ok = server.client.post(f"/queue/{TURBO}", params=target, json={"prompt": "a boat", "image_size": "square"}).json()
    server.until(lambda: len(hook.got) == 2)
    assert hook.got[0] == hook.got[1], "the first answer was 500"
    assert hook.got[1] | {"payload": 0} == {
        "request_id": ok["request_id"], "gateway_request_id": ok["request_id"], "status": "OK", "error": None, "payload": 0,
    }  # fmt: skip
    assert hook.got[1]["payload"]["images"][0]["url"].startswith(server.url)
    bad = server.client.post(f"/queue/{STANDARD}", params=target, json=LONG).json()
    server.cancel(bad)
    server.until(lambda: len(hook.got) == 3)
    assert hook.got[2]["status"] == "ERROR" and hook.got[2]["error"] and "detail" in hook.got[2]["payload"]
    wrong = server.client.post(f"/queue/{TURBO}", params={"fal_webhook": "file:///x"}, json={"prompt": "x"})
    assert wrong.status_code == 422


def test_a_request_deleted_while_its_webhook_is_tried_stays_deleted(tmp_path, hook, monkeypatch):
    async def main():
        desk, hooks = make_desk(tmp_path)
        job = await desk.submit(Job(FLASH, "flash", SMALL, {}, webhook=f"http://127.0.0.1:{hook.server_port}/"))
        await desk.cancel(job)
        await until(lambda: asyncio.sleep(0, hook.got))
        desk.recent.clear()  # as after many others
        await desk.forget(await desk.find(job.id))
        await asyncio.gather(*hooks._tasks)
        await desk.keep(job)
        assert await desk.find(job.id) is None
        await desk.store.close()

    monkeypatch.setattr(webhooks, "DELAYS", (0.0, 0.5))
    asyncio.run(main())
    assert len(hook.got) == 1, "the first answer was 500"


def test_sync_requests_that_failed_or_were_reported_do_not_run_again(tmp_path, hook):
    async def main():
        desk, _ = make_desk(tmp_path)
        jobs = [
            Job(EDIT, "standard", SMALL, {"sync_mode": True}, images=[desk.pictures.add(some_png(), "png")])
            for _ in range(3)
        ]
        cancelled, reported, unfetched = [await desk.submit(job) for job in jobs]
        reported.webhook = f"http://127.0.0.1:{hook.server_port}/"
        await desk.cancel(cancelled)
        for job in (reported, unfetched):
            desk.waiting.remove(job)
            job.end(answer={"images": [], "timings": {"inference": 1.0}})
            await desk.settle(job)
        await until(lambda: asyncio.sleep(0, reported.hook == "sent"))
        await until(lambda: gone(desk, reported))
        assert [job.id for job in await desk.store.unfinished()] == [unfetched.id]
        assert [path.name for path in desk.pictures.folder.iterdir()] == unfetched.images, "with what it needs for that"
        assert [await desk.find(job.id) for job in jobs] == jobs, "each is still answered"
        await desk.store.close()

    hook.got.append("so that the first call is answered with 200")
    asyncio.run(main())


async def gone(desk, job):
    return await desk.store.load(job.id) is None


def test_a_sync_request_is_answered_while_its_webhook_is_tried(tmp_path, monkeypatch):
    async def main():
        desk, _ = make_desk(tmp_path)
        desk.on_end = print
        job = await desk.submit(Job(FLASH, "flash", SMALL, {"sync_mode": True}, webhook="http://127.0.0.1:9/"))
        await desk.cancel(job)
        await asyncio.sleep(0.1)
        assert await desk.find(job.id) is job
        await desk.reported(job, "failed")
        await until(lambda: asyncio.sleep(0, job.id not in desk.jobs))
        await desk.store.close()

    monkeypatch.setattr(desks, "UNFETCHED_SECONDS", 0.01)
    monkeypatch.setattr(desks, "GRACE_SECONDS", 0.01)
    asyncio.run(main())


def test_what_is_given_up_at_a_start_is_answered_and_reported_once(tmp_path, hook, monkeypatch):
    async def main():
        store, facts = Store(tmp_path / "queue.sqlite"), {"attempts": desks.MAX_ATTEMPTS}
        told = Job(FLASH, "flash", SMALL, {}, webhook=f"http://127.0.0.1:{hook.server_port}/", **facts)
        sync = Job(FLASH, "flash", SMALL, {"sync_mode": True}, **facts)
        for job in (told, sync):
            await store.add(job)
        app = make_app(Settings(tmp_path), store).app
        async with app.router.lifespan_context(app):
            assert (await app.state.desk.find(sync.id)).failure["error_type"] == "worker_died"
            await asyncio.sleep(0.5)

    hook.got.append("so that the first call is answered with 200")
    monkeypatch.setattr(Worker, "start", lambda self: asyncio.sleep(60))
    asyncio.run(main())
    assert len(hook.calls) == 1


def is_fals(headers, body, keys):
    """What fal tells receivers to check: the age of the call, and its signature by one of the published keys."""
    parts = [headers[f"X-Fal-Webhook-{name}"] for name in ("Request-Id", "User-Id", "Timestamp")]
    if abs(time.time() - int(parts[2])) > 300:
        return False
    message = "\n".join([*parts, hashlib.sha256(body).hexdigest()]).encode()
    for key in keys:
        public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "=="))
        try:
            public.verify(bytes.fromhex(headers["X-Fal-Webhook-Signature"]), message)
            return True
        except InvalidSignature:
            continue
    return False


def test_webhooks_are_signed_as_fal_signs_them(server, hook):
    target = {"fal_webhook": f"http://127.0.0.1:{hook.server_port}/"}
    hook.got.append("so that the first call is answered with 200")
    job = server.client.post(f"/queue/{FLASH}", params=target, json=SMALL).json()
    server.until(lambda: hook.calls)
    keys = httpx.get(f"{server.url}/.well-known/jwks.json").json()["keys"]
    [(headers, body)] = hook.calls
    assert headers["X-Fal-Webhook-Request-Id"] == job["request_id"] and is_fals(headers, body, keys)
    assert not is_fals(headers, body + b" ", keys)
    assert not is_fals({**headers, "X-Fal-Webhook-Request-Id": "other"}, body, keys)
    assert not is_fals({**headers, "X-Fal-Webhook-Timestamp": str(int(time.time()) - 301)}, body, keys)
    assert not is_fals(headers, body, [{"x": base64.urlsafe_b64encode(bytes(31) + b"\x01").decode().rstrip("=")}])


def test_a_full_disk_is_said_and_leaves_no_trace(server):
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("this system cannot limit what another process writes")

    @contextlib.contextmanager
    def full(process):
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, hard))
        yield
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))

    server.run(FLASH)
    before = pictures(server)
    with full(worker_of(server)):
        failed = server.run(FLASH)
        assert failed.status_code == 500 and failed.json()["error_type"] == "storage_failed"
        assert server.run(FLASH, sync_mode=True).status_code == 200, "of which nothing is written"
    with full(server.process):
        for answer in (
            server.client.post(f"/queue/{FLASH}", json=SMALL),
            server.client.post("/files/upload", content=some_png(), headers={"Content-Type": "image/png"}),
        ):
            assert answer.status_code == 500 and answer.json()["error_type"] == "storage_failed"
        assert server.client.get("/ready").status_code == 200
    assert pictures(server) == before
    assert server.run(FLASH).status_code == 200


def test_what_is_old_is_removed(start):
    server = start("--keep", "4s")
    server.wait_ready()
    assert server.client.post("/files/upload", content=some_png(), headers={"Content-Type": "image/png"}).is_success
    job = server.submit(FLASH)
    assert server.result(job).status_code == 200
    server.until(lambda: not pictures(server), 30)
    assert server.client.get(f"/queue/{FLASH}/requests/{job['request_id']}").status_code == 404
    assert server.client.get("/api/history").json()["requests"] == []


def test_history_can_be_paged_and_forgotten(server):
    ids = [server.run(FLASH, seed=i).headers["x-fal-request-id"] for i in range(3)]
    page = server.client.get("/api/history?limit=2").json()["requests"]
    assert [e["request_id"] for e in page] == [ids[2], ids[1]] and page[0]["arguments"]["seed"] == 2
    rest = server.client.get("/api/history", params={"limit": 1, "before": page[-1]["ended"]}).json()["requests"]
    assert rest[0]["request_id"] == ids[0]
    url = rest[0]["output"]["images"][0]["url"]
    assert server.client.delete(f"/api/history/{ids[0]}").status_code == 204
    assert httpx.get(url).status_code == 404 and server.client.delete(f"/api/history/{ids[0]}").status_code == 404


def test_metrics_count(server):
    server.run(FLASH)
    text = server.client.get("/metrics").text
    assert 'flux2_requests_total{endpoint="fal-ai/flux-2/flash",outcome="ok"}' in text
    for name in (
        "flux2_inference_seconds_bucket",
        "flux2_queue_waiting",
        "flux2_worker_starts 1.0",
        "flux2_http_answers_total",
    ):
        assert name in text
    assert server.client.get("/ready").json() == {"status": "ready"}
