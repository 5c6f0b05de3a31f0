"""Where a budget is given, torch is held to it while the pipeline works; on a card that is made up."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from flux2_local import Flux2, ceiling, pipeline
from flux2_local.candidates import SYSTEM_RESERVE
from flux2_local.ceiling import Ceiling
from flux2_local.hardware import probe

TOTAL = 24 * 2**30
FIELDS = {
    "image_size": {"width": 1024, "height": 1024},
    "seed": 3,
    "num_inference_steps": 4,
    "enable_safety_checker": False,
}


class Card:
    """What torch.cuda is asked. ``taken``: bytes of tensors; ``fraction``: the limit; ``set``: all that it was set to, in GiB."""

    def __init__(self, monkeypatch):
        self.taken, self.fraction, self.set = 0, 1.0, []
        properties = SimpleNamespace(total_memory=TOTAL)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.taken)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: self.fraction)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.hold)

    def hold(self, fraction, device):
        assert device == "cuda:0" and 0 <= fraction <= 1
        self.fraction = fraction
        self.set.append(round(fraction * TOTAL / 2**30, 3))


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(ceiling, "_CARDS", {})
    return Card(monkeypatch)


def of(room, device="cuda:0"):
    hardware = SimpleNamespace(kind=device.split(":")[0], described=False, device=device)
    return Ceiling(hardware, None if room is None else room * 2**30)


def test_the_limit_is_the_room_inside_and_what_it_was_outside(card):
    card.fraction = 0.75
    with suppress(KeyError), of(12)():
        assert card.fraction == 0.5
        raise KeyError
    assert card.fraction == 0.75
    with of(20)():
        assert card.fraction == 0.75, "what the program itself is held to is not loosened"


def test_other_pipelines_tensors_are_not_counted(card):
    first, second = of(8), of(6)
    for number, one in enumerate((first, second)):
        with one():
            card.taken += (4 + number) * 2**30  # its weights
    assert (first.own, second.own) == (4 * 2**30, 5 * 2**30)
    card.set.clear()
    with first():
        card.taken += 2**30
        card.taken -= 2**30
    with second():
        pass
    assert card.set == [13, 24, 10, 24]


def test_what_a_failed_use_leaves_on_the_card_counts(card):
    """Not what its traceback still holds, which is gone when the next one begins."""
    first, second = of(12), of(8)
    with first():
        card.taken += 4 * 2**30
    with suppress(KeyError), first():
        card.taken += (5 + 2) * 2**30  # other weights, and what it was working on
        raise KeyError
    card.taken -= 2 * 2**30
    card.set.clear()
    with second():
        card.taken += 2**30
    with first():
        pass
    assert (first.own, second.own) == (9 * 2**30, 2**30) and card.set == [17, 24, 13, 24]


def test_pipelines_at_work_at_once_have_their_rooms_together(card):
    with of(8)():
        with of(6)():
            assert card.set == [8, 14]
            with of(None)():
                assert card.fraction == 1, "one without a budget may take what there is"
            assert card.set[-1] == 14
        assert card.set[-1] == 8
    assert card.fraction == 1


def test_without_a_budget_or_a_card_nothing_is_set(card):
    with of(None)(), of(8, "cpu")():
        pass
    assert not card.set and Ceiling(probe("cpu"), 2**30).device is None


def test_loading_and_generating_go_under_it_and_a_second_attempt_too(dev_folder, monkeypatch, card):
    """The user's budget stays the limit where plans must do with less."""
    rooms, inside, work, build = [], [], pipeline.paint, Flux2._build

    class Watched(Ceiling):
        def __init__(self, hardware, room):
            rooms.append(room)
            super().__init__(hardware, room)
            self.device = "cuda:0"

    def crowded(runs):
        inside.append(card.fraction * TOTAL)
        work(runs)
        if len(inside) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "Ceiling", Watched)
    monkeypatch.setattr(pipeline, "paint", crowded)
    monkeypatch.setattr(
        Flux2, "_build", lambda self, plan: (inside.append(card.fraction * TOTAL), build(self, plan))[1]
    )
    flux = Flux2.load(dev_folder, vram="4GiB")
    result = flux.generate("a boat", **FIELDS)
    expected = 4 * 2**30 - SYSTEM_RESERVE["cpu"]
    assert rooms == [expected] and any("ran out" in note for note in result.notes)
    assert set(inside) == {expected} and len(inside) >= 3 and card.fraction == 1
