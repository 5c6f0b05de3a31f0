"""The spec's own Python examples with one line changed, and the rest of the client's calls."""

import asyncio
import inspect
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

import flux2_local.fal as fal_client
from flux2_local import Cancelled, RequestError

SMALL = {"image_size": "square", "enable_safety_checker": False}


@pytest.fixture(autouse=True)
def local_model(klein_folder, tmp_path):
    fal_client.configure(tmp_path / "out", model=klein_folder)
    yield
    fal_client.configure(tmp_path, model=None)


def path_of(url):
    return Path(urlsplit(url).path)


@pytest.mark.parametrize("application", ["fal-ai/flux-2", "fal-ai/flux-2/flash", "fal-ai/flux-2/turbo"])
def test_subscribe_as_in_the_spec(application):
    messages, states = [], []

    def on_queue_update(update):
        states.append(type(update).__name__)
        if isinstance(update, fal_client.InProgress):
            for log in update.logs:
                messages.append(log["message"])

    result = fal_client.subscribe(
        application,
        arguments={"prompt": "a lighthouse", "seed": 5, **SMALL},
        with_logs=True,
        on_queue_update=on_queue_update,
    )
    assert set(result) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert result["seed"] == 5 and result["prompt"] == "a lighthouse" and result["timings"]["inference"] > 0
    assert Image.open(path_of(result["images"][0]["url"])).size == (512, 512)
    assert states[-1] == "Completed" and "InProgress" in states
    assert any(m.startswith("step ") for m in messages)


def test_run_submit_status_result():
    arguments = {"prompt": "a boat", "seed": 1, **SMALL}
    first = fal_client.run("fal-ai/flux-2/flash", arguments=arguments)
    handle = fal_client.submit("fal-ai/flux-2/flash", arguments=arguments)
    second = fal_client.result("fal-ai/flux-2/flash", handle.request_id)
    done = fal_client.status("fal-ai/flux-2/flash", handle.request_id, with_logs=True)
    assert isinstance(done, fal_client.Completed) and done.metrics["inference_time"] > 0 and done.logs
    one, two = (path_of(r["images"][0]["url"]).read_bytes() for r in (first, second))
    assert one == two


def test_sync_mode_keeps_nothing(tmp_path):
    result = fal_client.run("fal-ai/flux-2/flash", arguments={"prompt": "a boat", "sync_mode": True, **SMALL})
    assert result["images"][0]["url"].startswith("data:image/png;base64,")
    assert not (tmp_path / "out").exists()


def test_fields_that_turbo_fixes_are_ignored_and_it_is_said():
    arguments = {"prompt": "a boat", "num_inference_steps": 50, "nonsense": 1, **SMALL}
    handle = fal_client.submit("fal-ai/flux-2/turbo", arguments=arguments)
    handle.get()
    logs = handle.status(with_logs=True).logs
    assert any("num_inference_steps is fixed" in log["message"] for log in logs)
    assert sum(log["message"].startswith("step ") for log in logs) == 8


def test_wrong_input_is_refused_at_once():
    with pytest.raises(RequestError, match="fal-ai/flux-2/turbo"):
        fal_client.run("fal-ai/flux-3", arguments={"prompt": "x"})
    with pytest.raises(RequestError, match="guidance_scale"):
        fal_client.submit("fal-ai/flux-2", arguments={"prompt": "x", "guidance_scale": 21})
    with pytest.raises(fal_client.FalClientError):
        fal_client.result("fal-ai/flux-2", "nobody")


def test_cancel_while_running_and_while_waiting():
    arguments = {
        "prompt": "a boat",
        "num_inference_steps": 50,
        "image_size": "square_hd",
        "enable_safety_checker": False,
    }
    running = fal_client.submit("fal-ai/flux-2", arguments=arguments)
    waiting = fal_client.submit("fal-ai/flux-2", arguments=arguments)
    assert isinstance(waiting.status(), fal_client.Queued)
    for state in running.iter_events(with_logs=True):
        if isinstance(state, fal_client.InProgress) and any("step 2/" in log["message"] for log in state.logs):
            break
    fal_client.cancel("fal-ai/flux-2", waiting.request_id)
    running.cancel()
    start = time.perf_counter()
    for handle in (running, waiting):
        with pytest.raises(Cancelled):
            handle.get()
    assert time.perf_counter() - start < 30
    assert isinstance(running.status(), fal_client.Completed)


def test_streaming_ends_with_the_answer():
    events = list(fal_client.stream("fal-ai/flux-2/flash", arguments={"prompt": "a boat", **SMALL}))
    assert "images" in events[-1] and any("log" in event for event in events[:-1])


def test_asyncio_does_not_block():
    async def main():
        task = asyncio.create_task(fal_client.subscribe_async("fal-ai/flux-2/flash", {"prompt": "a boat", **SMALL}))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, await task

    ticks, result = asyncio.run(main())
    assert ticks > 3 and result["images"]


def test_names_and_arguments_are_the_real_clients():
    real = pytest.importorskip("fal_client")
    for name in ("run", "submit", "subscribe", "stream", "status", "result", "cancel"):
        ours = inspect.signature(getattr(fal_client, name)).parameters
        theirs = inspect.signature(getattr(real, name)).parameters
        assert list(ours)[:2] == list(theirs)[:2], name
