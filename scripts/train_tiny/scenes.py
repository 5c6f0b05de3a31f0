"""What a training picture shows: the vocabulary of scenes, and how they are drawn at random.

A :class:`Scene` is a plain value. :mod:`render` turns it into pixels, :mod:`captions` into words, and the judge of
``benchmarks/quality.py`` reads it back from a picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TIMES = ("day", "dawn", "dusk", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow")
GROUNDS = ("grass", "sand", "snow", "sea")
BACKDROPS = ("none", "mountains", "hills", "city")
TREES = ("none", "round", "pine")
USUAL = {
    "house": "yellow",
    "boat": "red",
    "lighthouse": "red",
    "car": "blue",
    "balloon": "orange",
    "ball": "orange",
    "box": "purple",
    "pyramid": "yellow",
    "star": "yellow",
    "heart": "red",
    "flower": "pink",
    "mushroom": "red",
    "umbrella": "blue",
    "rocket": "red",
}
"""Kinds of thing, and the colour of one whose colour is not said."""
KINDS = tuple(USUAL)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "medium", "large")
PLACES = ("left", "center", "right")

# Words of the sign that training sees often; the rest of its signs are random letters, so that spelling is learnt
# letter by letter. `HELD_OUT_WORDS` never appear in training.
WORDS = (
    "HELLO",
    "OPEN",
    "CAFE",
    "STOP",
    "ZOO",
    "HOME",
    "SHOP",
    "BAR",
    "PARK",
    "EXIT",
    "TAXI",
    "LOVE",
    "SALE",
    "CAT",
    "DOG",
    "FISH",
    "MILK",
    "TEA",
    "SUN",
    "MOON",
    "STAR",
    "ROAD",
    "FARM",
    "BEACH",
    "HOTEL",
    "PIZZA",
    "BOOKS",
    "MUSIC",
    "WORLD",
    "PEACE",
    "HAPPY",
    "SMILE",
    "WELCOME",
    "NORTH",
    "SOUTH",
    "EAST",
    "WEST",
    "ART",
    "FLUX",
    "TINY",
    "DREAM",
    "LIGHT",
    "NIGHT",
    "OCEAN",
    "RIVER",
    "APPLE",
    "LEMON",
    "BREAD",
    "CAKE",
    "GOLD",
    "KING",
    "QUEEN",
    "ROBOT",
    "SPACE",
    "TRAIN",
    "YES",
    "NO",
    "GO",
    "UP",
    "OK",
    "HI",
    "WOW",
    "JAZZ",
    "KIWI",
    "QUIZ",
    "VIEW",
    "EXTRA",
    "BOX",
    "JOY",
    "ZERO",
    "ONE",
    "TWO",
    "FIVE",
    "NINE",
    "LUCK",
    "MAGIC",
    "PAUSE",
    "PLAY",
    "HELP",
    "SAFE",
    "SLOW",
    "FAST",
    "LEFT",
    "RIGHT",
    "TURN",
    "COLD",
    "HOT",
    "SNOW",
    "RAIN",
    "WIND",
    "FIRE",
    "ICE",
    "SEA",
    "LAKE",
    "HILL",
    "TREE",
    "BIRD",
    "BEAR",
    "WOLF",
    "LION",
    "FOX",
    "DUCK",
    "COW",
    "PIG",
    "ANT",
    "BEE",
)
HELD_OUT_WORDS = (
    "BOAT",
    "TOWN",
    "SOUP",
    "ROSE",
    "PIANO",
    "TIGER",
    "HOUSE",
    "MOUSE",
    "CLOUD",
    "STORM",
    "GREEN",
    "BLUE",
    "FROG",
    "GOAT",
    "LAMP",
    "DESK",
    "CHAIR",
    "PLANT",
    "WATER",
    "EARTH",
    "BANK",
    "CLUB",
    "POST",
    "MENU",
    "RICE",
    "CORN",
    "JAM",
    "EGG",
    "PIE",
    "NUT",
    "OWL",
    "BAT",
    "HEN",
    "EEL",
    "ELM",
    "OAK",
    "SKY",
    "DAY",
    "MAY",
    "DEW",
)


@dataclass(frozen=True)
class Thing:
    """One object: what it is, its colour, size and horizontal place."""

    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Sign:
    """A wooden sign with one short word."""

    word: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows. ``seed`` fixes what no word names: where stars, trees, waves and patches of the ground are.
    A clear sky has the sun or the moon, any other one clouds."""

    time: str
    weather: str
    ground: str
    backdrop: str
    trees: str
    things: tuple[Thing, ...]
    sign: Sign | None
    seed: int


