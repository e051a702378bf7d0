"""The LLaVA-NeXT-Video among the embedded checkpoints: its configuration, a start from tiny-llava, and clips as its tower sees them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionModel,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vtr.data.clip_questions import ASKERS
from vtr.data.clips import SIDE, TICKS, Clip, compose_clip, draw_clip
from vtr.data.questions import Question
from vtr.data.scenes import Dice
from vtr.data.shapes_video import FAMILIES, MOVING_PICTURES, STREAMS

from .batches import IGNORED, Packer, normalised
from .model import FULL_SIZES, GRID, Sizes, grid_positions, llm_config, special_ids, tower_config, tower_pass
from .tokenizer import PATCH, VIDEO, VIDEO_PINPOINTS, VIDEO_PIXELS

CELLS = VIDEO_PIXELS // PATCH  # 12 x 12 patches
POOL = 2
PER_FRAME = (CELLS // POOL) ** 2
CORNER = (GRID - CELLS) // 2  # the middle of tiny-llava's grid
KNOWN = 6  # numbers about a named item, see `facts`
COVERED = 0.25  # share of a token that an item covers
WAYS = {"up": "above", "down": "below", "before": "left", "after": "right", "times": "many"}  # new words start as old ones


def build_video(tokenizer: PreTrainedTokenizerFast, sizes: Sizes = FULL_SIZES) -> LlavaNextVideoForConditionalGeneration:
    """A LLaVA-NeXT-Video with random weights."""
    ids = special_ids(tokenizer)
    config = LlavaNextVideoConfig(
        vision_config=tower_config(sizes, VIDEO_PIXELS),
        text_config=llm_config(tokenizer, sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=CELLS * CELLS,
        video_seq_length=TICKS * PER_FRAME,
        image_grid_pinpoints=VIDEO_PINPOINTS,
        spatial_pool_stride=POOL,
        tie_word_embeddings=False,
        **ids,
    )
    model = LlavaNextVideoForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    model.generation_config.update(max_new_tokens=16, do_sample=False, **ids)
    return model


@torch.no_grad()
def start_from(model: LlavaNextVideoForConditionalGeneration, llava, tokenizer: PreTrainedTokenizerFast) -> None:
    """Puts tiny-llava's weights into the model: the middle of its grid of positions, and its words; new words begin like old ones or small."""
    weights = llava.state_dict()
    name = "model.vision_tower.embeddings.position_embedding.weight"
    middle = grid_positions(torch.tensor([[CORNER, CORNER]]), CELLS, CELLS)[0] + 1
    weights[name] = torch.cat([weights[name][:1], weights[name][middle]])
    own = model.state_dict()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old, new = weights[name], own[name] * (0.3 if "embed" in name else 1)
        new[: len(old)] = old
        for word, like in WAYS.items():
            new[tokenizer.convert_tokens_to_ids(word)] += old[tokenizer.convert_tokens_to_ids(like)]
        weights[name] = new
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    extra = {name for name in missing if not name.endswith(("image_newline", "position_ids"))}
    if extra:
        raise ValueError(f"start_from: tiny-llava has no {', '.join(sorted(extra))}")


def frame_features(tower: CLIPVisionModel, frames: Tensor) -> Tensor:
    """Features of frames `(F, 3, 96, 96)`, averaged over 2 x 2 patches `(F, 36, D)`."""
    where = torch.arange(CELLS * CELLS, device=frames.device).expand(len(frames), -1)
    features, _ = tower_pass(tower, frames, where, False)
    return F.avg_pool2d(features.transpose(1, 2).unflatten(2, (CELLS, CELLS)), POOL).flatten(2).transpose(1, 2)


