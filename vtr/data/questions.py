"""The five question families of `shapes`, and the scenes they are asked about.

Each family has one answer space, so that the question alone says nothing about the answer. An asker lists what can be
asked about a scene; the benchmark and the training recipe choose from the lists.
"""

from collections import Counter
from dataclasses import dataclass

from vtr.types.errors import WrongValue

from .scenes import CANVAS, COLORS, SHAPES, SIGNS, SIZES, Dice, Item, Scene, Sign, arrange

PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
MOST_COUNTED = 4
MOST_TRIES = 10_000
LETTERS = "ABCDEFGHIJKLMNOPRSTUVWXYZ"
WORDS = (
    "bank bath beach bell bike bird boat book bread bus cafe cake camp card chip city club coal coat cook corn dance desk "
    "dock dog door drum duck exit farm ferry film fish flag flour food fruit fuel game gate gift glass gold guide hall "
    "harp hat hill honey horse hotel house ice bun jam jazz juice jump key king kite lake lamp lemon lift lime lion "
    "lunch mail maple map milk mint moon mouse nest oak oil lemur opera pizza pond pool port queen rain rice river road "
    "roof rose salt sand ship shop silk silver snow soap soup sun swim taxi tea tent tiger train tree van vest wax wind "
    "wolf wood yard zoo"
)
PRINTED = tuple(word for word in WORDS.upper().split() if set(word) <= set(LETTERS) and 3 <= len(word) <= 5)


@dataclass(frozen=True)
class Question:
    """A question about a scene and its only right answer."""

    family: str
    text: str
    answer: str


def is_there(name: str) -> str:
    """Returns the question whether something is in a picture: `is there an orange ring?`."""
    return f"is there {'an' if name[0] in 'aeiou' else 'a'} {name}?"


def named_in(question: str) -> list[str]:
    """Returns the items that a question names by color and shape, in the order of their names."""
    names = (f"{color} {shape}" for color in COLORS for shape in SHAPES)
    return [name for name in names if f"the {name} " in question.replace("?", " ")]


def existence(dice: Dice, scene: Scene) -> list[Question]:
    """Is there such a shape: all that are there, and absent ones whose color and whose shape both are there."""
    present = {(item.color, item.shape) for item in scene.items}
    absent = {(color, shape) for color, _ in present for _, shape in present} - present
    return [
        Question("existence", is_there(f"{color} {shape}"), answer)
        for answer, pairs in (("yes", present), ("no", absent))
        for color, shape in sorted(pairs)
    ]


def attributes_of(item: Item, items: tuple[Item, ...]) -> list[Question]:
    """Returns the questions about an item that only its size and its shape, or its size and its color, tell from all `items`."""
    found = []
    if sum((other.size, other.shape) == (item.size, item.shape) for other in items) == 1:
        found.append(Question("attribute", f"what color is the {item.size} {item.shape}?", item.color))
    if sum((other.size, other.color) == (item.size, item.color) for other in items) == 1:
        found.append(Question("attribute", f"what shape is the {item.size} {item.color} object?", item.shape))
    return found


def attribute(dice: Dice, scene: Scene) -> list[Question]:
    """Returns the color (or shape) of the only item with a shape (or color) and a size."""
    return [question for item in scene.items for question in attributes_of(item, scene.items)]


def counting(dice: Dice, scene: Scene) -> list[Question]:
    """Returns how many items have a shape or a color, from 1 to 4."""
    shapes = Counter(item.shape for item in scene.items)
    colors = Counter(item.color for item in scene.items)
    found = [Question("counting", f"how many {PLURALS[shape]} are there?", str(n)) for shape, n in sorted(shapes.items())]
    found += [Question("counting", f"how many {color} objects are there?", str(n)) for color, n in sorted(colors.items())]
    return [question for question in found if int(question.answer) <= MOST_COUNTED]


def _unique(scene: Scene) -> list[Item]:
    names = Counter((item.color, item.shape) for item in scene.items)
    return [item for item in scene.items if names[item.color, item.shape] == 1]


