"""Scenes of one to three emoji on a coloured ground: what is in them, captions, questions and answers.

A scene is held out, and never trained on, if it shows one of certain things on one of certain grounds: an
eighth of all pairs, chosen by their names.
"""

import random
import zlib
from dataclasses import dataclass, replace

GROUNDS = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "blue": (70, 120, 220),
    "green": (60, 160, 80),
    "yellow": (245, 215, 80),
    "pink": (245, 165, 195),
    "brown": (140, 95, 60),
    "black": (25, 25, 25),
}
# noun -> colour ("" where it has but one) -> name in the icon sets
ICONS: dict[str, dict[str, str]] = {
    "heart": {c: f"{c}-heart" for c in ("red", "orange", "yellow", "green", "blue", "purple")},
    "circle": {c: f"{c}-circle" for c in ("red", "orange", "yellow", "green", "purple")},
    "square": {c: f"{c}-square" for c in ("red", "orange", "yellow", "green", "blue", "purple")},
    "book": {"red": "closed-book", "green": "green-book", "blue": "blue-book", "orange": "orange-book"},
    "apple": {"red": "red-apple", "green": "green-apple"},
    "dog": {"": "dog-face"},
    "cat": {"": "cat-face"},
    "rabbit": {"": "rabbit-face"},
    "frog": {"": "frog"},
    "pig": {"": "pig-face"},
    "lion": {"": "lion"},
    "fox": {"": "fox"},
    "duck": {"": "duck"},
    "fish": {"": "tropical-fish"},
    "turtle": {"": "turtle"},
    "car": {"": "automobile"},
    "bus": {"": "bus"},
    "rocket": {"": "rocket"},
    "house": {"": "house"},
    "tree": {"": "deciduous-tree"},
    "star": {"": "star"},
    "banana": {"": "banana"},
    "strawberry": {"": "strawberry"},
    "mushroom": {"": "mushroom"},
    "balloon": {"": "balloon"},
    "key": {"": "key"},
}
PLURALS = {"fox": "foxes", "fish": "fish", "bus": "buses", "strawberry": "strawberries"}
NUMBERS = ("no", "one", "two", "three")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("object", "count", "colour", "position")
_HELD_OUT = 8


@dataclass(frozen=True)
class Group:
    """So many things of one kind, side by side."""

    noun: str
    colour: str
    count: int

    def words(self) -> str:
        """As in "two red apples"."""
        first = "a" if self.count == 1 else NUMBERS[self.count]
        name = self.noun if self.count == 1 else PLURALS.get(self.noun, f"{self.noun}s")
        words = f"{first} {self.colour} {name}" if self.colour else f"{first} {name}"
        return words.replace("a orange", "an orange", 1) if self.count == 1 else words


@dataclass(frozen=True)
class Scene:
    """One or two groups on a ground; the first stands `relation` the second."""

    groups: tuple[Group, ...]
    relation: str
    ground: str

    def turned(self) -> "Scene":
        """The same scene, the other group named first."""
        return replace(self, groups=self.groups[::-1], relation=OPPOSITE.get(self.relation, ""))

    def canonical(self) -> "Scene":
        """Of the two ways to say it, that with the left or upper group first."""
        return self if self.relation in ("", "left of", "above") else self.turned()

    def caption(self) -> str:
        """As in "two red apples left of a dog on blue"."""
        return f"{f' {self.relation} '.join(group.words() for group in self.groups)} on {self.ground}"

    def is_held_out(self) -> bool:
        """Whether it may not be trained on."""
        pairs = (f"{g.colour} {g.noun} on {self.ground}" for g in self.groups)
        return any(zlib.crc32(pair.encode()) % _HELD_OUT == 0 for pair in pairs)


def scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene to train on, or one that is held out."""
    while True:
        first, second = rng.sample(list(ICONS), 2)
        sizes = rng.choice(((1,), (2,), (3,), (1, 1), (1, 1), (2, 1), (1, 2)))
        groups = tuple(
            Group(noun, rng.choice(list(ICONS[noun])), count)
            for noun, count in zip((first, second), sizes, strict=False)
        )
        relation = rng.choice(list(OPPOSITE)) if len(groups) == 2 else ""
        made = Scene(groups, relation, rng.choice(list(GROUNDS)))
        if made.is_held_out() == held_out:
            return made


def questions(shown: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """Kind, question and answer: one of each kind that the scene allows."""
    group, *others = rng.sample(shown.groups, len(shown.groups))
    plural = PLURALS.get(group.noun, f"{group.noun}s")
    verb = "is" if group.count == 1 else "are"
    name = group.noun if group.count == 1 else plural
    found = [("count", f"how many {plural} are there?", NUMBERS[group.count])]
    if not others:
        found.append(("object", "what is in the picture?", group.noun))
    else:
        relation = shown.relation if group == shown.groups[0] else OPPOSITE[shown.relation]
        other = others[0].noun if others[0].count == 1 else PLURALS.get(others[0].noun, f"{others[0].noun}s")
        found.append(("object", f"what is {relation} the {other}?", group.noun))
        found.append(("position", f"where {verb} the {name}?", f"{relation} the {other}"))
    if group.colour and rng.random() < 0.5:
        found.append(("colour", f"what colour {verb} the {name}?", group.colour))
    else:
        found.append(("colour", "what colour is the ground?", shown.ground))
    return found
