"""How tiny-llava-video is trained: from the weights of tiny-llava, whose tower stays as it is.

Where a question names an item, the LLM is to know when it comes, where it moves and how often it is there: a dense signal beside the
answers. Every batch is used forwards and backwards, so that the tower runs once for two steps.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vtr.data.clips import SIDE, TICKS
from vtr.data.scenes import Dice
from vtr.data.shapes_video import FAMILIES

from . import recipe
from .model import packed_answers, packed_pass, take
from .recipe import NO_IMAGE, RENUMBERED
from .video import PER_FRAME, ClipBatches, ClipHeads, frame_features


@dataclass(frozen=True)
class Stage(recipe.Stage):
    """A stage of tiny-llava-video."""

    longer: int = 8  # percent of batches with 16 frames
    whole_frames: int = 25  # percent of pruned steps in which whole frames go


STAGES = (
    Stage("clips-half", 12000, 8, SIDE, 8e-4, 0.8, seen=0.5, pruned=15, fewest=0.1),
    Stage("clips", 9000, 8, SIDE, 2e-4, 0.2, pruned=40, fewest=0.1),
)
FACTS = 1.0  # weight of what is known of named items
TICK = 0.2  # weight of the tick of a visual token
COUNT = 0.5  # weight of the count of a visual token
WEIGHTS = {"motion": 2.0, "events": 3.0, "needle": 2.5}
HEAD = 2  # tokens before the video


class VideoTrainer(recipe.Trainer):
    """Trains one LLaVA-NeXT-Video.

    Args:
        model: to train, in place.
        tokenizer: its tokenizer.
        folder: where the training state and the log are kept.
        stages: stages in order.
        device: `cuda` or `cpu`.
        seed: seed of clips and pruning.
        save_every_s: seconds between two saved states.
    """

    families = FAMILIES
    weights = WEIGHTS

    def __init__(self, model, tokenizer, folder: Path, stages=STAGES, device: str = "cpu", seed: int = 0, save_every_s: int = 180):
        super().__init__(model, tokenizer, folder, stages, device, seed, save_every_s)
        self.precision = None if device == "cpu" else torch.bfloat16
        self.heads = ClipHeads(model.config.text_config.hidden_size).to(device)
        model.model.vision_tower.requires_grad_(False)

    def batches(self, stage: Stage) -> ClipBatches:  # type: ignore[override]  # clips
        tower = self.model.model.vision_tower if self.device == "cpu" else None  # beside the training, in the process that draws
        return ClipBatches(self.tokenizer, stage.steps, stage.batch, tower, stage.longer, self.seed)

    def groups(self, stage: Stage) -> list[dict]:  # type: ignore[override]
        learning = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p.requires_grad]
        return [{"params": learning, "scale": 1.0}]

    def loss(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:  # type: ignore[override]
        """Loss of one batch and, where nothing is pruned, the share of questions answered right per family (on fresh clips)."""
        dice = Dice(self.seed << 8 | 255, step)
        begin = torch.full_like(batch["ids"][:, 0], HEAD)
        if dice.below(100) < NO_IMAGE:
            out, shared = packed_pass(self.model, None, None, batch | {"start": begin})
            loss, _ = self._answers(stage, packed_answers(self.model, out, shared, batch)[0], batch)
            return loss, {"none": float(loss.detach())}
        features = batch["features"] if "features" in batch else self._features(batch["pixels"])
        rate = features.shape[1] // TICKS
        visual = self.model.model.multi_modal_projector(features.flatten(1, 2))
        where = torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)
        start, positions = begin + visual.shape[1], where
        pruned = dice.below(100) < stage.pruned
        if not pruned and stage.seen < 1:  # objects first
            order = self._random(where.shape, step) + 0.6 * batch["objects"]
            where = order.topk(int(stage.seen * where.shape[1]), dim=1).indices.sort(dim=1).values
            visual, positions = take(visual, where), where
        if pruned:
            kept = self._kept(stage, step, dice, where.shape, rate)
            visual, where = take(visual, kept), kept
            positions = where
            if dice.below(100) < RENUMBERED:
                positions, start = torch.arange(kept.shape[1], device=kept.device).expand_as(kept), begin + kept.shape[1]
        out, shared = packed_pass(self.model, visual, positions + HEAD, batch | {"start": start})
        logits, middle = packed_answers(self.model, out, shared, batch)
        loss, right = self._answers(stage, logits, batch)
        away = self.heads(middle, batch["spots"])
        ticks = self.heads.tick(out.hidden_states[2][:, HEAD : HEAD + where.shape[1]]).float()
        tick = torch.nn.functional.cross_entropy(ticks.flatten(0, 1), (where // (PER_FRAME * rate)).flatten())
        counts, known = take(batch["counts"], where), self.heads.count(out.hidden_states[4][:, HEAD : HEAD + where.shape[1]]).float()
        count = torch.nn.functional.cross_entropy(known.flatten(0, 1), counts.flatten())
        loss = loss + FACTS * away.sum() + TICK * tick + COUNT * count.nan_to_num()
        if pruned:
            return loss, {"pruned": sum(right.values()) / len(right)}
        names = ("x", "y", "when", "right", "down", "blinks")
        return loss, {**right, "tick": float(tick.detach()), "count": float(count.detach()), **dict(zip(names, away.tolist()))}

    def _kept(self, stage: Stage, step: int, dice: Dice, shape: tuple[int, ...], rate: int) -> Tensor:
        """Returns the visual tokens that stay `(B, K)`: any, or those of some frames."""
        if dice.below(100) < stage.whole_frames:
            count = shape[1] // PER_FRAME
            frames = self._random((shape[0], count), step).topk(dice.between(1, count - 1), dim=1).indices.sort(dim=1).values
            inside = torch.arange(PER_FRAME, device=frames.device)
            return (frames[..., None] * PER_FRAME + inside).flatten(1)
        keep = max(1, shape[1] * dice.between(int(stage.fewest * 1000), int(stage.most * 1000)) // 1000)
        return self._random(shape, step).topk(keep, dim=1).indices.sort(dim=1).values

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        return frame_features(self.model.model.vision_tower, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
