"""Crashes, restarts, webhooks, expiry, metrics."""

import http.server
import json
import threading

import httpx
import psutil
import pytest
from harness import FLASH, LONG, STANDARD, TURBO

JOBS = 20


def worker_of(server):
    return psutil.Process(server.process.pid).children()[0]


def pictures(server):
    return sorted(p.name for p in (server.folder / "files").iterdir())


def test_killed_in_mid_job_with_twenty_queued_every_one_ends_exactly_once(start):
    server = start()
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


def test_a_queued_sync_request_survives_a_restart_and_leaves_nothing(start):
    server = start()
    server.wait_ready()
    job, gone = server.submit(FLASH, sync_mode=True, seed=4), server.submit(STANDARD, **LONG)
    server.running(gone)
    server.kill()
    server.start()
    assert server.cancel(gone).status_code == 202
    result = server.result(job).json()
    assert result["seed"] == 4 and result["images"][0]["url"].startswith("data:")
    assert pictures(server) == []


def test_a_caller_on_the_line_is_not_worked_for_after_a_restart(start):
    server = start()
    server.wait_ready()
    with (
        pytest.raises(httpx.TransportError),
        httpx.stream("POST", f"{server.url}/{STANDARD}/stream", json=LONG) as answer,
    ):
        for _ in answer.iter_lines():
            server.kill()
    server.start()
    server.idle()
    entry = server.client.get("/api/history").json()["requests"][0]
    assert "The server stopped" in entry["error"]


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(500 if len(self.server.got) == 1 else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook)
    server.got = []
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


def test_what_is_old_is_removed(start):
    server = start("--keep", "4s")
    server.wait_ready()
    job = server.submit(FLASH)
    assert server.result(job).status_code == 200 and len(pictures(server)) == 1
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
