"""Unmodified clients: the spec's cURL and Python script, fal-client's calls, and the JavaScript client through its proxy."""

import asyncio
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from harness import EDIT, FLASH, LONG, SMALL, STANDARD, TURBO
from PIL import Image

fal_client = pytest.importorskip("fal_client", reason="fal-client is not installed: pip install 'flux2-local[test]'")

JAVASCRIPT_CLIENT = "@fal-ai/client@1.10.1"

CURL = """\
curl --request POST \\
  --url https://fal.run/fal-ai/flux-2/flash \\
  --header "Authorization: Key $FAL_KEY" \\
  --header "Content-Type: application/json" \\
  --data '{
     "prompt": "An army of ants battles for a sugar cube in a giant sandbox, with tiny plastic soldier toys caught in the melee."
   }'
"""

PYTHON = """\
import fal_client

def on_queue_update(update):
    if isinstance(update, fal_client.InProgress):
        for log in update.logs:
           print(log["message"])

result = fal_client.subscribe(
    "fal-ai/flux-2/turbo",
    arguments={
        "prompt": "A realistic photograph of a vintage typewriter with a sheet of paper inserted"
    },
    with_logs=True,
    on_queue_update=on_queue_update,
)
print(result)
"""

SCRIPT = """\
import { readFileSync } from "node:fs";
import { fal } from "@fal-ai/client";
CONFIGURATION
const input = { prompt: "a boat", image_size: "square", seed: 5 };
const out = { updates: [], stream: [], failures: [] };

const result = await fal.subscribe("fal-ai/flux-2/turbo", {
  input, logs: true, pollInterval: 100,
  onQueueUpdate: (update) => {
    out.updates.push(update.status);
    if (update.status === "IN_PROGRESS") update.logs.map((log) => log.message);
  },
});
out.subscribed = result;
out.streamed = await fal.subscribe("fal-ai/flux-2/flash", { input, logs: true, mode: "streaming" });
out.run = await fal.run("fal-ai/flux-2/flash", { input });

const stream = await fal.stream("fal-ai/flux-2/flash", { input });
for await (const event of stream) out.stream.push(event);
out.done = await stream.done();

const { request_id } = await fal.queue.submit("fal-ai/flux-2/flash", { input });
await fal.queue.subscribeToStatus("fal-ai/flux-2/flash", { requestId: request_id, logs: true, pollInterval: 100 });
out.status = await fal.queue.status("fal-ai/flux-2/flash", { requestId: request_id, logs: true });
out.result = await fal.queue.result("fal-ai/flux-2/flash", { requestId: request_id });

const long = await fal.queue.submit("fal-ai/flux-2", { input: { ...input, num_inference_steps: 50, num_images: 4 } });
await fal.queue.cancel("fal-ai/flux-2", { requestId: long.request_id });
await fal.queue.subscribeToStatus("fal-ai/flux-2", { requestId: long.request_id, pollInterval: 100 });
const failing = [
  () => fal.queue.result("fal-ai/flux-2", { requestId: long.request_id }),
  () => fal.run("fal-ai/flux-2", { input: { prompt: "x", guidance_scale: 21 } }),
  () => fal.queue.status("fal-ai/flux-2", { requestId: "nobody" }),
];
for (const call of failing) await call().catch((e) => out.failures.push([e.name, e.status, e.body]));

const picture = new Blob([readFileSync("photo.png")], { type: "image/png" });
out.uploaded = await fal.storage.upload(picture, { lifecycle: { expiresIn: "1h" } });
const edit = { ...input, num_inference_steps: 4, image_urls: [out.uploaded, picture] };
out.edited = await fal.subscribe("fal-ai/flux-2/edit", { input: edit, pollInterval: 100, priority: "low", startTimeout: 60 });
await fal.storage.upload(new Blob(["x"], { type: "text/plain" })).catch((e) => out.failures.push([e.name, e.status]));
console.log(JSON.stringify(out));
"""


