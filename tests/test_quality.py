"""The bundled model draws what it is asked for: the small form of ``benchmarks/quality.py``."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import judge, quality
from flux2_local.bench import environment
from scripts.train_tiny import latents
from scripts.train_tiny.render import TOKEN, render
from scripts.train_tiny.scenes import CLASSES, HELD_OUT_WORDS, PLACES, WORDS, Thing


def test_the_autoencoder_keeps_what_it_is_given():
    assert quality.autoencoder_psnr(4, "tiny") > 30


@pytest.mark.parametrize("variant", ["turbo", "flash"])
def test_pictures_follow_their_prompts(variant):
    """Twelve held-out prompts, three of them with a sign; guessing gets a quarter of times and grounds right, an eighth of colours, a
    fourteenth of objects and a letter in twenty-six."""
    scenes = judge.held_out_scenes(12)
    made = quality.generate(
        quality.Contender(variant, "regular"), quality.prompts(scenes), (512, 512), range(12), "tiny"
    )
    score = judge.score(judge.load(), scenes, list(made))
    assert min(score[name] for name in ("time", "ground", "place", "colour", "object")) >= 75, score
    assert score["letters"] >= 60, score


def test_one_object_is_told_from_two_and_its_usual_colour_from_others():
    reader, lone = judge.load(), judge.lone_scenes(12)
    two = [s for s in judge.held_out_scenes(60) if len(s.things) == 2][:12]
    odd = [replace(s, things=(replace(s.things[0], colour="green"),)) for s in lone]
    right, twice, green = (
        judge.lone_score(reader, asked, [render(s, 512, 512) for s in shown])
        for asked, shown in ((lone, lone), (two, two), (lone, odd))
    )
    assert min(right.values()) >= 90 and twice["once"] <= 10 and green["unsaid"] <= 10 < green["once"]
    ball = replace(lone[0], ground="sand", time="night", things=(Thing("ball", "orange", "medium", "center"),))
    assert quality.lone_prompts([ball]) == ["a ball on the sand at night"]


def test_what_is_asked_for_was_never_shown_in_training():
    asked = judge.held_out_scenes(200)
    drawn = [latents.SERIES["others"].picture(row)[0] for row in range(50)]
    learnt = judge.learnt()
    assert all(replace(scene, seed=0) in learnt for scene in drawn)
    assert not {replace(scene, seed=0) for scene in asked} & learnt
    words = {scene.sign.word for scene in asked if scene.sign}
    assert not words & set(WORDS) and len(words & set(HELD_OUT_WORDS)) > 10


def test_what_nobody_asked_for_and_what_is_missing_are_wrong():
    ball = Thing("ball", "red", "small", "left")
    scene = next(replace(s, things=(ball,), sign=None) for s in judge.held_out_scenes(1))
    whole = {name: getattr(scene, name) for name in CLASSES}

    def wrong(**kinds):
        kind = {place: kinds.get(place, "none") for place in PLACES}
        reading = judge.Reading(whole, kind, dict.fromkeys(PLACES, "red"), dict.fromkeys(PLACES, "small"))
        return {name for name, right in reading.verdicts(scene) if not right}

    assert wrong(left="ball") == set()
    assert wrong(right="ball") == {"place"}
    assert wrong(left="ball", center="ball") == {"alone"}
    assert wrong() == {"place", "object", "colour", "size"}


def test_the_table_has_a_row_per_score():
    scores = [quality.Score("a", {"time": 90.0}), quality.Score("b", {"time": 80.0}, 30.0, 0.9)]
    assert quality.table(scores).splitlines()[2:] == ["| a |  |  | 90 |", "| b | 30.0 | 0.9000 | 80 |"]


def test_the_judge_is_told_a_pictures_sides_as_it_learnt_them():
    sides = [judge.draw(seed)[1] for seed in range(6)]
    assert any(across != down for across, down in sides)
    told = judge.to_input([Image.new("RGB", (across * TOKEN, down * TOKEN)) for across, down in sides])
    assert told.equal(judge.with_sides(told[:, :3], torch.tensor(sides)))
    assert told.flatten(2)[:, 3:].amin(-1).tolist() == [[across / 16 - 1.5, down / 16 - 1.5] for across, down in sides]


def test_other_sizes_are_shown_before_their_ceiling():
    rows = list(quality.measure_sizes([(640, 512)], 3, "tiny"))
    assert (rows[0].width, rows[0].height) == (640, 512) and rows[0].adherence.keys() == rows[0].ceiling.keys()
    shown = quality.AtSize(512, 256, {"time": 99.6, "size": 90.0}, {"time": 97.2, "size": 80.0})
    assert quality.size_table([shown]).splitlines()[::2] == ["|  | time | size |", "| 512×256 | 97 of 100 | 80 of 90 |"]


def test_the_model_card_has_its_results_figures():
    shown = quality.CARD.read_text("utf-8").split(quality.BEGIN)[1].split(quality.END)[0]
    name = re.findall(r"`(quality-[^`]+\.json)`", shown)[0]
    assert shown == quality.card_table(environment.RESULTS / name)
