"""Arguments as fal's clients send them, read once."""

import json

from PIL import Image

from flux2_local.endpoints import find_endpoint, make_call

STANDARD, EDIT = "fal-ai/flux-2", "fal-ai/flux-2/edit"


def test_a_call_gives_the_values_that_were_validated():
    asked = {"prompt": "a boat", "sync_mode": "false", "enable_safety_checker": "0", "seed": "7", "acceleration": None}
    request, _ = make_call(find_endpoint(STANDARD), {**asked, "image_size": {"width": "640"}, "nonsense": 1})
    fields = request.model_dump(exclude_unset=True)
    assert fields["sync_mode"] is False and fields["enable_safety_checker"] is False and fields["seed"] == 7
    assert json.loads(json.dumps(fields)) == fields and fields["image_size"] == {"width": 640}
    assert set(fields) == {"prompt", "sync_mode", "enable_safety_checker", "seed", "image_size"}, "what was asked for"


def test_pictures_are_passed_on_as_they_are():
    picture = Image.new("RGB", (64, 64))
    request, _ = make_call(find_endpoint(EDIT), {"prompt": "a boat", "image_urls": [picture, "data:,x"]})
    assert request.images[0] is picture and request.images[1] == "data:,x"
