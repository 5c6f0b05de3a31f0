"""The contract, call by call: run, queue, stream, cancel, errors."""

import base64
import io
import json
import time

import httpx
import pytest
from harness import EDIT, FLASH, LONG, STANDARD, TURBO
from PIL import Image

KEYS = {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}


def test_run_answers_as_fal_does(server):
    answer = server.run(TURBO, seed=7, output_format="jpeg", num_images=2)
    assert answer.status_code == 200 and len(answer.headers["x-fal-request-id"]) == 36
    result = answer.json()
    assert set(result) == KEYS and result["seed"] == 7 and result["timings"]["inference"] > 0
    assert result["has_nsfw_concepts"] == [False, False] and result["prompt"] == "a boat"
    for image in result["images"]:
        assert image["content_type"] == "image/jpeg" and (image["width"], image["height"]) == (512, 512)
        picture = httpx.get(image["url"])
        assert picture.headers["content-type"] == "image/jpeg" and len(picture.content) == image["file_size"]
        assert Image.open(io.BytesIO(picture.content)).size == (512, 512)


def test_the_same_seed_gives_the_same_picture_through_the_queue(server):
    job = server.submit(FLASH, seed=3)
    assert job["status"] == "IN_QUEUE" and job["queue_position"] == 0 and job["logs"] is None and job["metrics"] == {}
    assert job["status_url"] == f"{server.url}/queue/{FLASH}/requests/{job['request_id']}/status"
    queued = server.result(job).json()
    direct = server.run(FLASH, seed=3).json()
    assert httpx.get(queued["images"][0]["url"]).content == httpx.get(direct["images"][0]["url"]).content


def test_a_request_goes_through_its_states(server):
    first, second = server.submit(STANDARD, num_inference_steps=8), server.submit(FLASH)
    waiting = server.client.get(second["status_url"], params={"logs": 1})
    assert waiting.status_code == 202 and waiting.json()["status"] == "IN_QUEUE"
    assert waiting.json()["queue_position"] in (0, 1)
    unfinished = server.client.get(first["response_url"])
    assert unfinished.status_code == 400 and "detail" in unfinished.json()
    server.running(first)
    assert server.status(first, logs=False)["logs"] is None
    server.result(second)
    done = server.client.get(first["status_url"], params={"logs": "true"})
    assert done.status_code == 200 and done.json()["metrics"]["inference_time"] > 0
    log = next(log for log in done.json()["logs"] if log["message"] == "step 8/8")
    assert set(log) == {"message", "level", "source", "timestamp"}
    for path in ("", "/", "/response"):
        assert set(server.client.get(first["response_url"] + path).json()) == KEYS
    sub = server.client.get(f"/queue/{TURBO}/requests/{second['request_id']}/status/")
    assert sub.json()["status"] == "COMPLETED"


def test_status_stream_tells_every_change_once(server):
    job = server.submit(STANDARD, num_inference_steps=6)
    with server.client.stream("GET", job["status_url"] + "/stream?logs=1") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1]["status"] == "COMPLETED" and "IN_PROGRESS" in {e["status"] for e in events}
    steps = [log["message"] for e in events for log in e["logs"] if log["message"].startswith("step")]
    assert steps == [f"step {i}/6" for i in range(1, 7)]