def random_word(rng: random.Random) -> str:
    """A sign's text: half known words, half random strings of two to six letters."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    length = rng.choice((2, 3, 3, 4, 4, 5, 5, 6))
    while True:
        word = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(length))
        if word not in HELD_OUT_WORDS:
            return word


def random_thing(rng: random.Random, place: str, ground: str, crowded: bool) -> Thing:
    kind = rng.choice(KINDS)
    if kind == "boat" and ground != "sea" and rng.random() < 0.8:
        kind = rng.choice([k for k in KINDS if k != "boat"])
    elif ground == "sea" and rng.random() < 0.25:
        kind = "boat"
    size = rng.choice(("small", "medium") if crowded else ("small", "medium", "medium", "large"))
    colour = USUAL[kind] if rng.random() < 0.25 else rng.choice(COLOURS)
    return Thing(kind, colour, size, place)


def random_scene(rng: random.Random, signs: float = 0.3) -> Scene:
    """Draw a scene. ``signs`` is the share of scenes with a sign."""
    ground = rng.choice(GROUNDS)
    places = list(PLACES)
    sign = None
    if rng.random() < signs:
        sign = Sign(random_word(rng), rng.choice(places))
        places.remove(sign.place)
    count = rng.choices((0, 1, 2), (1, 6, 3))[0]
    chosen = rng.choices(PLACES, (1, 2, 1)) if count == 1 and sign is None else rng.sample(places, count)
    things = tuple(random_thing(rng, place, ground, count + (sign is not None) > 1) for place in chosen)
    return Scene(
        time=rng.choice(TIMES),
        weather=rng.choices(WEATHERS, (4, 3, 2, 2))[0],
        ground=ground,
        backdrop=rng.choices(BACKDROPS, (4, 3, 2, 2))[0],
        trees="none" if ground == "sea" else rng.choices(TREES, (5, 3, 2))[0],
        things=things,
        sign=sign,
        seed=rng.getrandbits(32),
    )


CLASSES: dict[str, tuple[str, ...]] = {
    "time": TIMES,
    "weather": WEATHERS,
    "ground": GROUNDS,
    "backdrop": BACKDROPS,
    "trees": TREES,
}
"""Attributes of a whole scene."""

SLOT: dict[str, tuple[str, ...]] = {
    "kind": ("none", *KINDS),
    "colour": ("none", *COLOURS),
    "size": ("none", *SIZES),
}
"""Attributes of what stands at each of :data:`PLACES`, "none" where nothing does."""

QUESTIONS = [(name, None) for name in CLASSES] + [(name, place) for place in PLACES for name in SLOT]
"""Everything that can be asked of a scene: an attribute, and the place or None for the whole."""


def classes(name: str) -> tuple[str, ...]:
    """The possible answers to a question about attribute ``name``."""
    return CLASSES.get(name) or SLOT[name]


def answers(scene: Scene) -> list[int]:
    """The class of every question's answer."""
    there = {thing.place: thing for thing in scene.things}
    said = [getattr(scene, n) if p is None else getattr(there.get(p), n, "none") for n, p in QUESTIONS]
    return [classes(name).index(value) for (name, _), value in zip(QUESTIONS, said, strict=True)]
