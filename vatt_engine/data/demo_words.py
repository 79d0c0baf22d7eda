"""The demo world's captions: a few sentences per clip, most about it, some about something else or nothing."""

from __future__ import annotations

from random import Random

from .demo_scene import Combination

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "star": ("star", "starfish"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop", "donut"),
    "moon": ("moon", "crescent"),
    "heart": ("heart", "valentine"),
}
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise", "teal"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "any": ("bright",),
}
MOTION_WORDS = {
    "still": ("stays still", "rests without moving", "does not move"),
    "slide": ("slides left and right", "glides from side to side", "slides sideways"),
    "bounce": ("bounces up and down", "hops up and down", "keeps bouncing"),
    "circle": ("circles around", "goes round and round", "orbits the middle"),
    "pulse": ("grows and shrinks", "pulses in size", "swells and shrinks"),
    "blink": ("blinks on and off", "flashes on and off", "keeps blinking"),
    "rock": ("rocks to and fro", "tilts back and forth", "keeps rocking"),
    "dart": ("darts corner to corner", "moves diagonally", "zips along the diagonal"),
}
SCENE_WORDS = {
    "night": ("the night", "a starry sky", "darkness"),
    "grass": ("grass", "a lawn", "a meadow"),
    "water": ("water", "the sea", "a lake"),
    "bricks": ("bricks", "a brick wall", "a stone wall"),
    "any": ("a backdrop",),
}
PITCH_WORDS = {
    "red": "deepest",
    "orange": "deep",
    "yellow": "low",
    "green": "medium",
    "cyan": "raised",
    "blue": "high",
    "purple": "shrill",
    "pink": "highest",
    "any": "plain",
}
TIMBRE_WORDS = {
    "circle": "pure tone",
    "square": "hollow clarinet",
    "triangle": "octave organ",
    "star": "metal bell",
    "cross": "buzzing trumpet",
    "ring": "wobbling siren",
    "moon": "breathy flute",
    "heart": "warm chord",
}
RHYTHM_WORDS = {
    "still": "held without a break",
    "slide": "plucked once each beat",
    "bounce": "plucked twice each beat",
    "circle": "trembling smoothly",
    "pulse": "swelling again and again",
    "blink": "knocking in pairs",
    "rock": "rattling fast",
    "dart": "galloping long short",
}

FULL = (
    "a {colour} {shape} {motion} over {scene}",
    "over {scene} a {colour} {shape} {motion}",
    "the {shape} is {colour} and {motion} by {scene}",
    "here a {colour} {shape} {motion} before {scene}",
    "by {scene} the {colour} {shape} {motion}",
)
PARTIAL = (
    "now the {colour} {shape} {motion}",
    "look at this {colour} {shape} okay",
    "see how the {shape} {motion}",
    "something {colour} {motion} over {scene}",
    "it {motion} just like that",
    "there is a {shape} by {scene}",
)
HEARD = (
    "you hear a {pitch} {timbre} {rhythm}",
    "the sound is a {pitch} {timbre} {rhythm}",
    "listen to the {pitch} {timbre}",
    "a {timbre} {rhythm} with the {colour} {shape}",
)
FILLER = (
    "thanks for watching and see you next time",
    "so let us go on with the next one",
    "okay um this is what i wanted to show",
    "please subscribe to the channel for more",
    "i had a long day and it rains outside",
    "wait a moment while i set up the camera",
)
OPENINGS = ("so", "okay", "well now", "and here", "um")


def describe(template: str, combination: Combination, rng: Random) -> str:
    """One sentence about a combination; the first word of each list is drawn as often as all the others."""

    def word(choices: tuple[str, ...]) -> str:
        return choices[0] if rng.random() < 0.5 else rng.choice(choices)

    shape, colour, motion, scene = combination
    return template.format(
        shape=word(SHAPE_WORDS[shape]),
        colour=word(COLOUR_WORDS[colour]),
        motion=word(MOTION_WORDS[motion]),
        scene=word(SCENE_WORDS[scene]),
        pitch=PITCH_WORDS[colour],
        timbre=TIMBRE_WORDS[shape],
        rhythm=RHYTHM_WORDS[motion],
    )


def write_captions(combination: Combination, other: Combination, seconds: float, rng: Random) -> list[dict]:
    """Writes seven captions with their times: rows {"text", "start", "end"} of at most 16 words.

    The first says all that is seen. Then, in any order: another full one, two partial ones, one about the sound, one
    about nothing, and one about nothing or about `other`, a combination that this clip does not show.
    """
    about = [describe(rng.choice(FULL), combination, rng)]
    about += [describe(rng.choice(PARTIAL), combination, rng) for _ in range(2)]
    about += [describe(rng.choice(HEARD), combination, rng), rng.choice(FILLER)]
    about.append(describe(rng.choice(PARTIAL), other, rng) if rng.random() < 0.4 else rng.choice(FILLER))
    rng.shuffle(about)
    about.insert(0, describe(rng.choice(FULL), combination, rng))
    about[1:] = [f"{rng.choice(OPENINGS)} {text}" if rng.random() < 0.3 else text for text in about[1:]]

    step = seconds / len(about)
    rows = []
    for i, text in enumerate(about):
        start = round(step * (i + rng.uniform(0, 0.3)), 3)
        rows.append({"text": text, "start": start, "end": round(min(start + rng.uniform(0.8, 1.4) * step, seconds), 3)})
    return rows