def test_stream_sends_previews_and_ends_with_the_output(server):
    with server.client.stream(
        "POST", f"/{STANDARD}/stream", json=LONG | {"num_inference_steps": 6, "num_images": 1}
    ) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert set(events[-1]) == KEYS
    previews = [e["images"][0] for e in events[:-1] if e.get("images")]
    assert len(previews) >= 3 and previews[0]["url"].startswith("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(previews[0]["url"].partition(",")[2])))
    assert picture.size == (previews[0]["width"], previews[0]["height"])


def test_sync_mode_keeps_nothing(server):
    before = {p.name for p in (server.folder / "files").iterdir()}
    answer = server.run(FLASH, sync_mode=True)
    assert answer.json()["images"][0]["url"].startswith("data:image/png;base64,")
    queued = server.submit(FLASH, sync_mode=True)
    result = server.result(queued)
    assert result.json()["images"][0]["url"].startswith("data:image/png;base64,")
    assert server.result(queued).json() == result.json(), "it can be asked for again for a while"
    assert {p.name for p in (server.folder / "files").iterdir()} == before
    ids = {entry["request_id"] for entry in server.client.get("/api/history?limit=100").json()["requests"]}
    assert not ids & {queued["request_id"], answer.headers["x-fal-request-id"]}


def test_cancel_works_while_waiting_and_running(server):
    running, waiting = server.submit(STANDARD, **LONG), server.submit(STANDARD, **LONG)
    answer = server.cancel(waiting)
    assert (answer.status_code, answer.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    assert server.status(waiting)["error_type"] == "client_cancelled"
    server.running(running)
    assert server.cancel(running).status_code == 202
    before = steps(server, running)
    failed = server.result(running)
    assert failed.status_code == 499 and failed.json()["error_type"] == "client_cancelled"
    assert steps(server, running) <= before + 2, "one step was under way, and one report"
    again = server.cancel(running)
    assert (again.status_code, again.json()) == (400, {"status": "ALREADY_COMPLETED"})
    nobody = server.client.put(f"/queue/{STANDARD}/requests/nobody/cancel")
    assert (nobody.status_code, nobody.json()) == (404, {"status": "NOT_FOUND"})


def steps(server, job):
    return sum(log["message"].startswith("step") for log in server.status(job)["logs"])


@pytest.mark.parametrize("path", ["", "/stream"])
def test_a_caller_that_hangs_up_stops_the_work(server, path):
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{server.url}/{STANDARD}{path}", json=LONG, timeout=0.7) as answer,
    ):
        answer.read() if not path else time.sleep(0.7)
        raise httpx.ReadTimeout("gone")
    server.idle()
    last = server.client.get("/api/history?limit=1").json()["requests"][0]
    assert last["error"] is not None and last["output"] is None


def test_what_turbo_fixes_is_ignored_and_said(server):
    job = server.submit(TURBO, num_inference_steps=50, nonsense=1, acceleration="none")
    server.result(job)
    messages = [log["message"] for log in server.status(job)["logs"]]
    assert sum(m.startswith("step") for m in messages) == 8
    assert any("num_inference_steps is fixed" in m for m in messages)


@pytest.mark.parametrize(
    ("body", "loc", "kind"),
    [
        ({"prompt": "x", "guidance_scale": 21}, ["body", "guidance_scale"], "less_than_equal"),
        ({"prompt": "x", "num_inference_steps": 3}, ["body", "num_inference_steps"], "greater_than_equal"),
        ({"prompt": "x", "num_images": 5}, ["body", "num_images"], "less_than_equal"),
        ({"prompt": "x", "output_format": "gif"}, ["body", "output_format"], "literal_error"),
        (
            {"prompt": "x", "image_size": {"width": 100}},
            ["body", "image_size", "ImageSize", "width"],
            "greater_than_equal",
        ),
        ({"prompt": "  "}, ["body", "prompt"], "value_error"),
        ({"prompt": ""}, ["body", "prompt"], "string_too_short"),
        ({}, ["body", "prompt"], "missing"),
    ],
)
def test_wrong_fields_are_named_as_fal_names_them(server, body, loc, kind):
    for path in (f"/{STANDARD}", f"/queue/{STANDARD}", f"/{STANDARD}/stream"):
        answer = server.client.post(path, json=body)
        assert answer.status_code == 422 and answer.headers["x-fal-retryable"] == "false"
        assert answer.headers["x-fal-billable-units"] == "0"
        detail = answer.json()["detail"][0]
        assert detail["loc"] == loc and detail["type"] == kind and detail["msg"] and "url" in detail
    if kind == "less_than_equal" and "guidance_scale" in body:
        assert detail["ctx"] == {"le": 20.0} and detail["input"] == 21


def test_unknown_things_are_404(server):
    for method, path in (("POST", "/fal-ai/flux-3"), ("POST", "/queue/fal-ai/flux-3"), ("GET", "/nowhere")):
        answer = server.client.request(method, path, json={"prompt": "x"})
        assert answer.status_code == 404 and answer.json()["error_type"] == "not_found"
    for path in ("", "/status", "/status/stream"):
        answer = server.client.get(f"/queue/{STANDARD}/requests/nobody{path}")
        assert answer.status_code == 404 and "detail" in answer.json()


def test_edit_reads_pictures_from_data_uris_and_from_this_server(server):
    made = server.run(FLASH, seed=1).json()["images"][0]["url"]
    out = io.BytesIO()
    Image.effect_noise((128, 96), 80).convert("RGB").save(out, "WEBP")
    data = f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
    answer = server.run(EDIT, image_urls=[made, data], num_inference_steps=4)
    assert answer.status_code == 200, answer.text
    missing = server.run(EDIT)
    assert missing.status_code == 422 and missing.json()["detail"][0]["loc"] == ["body", "image_urls"]
    entry = server.client.get("/api/history?limit=1").json()["requests"][0]
    assert (
        len(entry["arguments"]["image_urls"]) == 2 and httpx.get(entry["arguments"]["image_urls"][1]).status_code == 200
    )


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/x.png", "http://localhost/x.png", "http://[::1]/x.png", "http://169.254.169.254/meta",
     "http://10.0.0.1/x", "http://[::ffff:10.0.0.1]/x", "file:///etc/passwd", "ftp://example.com/x", "/etc/passwd",
     "data:image/png;base64,####", "data:text/plain,hello", "data:image/png"],
)  # fmt: skip
def test_pictures_that_cannot_be_had_are_refused(server, url):
    answer = server.run(EDIT, image_urls=[url])
    detail = answer.json()["detail"][0]
    assert answer.status_code == 422 and detail["loc"] == ["body", "image_urls", 0]
    assert detail["type"] == "file_download_error"