@pytest.fixture
def plain(server, monkeypatch):
    """fal-client pointed at the server by the lines that ``serve`` printed for plain http."""
    for name in ("RUN_URL_FORMAT", "QUEUE_URL_FORMAT", "REST_URL", "CDN_URL"):
        monkeypatch.setattr(fal_client.client, name, None)
    monkeypatch.setenv("FAL_KEY", "")
    exec(inspect.cleandoc(printed(server, "Python, before the first call of fal_client:")), {})
    return fal_client


def printed(server, title):
    """What ``serve`` printed to paste under a title."""
    return server.text.partition(f"{title}\n")[2].partition("\n\n")[0]


def test_the_specs_curl_command_with_the_host_replaced(server):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = CURL.replace("https://fal.run", server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "FAL_KEY": "any"})
    result = json.loads(done.stdout)
    assert result["images"][0]["width"] == 1024 and result["prompt"].startswith("An army of ants")
    done = subprocess.run(["bash", "-c", printed(server, "cURL:")], capture_output=True, text=True)
    assert json.loads(done.stdout)["prompt"] == "a lighthouse at dusk", "the command that serve prints"


def test_the_specs_python_script_with_environment_variables_alone(server, tmp_path):
    lines = [line.strip().removeprefix("export ") for line in server.text.splitlines() if "export " in line]
    environment = dict(pair.split("=", 1) for line in lines for pair in line.split())
    assert set(environment) == {"FAL_KEY", "FAL_RUN_HOST", "FAL_QUEUE_RUN_HOST", "SSL_CERT_FILE"}
    script = tmp_path / "script.py"
    script.write_text(PYTHON.replace('inserted"', 'inserted", "image_size": "square"'))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "step 8/8" in done.stdout and f"'url': '{server.url}/files/" in done.stdout


def test_every_call_of_the_python_client(plain, server):
    seen = []
    arguments = {**SMALL, "seed": 5}
    result = plain.subscribe(TURBO, arguments, with_logs=True, on_queue_update=seen.append, on_enqueue=seen.append)
    assert isinstance(seen[0], str) and isinstance(seen[-1], plain.Completed) and seen[-1].metrics["inference_time"] > 0
    assert any(isinstance(s, plain.Queued | plain.InProgress) for s in seen[1:])
    assert result["seed"] == 5 and plain.run(FLASH, arguments)["seed"] == 5
    handle = plain.submit(FLASH, arguments)
    assert handle.get()["images"] and plain.result(FLASH, handle.request_id)["seed"] == 5
    done = plain.status(FLASH, handle.request_id, with_logs=True)
    assert isinstance(done, plain.Completed) and done.logs[-1]["message"] == "step 4/4" and done.error is None
    events = list(plain.stream(FLASH, arguments))
    assert events[-1]["images"] and any(e.get("stage") == "denoise" for e in events)


def test_the_python_clients_errors_and_cancelling(plain):
    handle = plain.submit(STANDARD, LONG)
    for state in handle.iter_events(with_logs=True):
        if isinstance(state, plain.InProgress):
            plain.cancel(STANDARD, handle.request_id)
    assert isinstance(state, plain.Completed) and state.error_type == "client_cancelled"
    with pytest.raises(plain.FalClientHTTPError) as caught:
        handle.get()
    assert caught.value.error_type == "client_cancelled"
    with pytest.raises(plain.FalClientHTTPError) as caught:
        plain.run(STANDARD, {"prompt": "x", "guidance_scale": 21})
    assert caught.value.status_code == 422 and caught.value.message[0]["loc"] == ["body", "guidance_scale"]


def test_the_python_clients_asynchronous_calls_and_editing(plain):
    async def main():
        picture = plain.encode_image(Image.effect_noise((96, 96), 80).convert("RGB"))
        edited = await plain.run_async(EDIT, {**SMALL, "image_urls": [picture], "num_inference_steps": 4})
        handle = await plain.submit_async(FLASH, SMALL)
        result = await plain.subscribe_async(FLASH, SMALL)
        streamed = [event async for event in plain.stream_async(FLASH, SMALL)]
        return edited, await handle.get(), result, streamed[-1]

    assert all(answer["images"] for answer in asyncio.run(main()))


