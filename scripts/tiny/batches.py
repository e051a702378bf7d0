"""Training batches: scenes drawn on the fly, labels for every patch, several questions per image in one sequence."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from vtr.data.glyphs import ALPHABET
from vtr.data.questions import ASKERS, MOST_COUNTED, Question, compose, locate, spots
from vtr.data.scenes import CANVAS, COLORS, PITCH, SHAPES, SIGNS, SIZES, Dice, Scene, draw, mask
from vtr.data.shapes import STREAMS

from .model import CONTEXT, GRID, HEADS, LONGEST, PRESENT
from .tokenizer import PATCH, VISION_END, VISION_START

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # CLIP's, as the processor has them
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
ASKED = {"existence": 2, "attribute": 2, "counting": 3, "relation": 5, "text": 1, "locate": 1}  # at most so many per image
ASKED_OF_WINDOWS = ASKED | {"relation": 1, "locate": 2}  # places first, then their relation
FAMILIES = tuple(ASKED)
IGNORED = -100


@dataclass(frozen=True)
class View:
    """The part of a scene that is shown: its corner and side in scene pixels, and scene pixels per model pixel (1 or 2)."""

    left: int
    top: int
    side: int
    zoom: int


def patch_labels(scene: Scene, view: View) -> dict[str, np.ndarray]:
    """Returns what every patch of a view shows.

    Returns:
        `kind`, `color`, `char`, `index`, `center` int64, `word` and `alike` int64 with a last axis (see `CONTEXT`), `place` float32 with a
        last axis of 2 (centre of the object in scene widths from the middle), all `(patches, ...)`; class 0 is nothing, -100 undecided.
        `present` `(PRESENT,)` float32.
    """
    cell = PATCH * view.zoom
    cells = view.side // cell
    labels = {name: np.zeros((cells, cells), dtype=np.int64) for name in HEADS}
    labels |= {name: np.full((cells, cells, count), IGNORED) for name, (count, _) in CONTEXT.items()}
    labels["place"] = np.zeros((cells, cells, 2), dtype=np.float32)
    present = np.zeros(PRESENT, dtype=np.float32)
    whole = view.side == scene.size

    def cover(box: tuple[int, int, int, int], ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row and column of the patches that an object inks by a fifth or more."""
        canvas = np.zeros((view.side, view.side), dtype=bool)
        left, top = box[0] - view.left, box[1] - view.top
        rows, cols = slice(max(top, 0), max(top + ink.shape[0], 0)), slice(max(left, 0), max(left + ink.shape[1], 0))
        part = ink[max(-top, 0) :, max(-left, 0) :]
        target = canvas[rows, cols]
        target |= part[: target.shape[0], : target.shape[1]]
        inked_rows, inked_cols = np.nonzero(canvas.reshape(cells, cell, cells, cell).sum((1, 3)) * 5 >= cell * cell)
        return inked_rows, inked_cols

    def inside(x: int, y: int) -> tuple[int, int] | None:
        row, col = (y - view.top) // cell, (x - view.left) // cell
        return (row, col) if 0 <= row < cells and 0 <= col < cells else None

    for item in scene.items:
        patches = cover(item.box, mask(item.shape, item.radius))
        kind = SHAPES.index(item.shape) * len(SIZES) + list(SIZES).index(item.size)
        labels["kind"][patches] = kind + 1
        labels["color"][patches] = list(COLORS).index(item.color) + 1
        labels["place"][patches] = item.x, item.y
        if whole:
            alike = sum(one.shape == item.shape for one in scene.items), sum(one.color == item.color for one in scene.items)
            labels["alike"][patches] = np.minimum(alike, MOST_COUNTED + 1)
        middle = inside(item.x, item.y)
        if middle:
            labels["center"][middle] = 1
            present[SHAPES.index(item.shape) * len(COLORS) + list(COLORS).index(item.color)] = 1
    for sign in scene.signs:
        patches = cover(sign.box, np.ones((sign.height, sign.width), dtype=bool))
        labels["color"][patches] = len(COLORS) + list(SIGNS).index(sign.color) + 1
        labels["place"][patches] = sign.left + sign.width // 2, sign.top + sign.height // 2
        nearest = (patches[1] * cell + cell // 2 + view.left - sign.left - PITCH // 2) // PITCH  # every patch knows its character
        nearest = nearest.clip(0, len(sign.text) - 1)
        characters = np.array([ALPHABET.index(character) + 1 for character in sign.text])
        labels["char"][patches] = characters[nearest]
        if whole:
            labels["word"][patches] = np.pad(characters, (0, LONGEST - len(characters)))
        labels["index"][patches] = nearest + 1 if whole else IGNORED
        for n, character in enumerate(sign.text):
            if inside(*sign.middle(n)):
                present[len(SHAPES) * len(COLORS) + ALPHABET.index(character)] = 1
    flat = {name: label.reshape(cells * cells, *label.shape[2:]) for name, label in labels.items()}
    return {**flat, "present": present}


def normalised(picture: np.ndarray, zoom: int) -> np.ndarray:
    """Shrinks by `zoom` and normalises as the processor does: `(h, w, 3)` uint8 to `(3, h / zoom, w / zoom)` float32."""
    if zoom > 1:
        size = picture.shape[1] // zoom, picture.shape[0] // zoom
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    return ((picture.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def ask(dice: Dice, scene: Scene, corner: tuple[int, int] | None = None) -> list[Question]:
    """Returns a balanced handful of questions about a scene whose first patch is at `corner` (row, column) of the whole picture."""
    asked = []
    for family, most in (ASKED if scene.size == CANVAS else ASKED_OF_WINDOWS).items():
        if family == "locate":
            found = locate(scene, corner[1] * 2 * PATCH, corner[0] * 2 * PATCH) if corner else []
        else:
            found = ASKERS[family](dice, scene)
        found = dice.shuffled(found)
        if family == "existence":  # as many present as absent ones
            no = [q for q in found if q.answer == "no"][: most // 2]
            found = no + [q for q in found if q.answer == "yes"][: max(len(no), 1)]
        if family == "counting":  # one question for each number, high and rare ones first
            found = [next(q for q in found if q.answer == n) for n in sorted({q.answer for q in found}, reverse=True)]
        asked += found[:most]
    return dice.shuffled(asked)


class Packer:
    """Turns questions into packed token rows; see `scripts.tiny.model.llm_pass` for the layout."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, families: tuple[str, ...] = FAMILIES):
        self.tokenizer, self.families = tokenizer, families
        start, self.tail = "", []
        if VISION_START in tokenizer.get_vocab():
            start, self.tail = f" {VISION_START}", [tokenizer.convert_tokens_to_ids(VISION_END)]
        self.head = tokenizer("USER:" + start)["input_ids"]  # <bos> USER:
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids without `<bos>`."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def pack(self, asked: list[list[Question]], places: list[dict[str, np.ndarray]] | None = None) -> dict[str, Tensor]:
        """Packs the questions about each image into one row.

        Args:
            asked: questions of each image.
            places: where each unique object of an image is, or what else is known of it, by its name.

        Returns:
            `ids`, `offset`, `question`, `target`, `family` `(B, T)` int64, `spots` `(B, T, 2)` float32 (the last axis as in `places`), and `head` and
            `tail`, the ids before and after an image.
        """
        rows: list[list[tuple[int, ...]]] = []
        for questions in asked:
            row: list[tuple[int, ...]] = []
            for number, question in enumerate(questions, start=1):
                prompt = self.encode(question.text) + self.encode("ASSISTANT:")
                answer = [*self.encode(question.answer), self.tokenizer.eos_token_id]
                ids, targets = prompt + answer[:-1], [IGNORED] * (len(prompt) - 1) + answer
                family = self.families.index(question.family)
                row += [(token, n, number, target, family) for n, (token, target) in enumerate(zip(ids, targets))]
            rows.append(row)
        table = np.zeros((len(rows), max(map(len, rows)), 5), dtype=np.int64)
        known = next((len(at) for named in places or [] for at in named.values()), 2)
        spot = np.full((*table.shape[:2], known), np.nan, dtype=np.float32)
        for n, named in enumerate(places or []):
            start = 0
            for question in asked[n]:
                words = question.text.removesuffix("?").split()  # one token each
                for at, pair in enumerate(pairwise(words), start=1):
                    spot[n, start + at] = named.get(" ".join(pair), named.get(pair[1], np.nan))
                start += len(self.encode(question.text)) + len(self.encode("ASSISTANT:")) + len(self.encode(question.answer))
        table[..., 3] = IGNORED
        for n, row in enumerate(rows):
            table[n, : len(row)] = row
        names = ("ids", "offset", "question", "target", "family")
        packed = {name: torch.from_numpy(table[..., n].copy()) for n, name in enumerate(names)}
        return {
            **packed,
            "spots": torch.from_numpy(spot),
            "head": torch.tensor(self.head),
            "tail": torch.tensor(self.tail, dtype=torch.long),
        }


class Batches(Dataset):
    """Batch number n of a stage, always the same for the same seed.

    Args:
        tokenizer: None for tower training without questions.
        count: number of batches.
        size: images per batch.
        canvas: side of the scenes in pixels, 192 for windows of 12 x 12 patches or 384 for whole pictures.
        closeups: percent of images shown at the scene's own resolution, as AnyRes crops are.
        anyres: give thumbnail and 2 x 2 crops `(B, 5, 3, h, w)` instead of one picture, without labels of patches.
        seed: seed of the run.
        split: random stream, `train` or `validation`.
        others: None: windows lie anywhere in the grid. Otherwise every picture starts at its corner, and every second batch has one of
            these canvases instead.
    """

    def __init__(self, tokenizer, count: int, size: int, canvas: int, closeups=0, anyres=False, seed=0, split="train", others=None):
        self.packer = Packer(tokenizer) if tokenizer else None
        self.count, self.size, self.canvas, self.closeups, self.anyres = count, size, canvas, closeups, anyres
        self.others = others
        self.stream = STREAMS[split] + (seed << 8) + (canvas << 20) + (bool(tokenizer) << 40)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if self.anyres:
            return self._anyres(number)
        pixels, corners, labels, asked, places = [], [], [], [], []
        canvas = self.others[number // 2 % len(self.others)] if self.others and number % 2 else self.canvas
        for n in range(number * self.size, (number + 1) * self.size):
            dice = Dice(self.stream, n)
            closeup = dice.below(100) < self.closeups and canvas >= self.canvas
            scene, view = self._shown(dice, closeup, canvas)
            cells = view.side // (PATCH * view.zoom)
            corner = (0, 0) if self.others is not None else (dice.below(GRID - cells + 1), dice.below(GRID - cells + 1))
            whole = self.others is None or canvas == CANVAS
            picture = draw(scene)[view.top : view.top + view.side, view.left : view.left + view.side]
            pixels.append(normalised(picture, view.zoom))
            label = patch_labels(scene, view)
            origin = view.left - corner[1] * PATCH * view.zoom, view.top - corner[0] * PATCH * view.zoom
            scale = 2 / (GRID * PATCH * view.zoom)
            label["place"] = (label["place"] - np.array(origin, np.float32)) * scale - 1
            places.append({name: (np.array(at) - origin) * scale - 1 for name, at in spots(scene).items()})
            labels.append(label)
            corners.append(corner)
            asked.append(ask(dice, scene, None if closeup or not whole else corner) if self.packer else [])
        batch = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]}
        batch |= {"pixels": torch.from_numpy(np.stack(pixels)), "corner": torch.tensor(corners)}
        return batch | (self.packer.pack(asked, places) if self.packer else {})

    def _shown(self, dice: Dice, closeup: bool, canvas: int) -> tuple[Scene, View]:
        """Returns a scene and what is shown of it; a close-up has half the side, and is a part of a scene only where nothing is asked."""
        side = canvas // 2
        if not self.packer:  # the tower learns to read from many signs
            scene = compose(dice, canvas, free=True, more_signs=3 if self.others is None else 2)  # four take 30 ms to place
            return scene, View(dice.below(side + 1), dice.below(side + 1), side, 1) if closeup else View(0, 0, canvas, 2)
        scene = compose(dice, side if closeup else canvas, free=True)
        return scene, View(0, 0, scene.size, 1 if closeup else 2)

    def _anyres(self, number: int) -> dict[str, Tensor]:
        pixels, asked = [], []
        for n in range(number * self.size, (number + 1) * self.size):
            dice = Dice(self.stream + (1 << 41), n)
            scene = compose(dice, self.canvas, free=True)
            picture, half = draw(scene), self.canvas // 2
            crops = [picture[top : top + half, left : left + half] for top in (0, half) for left in (0, half)]
            pixels.append(np.stack([normalised(picture, 2), *(normalised(crop, 1) for crop in crops)]))
            asked.append(ask(dice, scene, (0, 0)))
        assert self.packer is not None
        return {"pixels": torch.from_numpy(np.stack(pixels)), **self.packer.pack(asked)}
