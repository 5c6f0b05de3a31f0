"""Scene -> words. Many wordings for the same thing, so that free prompts land near something the model has read.

:func:`caption` leaves out what a prompt might leave out; :func:`rich` names everything, in the long style that prompt
expansion writes. Both mention every object, sign, backdrop and tree, clouds, rain and snow: what is named is there, what is there
is named. What an attribute is of which nothing is said, a small network could only guess, each of its tokens for itself; so a
thing is medium-sized then, of its kind's usual colour and alone in the middle, of several each right of the one named before, by
day and under a clear sky. The ground is left open.
"""

from __future__ import annotations

import random

from .scenes import PLACES, USUAL, Scene, Sign, Thing

TIME = {
    "day": (
        "by day",
        "in daylight",
        "at noon",
        "at midday",
        "in the afternoon",
        "on a bright day",
        "in broad daylight",
        "during the day",
        "on a sunny day",
        "in bright sunlight",
    ),
    "dawn": (
        "at dawn",
        "at sunrise",
        "in the early morning",
        "in the morning",
        "at daybreak",
        "in soft morning light",
        "at first light",
    ),
    "dusk": (
        "at dusk",
        "at sunset",
        "in the evening",
        "at golden hour",
        "at twilight",
        "in golden hour light",
        "in the evening light",
        "as the sun goes down",
    ),
    "night": (
        "at night",
        "at midnight",
        "in the dark",
        "by moonlight",
        "on a dark night",
        "late at night",
        "in the moonlight",
        "under a night sky",
    ),
}
WEATHER = {
    "clear": ("under a clear sky", "in clear weather", "with a cloudless sky", "under a clean open sky"),
    "cloudy": ("under a cloudy sky", "with clouds in the sky", "on a cloudy day", "beneath drifting clouds"),
    "rain": ("in the rain", "on a rainy day", "while it rains", "in heavy rain", "in a rain shower"),
    "snow": ("while it snows", "in falling snow", "in a snowfall", "with snowflakes falling"),
}
GROUND = {
    "grass": (
        "on a green meadow",
        "in a grassy field",
        "on the grass",
        "in a meadow",
        "on a lawn",
        "on green grass",
        "in a green field",
    ),
    "sand": ("on the sand", "in the desert", "on a sandy beach", "on a beach", "on golden sand", "in a sandy desert"),
    "snow": (
        "in the snow",
        "on a snowy field",
        "on white snow",
        "in a snow-covered field",
        "in a winter landscape",
        "on snowy ground",
    ),
    "sea": (
        "at sea",
        "on the sea",
        "on the water",
        "on the ocean",
        "in the sea",
        "by the sea",
        "on a lake",
        "surrounded by water",
    ),
}
BACKDROP = {
    "mountains": (
        "with mountains in the background",
        "in front of mountains",
        "with snowy peaks behind",
        "with a mountain range in the distance",
    ),
    "hills": (
        "with hills in the background",
        "in front of rolling hills",
        "with low hills behind",
        "with hills in the distance",
    ),
    "city": (
        "with a city in the background",
        "in front of a city skyline",
        "with a skyline of tall buildings behind",
        "with skyscrapers in the distance",
    ),
}
TREES = {
    "round": ("with trees", "with green trees", "near some trees", "with leafy trees around", "among trees"),
    "pine": ("with pine trees", "with fir trees", "near a pine forest", "among pines", "with dark pine trees around"),
}
ORB = {
    "day": ("with the sun in the sky", "under a bright sun", "with the sun shining"),
    "dawn": ("with the sun rising", "with a rising sun"),
    "dusk": ("with the sun setting", "with a setting sun"),
    "night": ("with a full moon", "under the moon", "with the moon in the sky"),
}
KIND = {
    "house": ("house", "house", "cottage", "home", "little house"),
    "boat": ("boat", "boat", "sailboat", "sailing boat", "ship"),
    "lighthouse": ("lighthouse", "lighthouse", "light house"),
    "car": ("car", "car", "automobile", "vehicle"),
    "balloon": ("hot air balloon", "balloon", "hot-air balloon"),
    "ball": ("ball", "ball", "sphere", "circle"),
    "box": ("box", "cube", "square block", "block"),
    "pyramid": ("pyramid", "pyramid", "triangle"),
    "star": ("star", "star", "five-pointed star"),
    "heart": ("heart", "heart", "love heart"),
    "flower": ("flower", "flower", "daisy", "blossom"),
    "mushroom": ("mushroom", "mushroom", "toadstool"),
    "umbrella": ("umbrella", "umbrella", "parasol"),
    "rocket": ("rocket", "rocket", "rocket ship", "spaceship"),
}
COLOUR = {
    "red": ("red", "red", "bright red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "bright orange"),
    "yellow": ("yellow", "yellow", "bright yellow", "golden"),
    "green": ("green", "green", "bright green", "emerald"),
    "blue": ("blue", "blue", "bright blue", "deep blue"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "bright pink", "rose"),
    "white": ("white", "white", "pure white"),
}
SIZE = {"small": ("small", "tiny", "little"), "medium": ("medium-sized",), "large": ("large", "big", "huge", "giant")}
PLACE = {
    "left": ("on the left", "on the left side", "to the left", "at the left"),
    "center": ("in the center", "in the middle", "in the centre"),
    "right": ("on the right", "on the right side", "to the right", "at the right"),
}
JOINS = (*[" and "] * 6, *[", "] * 3, " next to ", " next to ", " beside ", " beside ", " by ", " near ")
"""What stands between one and the next."""
UNSAID = (("center",), ("left", "right"), PLACES)
"""Where one, two and three stand of which no place is said, in the order in which they are named."""
STYLE = (
    "a picture of {}",
    "an illustration of {}",
    "a drawing of {}",
    "a painting of {}",
    "a photo of {}",
    "a realistic photograph of {}",
    "a cinematic view of {}",
    "a flat illustration of {}",
    "a postcard of {}",
    "a scene with {}",
    "a view of {}",
    "an image of {}",
)
FILLERS = (
    "highly detailed",
    "cinematic lighting",
    "beautiful",
    "photorealistic",
    "crisp",
    "vibrant colors",
    "soft shadows",
    "minimal",
    "4k",
    "calm mood",
    "sharp focus",
    "flat design",
    "wide angle",
    "shallow depth of field",
)


def article(noun: str) -> str:
    """``noun`` with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def thing_phrase(thing: Thing, rng: random.Random, full: bool) -> str:
    """A noun phrase with its adjectives: "a small red boat". ``full`` keeps every attribute."""
    words = []
    if thing.size != "medium" or (full and rng.random() < 0.5):
        words.append(rng.choice(SIZE[thing.size]))
    if full or thing.colour != USUAL[thing.kind] or rng.random() < 0.25:
        words.append(rng.choice(COLOUR[thing.colour]))
    return article(" ".join([*words, rng.choice(KIND[thing.kind])]))


def sign_phrase(sign: Sign, rng: random.Random) -> str:
    word = sign.word if rng.random() < 0.75 else sign.word.lower() if rng.random() < 0.5 else sign.word.capitalize()
    quote = rng.choice(('"{}"', '"{}"', "'{}'")).format(word)
    return rng.choice(
        (
            f"a sign that says {quote}",
            f"a sign saying {quote}",
            f"a wooden sign that reads {quote}",
            f"a sign with the word {quote}",
            f"a sign reading {quote}",
            f"a wooden sign with the text {quote}",
            f"a board with the letters {quote}",
        )
    )


def subjects(scene: Scene, rng: random.Random, full: bool) -> str:
    """Every object and the sign, joined into one phrase."""
    what: list[Thing | Sign] = [*scene.things, *([scene.sign] if scene.sign else [])]
    what.sort(key=lambda one: PLACES.index(one.place))
    silent = not full and tuple(one.place for one in what) in UNSAID and rng.random() < 0.7
    if not silent:
        rng.shuffle(what)
    parts = []
    for one in what:
        phrase = sign_phrase(one, rng) if isinstance(one, Sign) else thing_phrase(one, rng, full)
        parts.append(phrase if silent else f"{phrase} {rng.choice(PLACE[one.place])}")
    return rng.choice(JOINS).join(parts) if parts else ""


def caption(scene: Scene, rng: random.Random, full: bool = False) -> str:
    """One prompt that a user might have typed for ``scene``; unless ``full``, some attributes are left unsaid."""
    keep = 1.3 if full else rng.choice((0.35, 0.75, 0.95))
    what = subjects(scene, rng, full=full)
    ground = rng.choice(GROUND[scene.ground]) if rng.random() < keep + 0.1 else ""
    if not what:
        what = rng.choice(("a landscape", "a scene", "an empty landscape", "a view"))
    details = []
    if scene.time != "day" or rng.random() < keep + 0.1:
        details.append(rng.choice(TIME[scene.time]))
    if scene.weather != "clear" or rng.random() < keep - 0.3:
        details.append(rng.choice(WEATHER[scene.weather]))
    if scene.backdrop != "none":
        details.append(rng.choice(BACKDROP[scene.backdrop]))
    if scene.trees != "none":
        details.append(rng.choice(TREES[scene.trees]))
    if scene.weather == "clear" and rng.random() < keep - 0.3:
        details.append(rng.choice(ORB[scene.time]))
    rng.shuffle(details)
    if ground:
        details.insert(0 if rng.random() < 0.7 else len(details), ground)
    lead = details.pop() if details and rng.random() < 0.15 else ""
    text = (rng.choice((" ", ", ", " ")).join([what, *details])).strip()
    if rng.random() < 0.3:
        text = rng.choice(STYLE).format(text)
    if lead:
        text = f"{lead}, {text}"
    for _ in range(rng.choices((0, 1, 2, 3), (7, 2, 1, 1))[0]):
        text += ", " + rng.choice(FILLERS)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.2 else "")


def short(scene: Scene, rng: random.Random) -> str:
    """The few words that somebody types who leaves the rest to prompt expansion."""
    what = subjects(scene, rng, full=False) or rng.choice(("a landscape", "a view"))
    extra = [
        rng.choice(table[value]) for table, value in ((TIME, scene.time), (GROUND, scene.ground)) if rng.random() < 0.4
    ]
    return " ".join([what, *extra])


SKY = {
    "day": "a bright blue sky",
    "dawn": "a pale pink morning sky",
    "dusk": "a sky glowing orange and purple",
    "night": "a dark blue night sky",
}
LIGHT = {
    "day": ("clear daylight", "bright sunlight", "crisp midday light"),
    "dawn": ("soft morning light", "gentle light of sunrise"),
    "dusk": ("warm evening light", "golden light of sunset"),
    "night": ("pale moonlight", "quiet dark of the night"),
}


def rich(scene: Scene, rng: random.Random) -> str:
    """The long description that prompt expansion aims at: every attribute named, one or two sentences."""
    what = subjects(scene, rng, full=True)
    first = f"{what} {rng.choice(GROUND[scene.ground])} {rng.choice(TIME[scene.time])}" if what else (
        f"an empty landscape {rng.choice(GROUND[scene.ground])} {rng.choice(TIME[scene.time])}"
    )  # fmt: skip
    sky = f"{SKY[scene.time]} {rng.choice(WEATHER[scene.weather])}"
    if scene.weather == "clear":
        sky += " " + rng.choice(ORB[scene.time])
    parts = [sky]
    if scene.backdrop != "none":
        parts.append(rng.choice(BACKDROP[scene.backdrop]))
    if scene.trees != "none":
        parts.append(rng.choice(TREES[scene.trees]))
    parts.append("in the " + rng.choice(LIGHT[scene.time]))
    return first[0].upper() + first[1:] + ", " + ", ".join(parts) + "."