def test_the_python_clients_uploads(plain, tmp_path):
    picture = Image.effect_noise((96, 80), 80).convert("RGB")
    picture.save(tmp_path / "photo.png")
    (tmp_path / "photo.png").rename(tmp_path / "misnamed.jpg")
    soon = plain.StorageSettings(expires_in="1h")

    async def asynchronous():
        return await plain.upload_file_async(tmp_path / "misnamed.jpg"), await plain.upload_image_async(picture)

    urls = [
        plain.upload_file(tmp_path / "misnamed.jpg", lifecycle=soon),
        plain.upload_image(picture, "webp", repository="fal"),
        plain.upload((tmp_path / "misnamed.jpg").read_bytes(), "image/png"),
        *asyncio.run(asynchronous()),
    ]
    kinds = [httpx.get(url).headers["content-type"] for url in urls]
    assert kinds == ["image/png", "image/webp", "image/png", "image/png", "image/jpeg"], "by what they are"
    assert all(Image.open(io.BytesIO(httpx.get(url).content)).size == (96, 80) for url in urls)
    edited = plain.run(EDIT, {**SMALL, "image_urls": urls[:2], "num_inference_steps": 4})
    assert edited["images"][0]["width"] == 512
    with pytest.raises(plain.FalClientHTTPError) as caught:
        plain.upload(b"no picture", "text/plain", file_name="notes.txt")
    assert caught.value.status_code == 422


def test_priorities_and_start_timeouts(plain, server):
    running = plain.submit(STANDARD, LONG)
    low, normal = plain.submit(FLASH, SMALL, priority="low"), plain.submit(FLASH, SMALL)
    late = plain.submit(FLASH, SMALL, start_timeout=2, priority="low")
    assert (normal.status().position, low.status().position, late.status().position) == (0, 1, 2)
    with pytest.raises(plain.FalClientHTTPError) as caught:
        late.get()
    assert caught.value.status_code == 504 and caught.value.error_type == "request_timeout"
    running.cancel()
    assert low.get()["images"] and normal.get()["images"]
    ended = [e["request_id"] for e in server.client.get("/api/history?limit=2").json()["requests"]]
    assert ended == [low.request_id, normal.request_id], "newest first"
    wrong = server.client.post(f"/queue/{FLASH}", json=SMALL, headers={"X-Fal-Request-Timeout": "soon"})
    assert wrong.status_code == 400 and wrong.json()["error_type"] == "bad_request"


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory) -> Path:
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", JAVASCRIPT_CLIENT],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        pytest.skip(f"npm cannot install {JAVASCRIPT_CLIENT}: {done.stderr[-200:]}")
    return folder


def test_every_call_of_the_javascript_client_through_the_proxy(server, node_folder):
    configuration = printed(server, "JavaScript, before the first call of fal:").strip()
    (node_folder / "script.js").write_text(SCRIPT.replace("CONFIGURATION", configuration))
    Image.effect_noise((96, 96), 80).convert("RGB").save(node_folder / "photo.png")
    done = subprocess.run(["node", "script.js"], cwd=node_folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["updates"][-1] == "COMPLETED" and len(out["subscribed"]["requestId"]) == 36
    for name in ("subscribed", "streamed", "run", "result"):
        assert out[name]["data"]["seed"] == 5 and out[name]["data"]["images"][0]["url"].startswith(server.url)
    assert out["stream"][-1]["images"] and out["done"]["seed"] == 5
    assert any(event.get("stage") == "denoise" for event in out["stream"])
    assert out["status"]["status"] == "COMPLETED" and out["status"]["logs"]
    assert out["uploaded"].startswith(f"{server.url}/files/") and out["edited"]["data"]["images"]
    cancelled, wrong, unknown, text = out["failures"]
    assert text == ["ValidationError", 422]
    assert cancelled[2]["error_type"] == "client_cancelled"
    assert wrong[:2] == ["ValidationError", 422] and wrong[2]["detail"][0]["loc"] == ["body", "guidance_scale"]
    assert unknown[1] == 404
