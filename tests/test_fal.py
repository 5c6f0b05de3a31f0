"""The spec's own Python examples with one line changed, and the rest of the client's calls."""

import _thread
import asyncio
import inspect
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from PIL import Image

import flux2_local.fal as fal_client
from flux2_local import Cancelled, OutputError, RequestError, images

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


@pytest.fixture
def work(monkeypatch):
    """What the worker does with a job, in place of generating; the test may set it."""
    work = SimpleNamespace(do=lambda job: {"prompt": job.request.prompt})
    monkeypatch.setattr(fal_client._worker, "work", lambda job: work.do(job))
    return work


def until_cancelled(job):
    deadline = time.monotonic() + 60
    while not job.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    raise Cancelled("Cancelled by the caller.")


ONE = ("fal-ai/flux-2", {"prompt": "one"})


def test_asyncio_handles(work):
    async def main():
        handle = await fal_client.submit_async(*ONE)
        states = [state async for state in handle.iter_events(with_logs=True, interval=0.01)]
        found = await fal_client.status_async(ONE[0], handle.request_id)
        got = await handle.get(), await fal_client.result_async(ONE[0], handle.request_id)
        await handle.cancel()
        await fal_client.cancel_async(ONE[0], handle.request_id)
        streamed = [event async for event in fal_client.stream_async(*ONE)]
        return states[-1], await handle.status(), found, got, await fal_client.run_async(*ONE), streamed[-1]

    *states, got, ran, streamed = asyncio.run(main())
    assert all(isinstance(state, fal_client.Completed) for state in states)
    assert got == ({"prompt": "one"},) * 2 and ran == streamed == {"prompt": "one"}


def test_asyncio_awaits_callbacks(work):
    told = []

    async def tell(news):
        told.append(news)

    asyncio.run(fal_client.subscribe_async(*ONE, on_enqueue=tell, on_queue_update=tell))
    assert isinstance(told[0], str) and isinstance(told[-1], fal_client.Completed)


def test_every_failure_is_the_clients_error(work):
    with pytest.raises(fal_client.FalClientHTTPError, match="guidance_scale") as caught:
        fal_client.submit(ONE[0], {"prompt": "x", "guidance_scale": 21})
    assert isinstance(caught.value, RequestError) and caught.value.status_code == 422
    assert caught.value.details[0]["loc"] == ("guidance_scale",)

    def fail(job):
        raise OutputError("the disk is full")

    work.do = fail
    handle = fal_client.submit(*ONE)
    with pytest.raises(fal_client.FalClientHTTPError, match="disk is full") as caught:
        handle.get()
    assert caught.value.error_type == "storage_failed" and isinstance(caught.value.__cause__, OutputError)
    assert handle.status().error == "the disk is full" and handle.status().error_type == "storage_failed"


def test_old_requests_are_forgotten_and_handles_keep_theirs(work, monkeypatch):
    monkeypatch.setattr(fal_client, "KEPT", 2)
    handles = [fal_client.submit(*ONE) for _ in range(6)]
    assert [handle.get() for handle in handles] == [{"prompt": "one"}] * 6
    fal_client.run(*ONE)
    assert len(fal_client._worker.jobs) == 3
    with pytest.raises(fal_client.FalClientError, match="not any more"):
        fal_client.result(ONE[0], handles[0].request_id)


@pytest.mark.parametrize(("sync", "kept"), [(True, False), ("true", False), (False, True), ("false", True)])
def test_an_answer_in_sync_mode_is_given_once(work, sync, kept):
    handle = fal_client.submit(ONE[0], {"prompt": "one", "sync_mode": sync})
    assert handle.get() == {"prompt": "one"}
    if kept:
        assert handle.get() == {"prompt": "one"}
    else:
        with pytest.raises(fal_client.FalClientError, match="has been given"):
            handle.get()


def test_a_folder_that_cannot_be_written_is_refused_before_loading(tmp_path):
    (tmp_path / "file").write_text("x")
    fal_client.configure(tmp_path / "file")
    with pytest.raises(fal_client.FalClientError, match=r"is no folder.*configure\(folder"):
        fal_client.run(*ONE)
    assert not fal_client._worker.pipelines.loaded


def test_a_waiting_request_is_cancelled_at_once(work):
    work.do = until_cancelled
    running, waiting, last = (fal_client.submit(*ONE) for _ in range(3))
    next(state for state in running.iter_events() if isinstance(state, fal_client.InProgress))
    assert (waiting.status(), last.status()) == (fal_client.Queued(0), fal_client.Queued(1))
    waiting.cancel()
    assert waiting.status().error == "Cancelled before it ran." and last.status() == fal_client.Queued(0)
    last.cancel()
    running.cancel()
    with pytest.raises(Cancelled, match="by the caller"):
        running.get()


def test_interrupting_cancels(work):
    def interrupted(job):
        _thread.interrupt_main()
        until_cancelled(job)

    work.do = interrupted
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
    try:
        for call in (fal_client.run, lambda *request: list(fal_client.stream(*request))):
            with pytest.raises(KeyboardInterrupt):
                call(*ONE)
            assert list(fal_client._worker.jobs.values())[-1].cancelled
    finally:
        signal.signal(signal.SIGINT, before)

    async def main():
        await asyncio.wait_for(fal_client.run_async(*ONE), 0.2)

    work.do = until_cancelled
    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert list(fal_client._worker.jobs.values())[-1].cancelled


def test_uploads_are_references(tmp_path):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    urls = [
        fal_client.upload_file(tmp_path / "a.png", repository="fal"),
        fal_client.upload_image(picture, format="png"),
        fal_client.upload(data, "image/png", "a.png"),
        fal_client.encode_file(str(tmp_path / "a.png")),
        fal_client.encode_image(picture, "png"),
        asyncio.run(fal_client.upload_file_async(tmp_path / "a.png")),
        asyncio.run(fal_client.upload_image_async(picture, "png")),
    ]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    assert all(got.tobytes() == picture.tobytes() for got in images.references(tuple(urls)))


def test_names_and_arguments_are_the_real_clients():
    real = pytest.importorskip("fal_client")
    for name in sorted(set(fal_client.__all__) - {"configure"}):
        ours, theirs = getattr(fal_client, name), getattr(real, name)
        if inspect.isclass(ours):
            methods = [m for m in vars(ours) if not m.startswith("_") and callable(getattr(ours, m))]
            assert all(hasattr(theirs, m) for m in methods), name
            continue
        kind = inspect.iscoroutinefunction, inspect.isasyncgenfunction
        assert [k(ours) for k in kind] == [k(theirs) for k in kind], name
        ours, theirs = (list(inspect.signature(f).parameters) for f in (ours, theirs))
        count = 2 if name in {"upload", "upload_async"} or "application" in theirs else 1
        assert ours[:count] == theirs[:count], name
