"""The playground in a headless Chromium."""

import json
import re
from pathlib import Path

import pytest
from harness import EDIT, FLASH, TURBO

PATIENCE = 120_000
FOLDER = Path(__file__).parents[2] / "flux2_local" / "server" / "playground"


@pytest.fixture
def page(browser, server):
    """The playground; it must ask nobody else and complain of nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors, foreign = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda m: errors.append(m.text) if m.type == "error" and "Failed to load" not in m.text else None
    )
    page.on(
        "request", lambda r: foreign.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None
    )
    page.goto(server.url)
    page.wait_for_selector("#prompt")
    yield page
    assert not errors and not foreign
    context.close()


def choose(page, title):
    page.get_by_role("tab", name=title, exact=True).click()


def test_typing_a_prompt_shows_previews_and_the_picture(page, server):
    page.fill("#prompt", "a lighthouse at dusk")
    page.select_option("#image_size", "square")
    page.fill("#num_inference_steps", "12")
    page.fill("#seed", "42")
    page.click("#generate")
    preview = page.wait_for_selector("#preview")
    assert preview.get_attribute("src").startswith("data:image/jpeg")
    assert re.search(r"step \d+ of 12|waiting|encode|denoise", page.inner_text("#stage"))
    page.wait_for_function("document.title.includes('/12 ')")
    picture = page.wait_for_selector("img.finished")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
    assert picture.get_attribute("alt") == "a lighthouse at dusk"
    assert "inference" in page.inner_text("#timings") and "Seed 42" in page.inner_text("#used-seed")
    entry = server.client.get("/api/history?limit=1").json()["requests"][0]
    assert entry["arguments"] == {
        "prompt": "a lighthouse at dusk", "image_size": "square", "num_inference_steps": 12, "seed": 42,
    }  # fmt: skip


def test_cancelling_by_keyboard(page, server):
    page.fill("#prompt", "a boat")
    page.fill("#num_inference_steps", "50")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#preview")
    page.keyboard.press("Escape")
    page.wait_for_selector("#error:text-is('Cancelled.')")
    assert page.is_enabled("#generate") and page.is_disabled("#cancel")
    server.idle()
    assert server.client.get("/api/history?limit=1").json()["requests"][0]["error"]


def test_settings_of_the_history_are_used_again(page, server):
    server.run(TURBO, seed=11, guidance_scale=4.5, image_size={"width": 640, "height": 512})
    page.reload()
    page.wait_for_selector("#entries li")
    page.locator("#entries li").first.get_by_role("button", name="Use settings").click()
    assert page.get_attribute("[role=tab][aria-selected=true]", "id") == f"tab-{TURBO}"
    assert page.input_value("#seed") == "11" and page.input_value("#guidance_scale") == "4.5"
    assert page.input_value("#image_size") == "custom" and page.input_value("#width") == "640"
    assert page.locator("#num_inference_steps").count() == 0
    page.click("#code summary")
    assert '"seed": 11' in page.inner_text("#snippet") and f"/{TURBO}" in page.inner_text("#snippet")
    page.get_by_role("button", name="Python").click()
    assert f"{server.url}/queue/" in page.inner_text("#snippet") and "arguments={" in page.inner_text("#snippet")
    page.get_by_role("button", name="JavaScript").click()
    assert "proxyUrl" in page.inner_text("#snippet")
    before = page.locator("#entries li").count()
    page.locator("#entries li").first.get_by_role("button", name="Delete").click()
    page.locator("#entries li").nth(before - 1).wait_for(state="detached")


def test_every_parameter_of_every_endpoint_has_a_control_with_its_range(page, server):
    for endpoint in server.client.get("/api/info").json()["endpoints"]:
        choose(page, endpoint["title"])
        for name in endpoint["schema"]["properties"]:
            assert page.locator(f"#{name}").count() == 1, name
            assert page.locator(f"label[for={name}]").count() == 1, name
    choose(page, "Flux 2")
    steps, guidance = page.locator("#num_inference_steps"), page.locator("#guidance_scale")
    assert (steps.get_attribute("min"), steps.get_attribute("max")) == ("4", "50")
    assert (guidance.get_attribute("min"), guidance.get_attribute("max")) == ("0", "20")
    assert "acceleration" in page.inner_text("#plan-text") or page.text_content("#plan-text")


def test_a_wrong_value_is_shown_at_its_field(page):
    page.fill("#prompt", "a boat")
    page.fill("#guidance_scale", "99")
    page.click("#generate")
    page.wait_for_selector("#guidance_scale-problem:not([hidden])")
    assert "less than or equal to 20" in page.inner_text("#guidance_scale-problem")


def test_editing_takes_a_picture(page, server, tmp_path):
    from PIL import Image

    Image.effect_noise((96, 96), 80).convert("RGB").save(tmp_path / "in.png")
    choose(page, "Flux 2 Edit")
    page.fill("#prompt", "make it winter")
    page.select_option("#image_size", "square")
    page.fill("#num_inference_steps", "4")
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#image_urls", tmp_path / "notes.png")
    page.wait_for_selector("#image_urls-problem:not([hidden])")
    assert "notes.png" in page.inner_text("#image_urls-problem")
    page.get_by_label("Address of a picture").fill("https://example.com/a.png")
    page.get_by_label("Address of a picture").press("Tab")
    assert page.inner_text(".thumbs .elsewhere") == "https://example.com/a.png", "shown without asking that server"
    page.get_by_role("button", name="remove reference 1").click()
    page.set_input_files("#image_urls", tmp_path / "in.png")
    page.wait_for_selector(".thumbs img")
    page.click("#code summary")
    assert f"{server.url}/files/" in page.inner_text("#snippet"), "code that runs as it stands"
    page.click("#generate")
    page.wait_for_selector("img.finished")
    entry = server.client.get("/api/history?limit=1").json()["requests"][0]
    assert entry["endpoint"] == EDIT
    choose(page, "Flux 2")
    page.locator("#entries li").first.get_by_role("button", name="Edit", exact=True).click()
    made = page.locator(".thumbs img").get_attribute("src")
    assert page.input_value("#prompt") == "" and entry["output"]["images"][0]["url"].endswith(made)


def test_it_fits_a_phone_and_can_be_walked_by_keyboard(browser, server):
    page = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True).new_page()
    page.goto(f"{server.url}/#{FLASH}")
    page.wait_for_selector("#prompt")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sizes = page.evaluate(
        "[...document.querySelectorAll('button:not([hidden])')].map(b => b.getBoundingClientRect().height)"
    )
    assert min(size for size in sizes if size) >= 32
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    fields = json.loads(
        page.evaluate("JSON.stringify([...document.querySelectorAll('#fields [name]')].map(f => f.name))")
    )
    assert set(fields) <= reached and "generate" in reached
    page.fill("#prompt", "a boat")
    page.get_by_role("tab", name="Flux 2", exact=True).click()
    page.fill("#num_inference_steps", "50")
    page.click("#generate")
    page.wait_for_selector("#preview")
    page.wait_for_function("document.getElementById('preview').getBoundingClientRect().top < 300")
    top, bottom = page.evaluate(
        "(({top, bottom}) => [top, bottom])(document.getElementById('cancel').getBoundingClientRect())"
    )
    assert top >= 0 and bottom <= 740, "picture and Cancel are in sight at once"
    page.click("#cancel")
    page.wait_for_selector("#error:text-is('Cancelled.')")
    page.context.close()


def test_it_asks_for_the_key(browser, start):
    server = start("--api-key", "a-long-enough-key")
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_selector("#key-input")
    page.fill("#key-input", "a-long-enough-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#prompt")
    page.close()


def test_it_brings_everything_itself():
    for path in FOLDER.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//|@import|url\(http", text), path
        assert "innerHTML" not in text, path