def facts(clip: Clip) -> dict[str, np.ndarray]:
    """Returns what a question may ask of each item, by its name: where it is, when it comes and goes, where it moves, how often it is there."""
    found = {}
    for track in clip.tracks:
        x, y = (at + step * TICKS // 2 for at, step in zip((track.item.x, track.item.y), track.step))
        seen = [tick for tick, shown in enumerate(track.shown) if shown]
        blinks = sum(b - a for a, b in zip((False, *track.shown), track.shown) if b > a)
        move = [step / 8 for step in track.step]
        found[track.name] = np.array(
            [2 * x / SIDE - 1, 2 * y / SIDE - 1, (seen[0] + seen[-1] - TICKS + 1) / TICKS, *move, blinks - 2], dtype=np.float32
        )
    return found


def token_labels(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Returns what visual tokens show.

    Returns:
        Whether there is an item or the sign `(frames * 36,)` bool, and in how many ticks the item has been there so far `(frames * 36,)`
        int64, less one; -100 where a token shows no item that comes, goes or moves.
    """
    side, cell = CELLS // POOL, SIDE * POOL // CELLS
    shown, count = np.zeros((clip.frames, side, side), dtype=bool), np.full((clip.frames, side, side), IGNORED)
    edges = np.arange(side) * cell

    def share(low: int, high: int) -> np.ndarray:
        return (np.minimum(edges + cell, high) - np.maximum(edges, low)).clip(0) / cell

    for track in clip.tracks:
        boxes = track.boxes(clip.rate)
        for frame, box in enumerate(boxes):
            if box:
                covered = share(box[1], box[3])[:, None] * share(box[0], box[2])
                shown[frame] |= covered > 0
                if track.kind != "staying":
                    count[frame][covered > COVERED] = sum(one is not None for one in boxes[frame % clip.rate : frame + 1 : clip.rate]) - 1
    left, top, right, bottom = clip.sign.box
    shown[clip.sign_at] |= (share(top, bottom)[:, None] * share(left, right)) > 0
    return shown.ravel(), count.ravel().clip(IGNORED, TICKS - 1)


def ask_clip(dice: Dice, clip: Clip) -> list[Question]:
    """Returns one question of each family about a clip, in any order."""
    asked: list[Question] = []
    for asker in ASKERS.values():
        asked += dice.shuffled(asker(clip))[:1]
    return dice.shuffled(asked)


class ClipBatches(Dataset):
    """Batch number n of a stage, always the same for the same seed. Odd batches are even ones backwards.

    Args:
        tokenizer: of the model.
        count: number of batches.
        size: clips per batch of 8 frames; half as many of 16.
        tower: if given, the frames are given as its features; otherwise as pixels.
        longer: percent of batches with 16 frames.
        seed: seed of the run.
        split: random stream, `train` or `validation`.
    """

    def __init__(self, tokenizer, count: int, size: int, tower=None, longer: int = 0, seed: int = 0, split: str = "train"):
        self.packer = Packer(tokenizer, FAMILIES)
        self.count, self.size, self.tower, self.longer = count, size, tower, longer
        self.stream = STREAMS[split] + MOVING_PICTURES + (seed << 8) + (1 << 40)
        self._last: tuple[int, list[Clip], Tensor] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        clips, shown = self._clips(number // 2)
        if number % 2:
            clips, shown = [clip.backwards() for clip in clips], shown.flip(1)
        dice = Dice(self.stream + (1 << 41), number)
        asked = [ask_clip(dice, clip) for clip in clips]
        name = "pixels" if self.tower is None else "features"
        objects, counts = (torch.from_numpy(np.stack(labels)) for labels in zip(*map(token_labels, clips), strict=True))
        return {name: shown, "objects": objects, "counts": counts, **self.packer.pack(asked, [facts(clip) for clip in clips])}

    def _clips(self, number: int) -> tuple[list[Clip], Tensor]:
        """Returns the clips of two batches and their frames `(B, T, ...)`."""
        if not self._last or self._last[0] != number:
            longer = Dice(self.stream + (1 << 42), number).below(100) < self.longer
            frames, size = (2 * TICKS, self.size // 2) if longer else (TICKS, self.size)
            clips = [compose_clip(Dice(self.stream, number * self.size + n), frames, free=True) for n in range(size)]
            pixels = np.stack([[normalised(picture, SIDE // VIDEO_PIXELS) for picture in draw_clip(clip)] for clip in clips])
            shown = torch.from_numpy(pixels)
            if self.tower is not None:
                with torch.no_grad():
                    shown = frame_features(self.tower, shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
            self._last = number, clips, shown
        return self._last[1], self._last[2]


class ClipHeads(nn.Module):
    """Training-only heads: what the LLM knows of an item where a question names it, in which tick a visual token is, and in how many ticks
    the item that it shows has been there."""

    def __init__(self, width: int):
        super().__init__()
        self.named = nn.Linear(width, KNOWN)
        self.tick = nn.Linear(width, TICKS)
        self.count = nn.Linear(width, TICKS)

    def forward(self, middle: Tensor, spots: Tensor) -> Tensor:
        """Distance from what is known of the items that are named, each number by itself `(KNOWN,)`; NaN at tokens that end no name."""
        known = ~spots.isnan().any(-1)
        return (self.named(middle[known]).float() - spots[known]).abs().sum(0) / known.sum().clamp(min=1)