def direction(a: tuple[int, int], b: tuple[int, int]) -> str | None:
    """Returns where the point `a` is, seen from `b`; None where two answers could be defended (neither axis is twice the other)."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) >= 2 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 2 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def spots(scene: Scene) -> dict[str, tuple[int, int]]:
    """Returns the middle of everything with a name of its own: items that are the only ones of their color and shape, and the sign."""
    named = {f"{item.color} {item.shape}": (item.x, item.y) for item in _unique(scene)}
    for sign in scene.signs:
        named["sign"] = (sign.left + sign.width // 2, sign.top + sign.height // 2)
    return named


def relation(dice: Dice, scene: Scene) -> list[Question]:
    """Asks where an item is, seen from the sign or from another item, as many of either."""
    named = spots(scene)
    found = [
        Question("relation", f"where is the {a} seen from the {b}?", direction(named[a], named[b]) or "")
        for a in named
        for b in named
        if a not in ("sign", b) and direction(named[a], named[b])
    ]
    from_sign = [question for question in found if question.text.endswith("sign?")]
    from_items = [question for question in found if not question.text.endswith("sign?")]
    return from_sign + dice.shuffled(from_items)[: max(1, len(from_sign))]


def text(dice: Dice, scene: Scene) -> list[Question]:
    """Returns what the sign says; answers are in lower case."""
    return [Question("text", "what does the sign say?", sign.text.lower()) for sign in scene.signs]


def locate(scene: Scene, left: int = 0, top: int = 0) -> list[Question]:
    """Returns in which ninth of a full picture an item is, the scene's corner being at (left, top); a training aid outside the benchmark."""
    rows, cols = ("top", "middle", "bottom"), ("left", "center", "right")
    return [
        Question(
            "locate",
            f"which part holds the {item.color} {item.shape}?",
            f"{rows[(item.y + top) * 3 // CANVAS]} {cols[(item.x + left) * 3 // CANVAS]}",
        )
        for item in _unique(scene)
    ]


ASKERS = {"existence": existence, "attribute": attribute, "counting": counting, "relation": relation, "text": text}


def print_text(dice: Dice, free: bool) -> str:
    """Returns what a sign says: a number of two to four digits or a word; with `free`, half of the words are random letters."""
    if dice.below(2):
        return str(dice.between(10, 99) if dice.below(3) == 0 else dice.between(100, 9999))
    if free and dice.below(2):
        return "".join(dice.pick(LETTERS) for _ in range(dice.between(3, 5)))
    return dice.pick(PRINTED)


def compose(dice: Dice, size: int = CANVAS, free: bool = False, more_signs: int = 0) -> Scene:
    """Returns a random scene with one shape or color that occurs one to four times.

    Args:
        dice: randomness.
        size: side of the canvas; a full one has 4 to 8 items, a smaller one fewer.
        free: print random letters as well as words (training).
        more_signs: so many signs beside the one that every scene has (training).

    Returns:
        A scene in which every object found a place.

    Raises:
        ValueError: the canvas is too small for what a scene must have.
    """
    count = dice.between(4, 8) if size >= CANVAS else dice.between(2, 4) - (more_signs > 0)
    signs = [dice.pick(tuple(SIGNS)) for _ in range(1 + more_signs)]
    for _ in range(MOST_TRIES):
        plates = [Sign(print_text(dice, free), color) for color in signs]
        repeated = min(dice.between(1, MOST_COUNTED), count)
        shared = dice.pick((*SHAPES, *COLORS)) if dice.below(2) else dice.pick(SHAPES if dice.below(2) else tuple(COLORS))
        wanted = []
        for n in range(count):
            options = [(s, c) for s in SHAPES for c in COLORS if (shared in (s, c)) == (n < repeated)]
            wanted.append((*dice.pick(options), dice.pick(tuple(SIZES))))
        scene = arrange(dice, size, sorted(wanted, key=lambda kind: kind[2]), plates)  # large ones first
        if scene:
            return scene
    raise WrongValue(f"compose: size must leave room for a sign and {count} items, got {size} pixels; use {CANVAS // 2} or more")
