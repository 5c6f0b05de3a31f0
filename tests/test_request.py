"""The request schema: defaults, ranges, messages, and random input."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_local import ImageSize, Request, RequestError
from flux2_local.request import RANDOM_SEEDS, SIZES, STANDARD_ONLY, VARIANTS, make_request


def test_defaults_are_fals():
    r = make_request("standard", {"prompt": "a boat"})
    assert (r.guidance_scale, r.num_images, r.output_format, r.size) == (2.5, 1, "png", (1024, 768))
    assert (r.enable_prompt_expansion, r.sync_mode, r.enable_safety_checker) == (False, False, True)
    assert r.seed is None and r.num_inference_steps is None and r.acceleration is None


def test_sizes():
    assert SIZES["portrait_16_9"] == (576, 1024)
    assert make_request("flash", {"prompt": "x", "image_size": {"width": 513}}).size == (513, 512)
    assert make_request("flash", {"prompt": "x", "image_size": ImageSize(width=2048, height=700)}).size == (2048, 700)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "", "the prompt is empty"),
        ("prompt", "  \n ", "empty"),
        ("prompt", "\ud800", "unicode"),
        ("guidance_scale", 20.5, "from 0 to 20; 20.5"),
        ("guidance_scale", -0.1, "from 0 to 20; -0.1"),
        ("guidance_scale", math.nan, "finite"),
        ("num_inference_steps", 3, "from 4 to 50; 3"),
        ("num_inference_steps", 51, "from 4 to 50; 51"),
        ("num_images", 0, "from 1 to 4; 0"),
        ("num_images", 5, "from 1 to 4; 5"),
        ("seed", -1, "from 0 to 9223372036854775803; -1"),
        ("seed", 1.5, "seed"),
        ("image_size", "huge", "square_hd"),
        ("image_size", {"width": 511, "height": 512}, "512 to 2048 pixels; 511x512 is neither"),
        ("image_size", {"width": 512, "height": 2049}, "512 to 2048"),
        ("image_size", {"w": 512}, "512 to 2048"),
        ("acceleration", "fast", "'none', 'regular' or 'high'"),
        ("output_format", "gif", "'jpeg', 'png' or 'webp'"),
        ("images", tuple("x" * 11), "10"),
        ("steps", 4, "num_inference_steps"),
    ],
)
def test_bad_fields_say_what_is_allowed(field, value, words):
    with pytest.raises(RequestError) as caught:
        make_request("standard", {"prompt": "a boat", field: value})
    assert words in str(caught.value)
    assert caught.value.details and {"loc", "msg", "type"} <= set(caught.value.details[0])


@pytest.mark.parametrize("variant", ["turbo", "flash"])
@pytest.mark.parametrize(("field", "value"), [("num_inference_steps", 8), ("acceleration", "none")])
def test_turbo_and_flash_fix_steps_and_acceleration(variant, field, value):
    with pytest.raises(RequestError, match=f"{field}.*{variant}"):
        make_request(variant, {"prompt": "x", field: value})


def test_missing_prompt_is_named():
    with pytest.raises(RequestError, match="prompt is missing"):
        make_request("standard", {})


def test_random_seeds_stay_exact_in_javascript():
    seeds = {make_request("standard", {"prompt": "x"}).seeded().seed for _ in range(50)}
    assert len(seeds) == 50 and all(0 <= s < RANDOM_SEEDS for s in seeds)
    assert make_request("standard", {"prompt": "x", "seed": 5}).seeded().seed == 5


def test_a_request_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        make_request("standard", {"prompt": "x"}).prompt = "y"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=40),
    st.sampled_from(["none", "regular", "high", "png", "jpeg", "square", "landscape_16_9"]),
    st.dictionaries(st.sampled_from(["width", "height", "x"]), st.integers(-10, 5000), max_size=3),
    st.lists(st.text(max_size=5), max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    fields=st.dictionaries(st.sampled_from([*Request.model_fields, "nonsense"]), VALUES, max_size=6),
)
def test_any_input_is_a_request_or_a_typed_error(variant, fields):
    try:
        request = make_request(variant, fields)
    except RequestError as error:
        assert str(error) and error.details
        return
    assert request.prompt.strip()
    assert all(512 <= side <= 2048 for side in request.size)
    assert variant == "standard" or not any(getattr(request, name) for name in STANDARD_ONLY)
