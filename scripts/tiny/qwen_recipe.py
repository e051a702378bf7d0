"""How tiny-qwen-vl is trained: from the weights of tiny-llava, which is also its teacher until the last stage.

Dense signals make it quick: every patch says what it shows, as in tiny-llava's recipe, and every visual token, after the first layer of
the LLM, is to be what tiny-llava makes of its four patches, which is what the warm LLM can read. Where an object is only tiny-llava's
tower knows by itself; here the first layer of the LLM learns it from M-RoPE, and the tower says how far the object's middle is away.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vtr.data.scenes import CANVAS, Dice

from . import recipe
from .batches import Batches, Packer
from .model import CONTEXT, GRID, HEADS, grid_positions, packed_answers, packed_pass, take, tower_pass
from .qwen import first_layer, mrope_positions, qwen_tower_pass, unit_patches
from .recipe import NO_IMAGE
from .tokenizer import MERGE, PATCH

SIDES = (256, 288, 320, 448)  # canvases beside the full one, for any grid


@dataclass(frozen=True)
class Stage(recipe.Stage):
    """A stage of tiny-qwen-vl; `seen` and pruning count visual tokens."""

    taught: float = 1.0  # weight of tiny-llava's features, 0 for none
    others: tuple[int, ...] = ()  # other canvases, in every second batch


STAGES = (
    Stage("qwen-tower", 1200, 8, CANVAS // 2, 1.5e-3, 0.1, closeups=8, questions=False, seen=0.7),
    Stage("qwen96", 4000, 8, CANVAS // 2, 1e-3, 0.25, seen=0.7, pruned=15),
    Stage("qwen192", 6000, 5, CANVAS, 8e-4, 0.35, closeups=10, seen=0.5, pruned=20),
    Stage("qwen-whole", 6000, 5, CANVAS, 5e-4, 0.3, closeups=5, taught=0, others=SIDES, pruned=60, fewest=0.1),
)
AUX = 0.3  # weight of the supervision of patches where questions are asked


class QwenTrainer(recipe.Trainer):
    """Trains one Qwen2.5-VL through its stages.

    Args:
        model: Qwen2.5-VL to train, in place.
        tokenizer: its tokenizer.
        teacher: tiny-llava; None where no stage is taught.
        folder: where the training state and the log are kept.
        stages: stages in order.
        device: `cuda` or `cpu`.
        seed: seed of scenes and pruning.
        save_every_s: seconds between two saved states.
    """

    def __init__(self, model, tokenizer, teacher, folder: Path, stages=STAGES, device: str = "cpu", seed: int = 0, save_every_s: int = 180):
        super().__init__(model, tokenizer, folder, stages, device, seed, save_every_s)
        self._head = torch.tensor(Packer(tokenizer).head, device=device)  # <bos> USER: <|vision_start|>
        self.precision = None if device == "cpu" else torch.bfloat16
        self.teacher = teacher.to(device).eval().requires_grad_(False) if teacher is not None else None

    def batches(self, stage: Stage) -> Batches:
        asking = self.tokenizer if stage.questions else None
        return Batches(asking, stage.steps, stage.batch, stage.canvas, stage.closeups, seed=self.seed, others=stage.others)

    def groups(self, stage: Stage) -> list[dict]:
        return [{"params": [*self.model.parameters(), *self.heads.parameters()], "scale": 1.0}]

    def loss(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch and, where nothing is pruned, the share of questions answered right per family (on fresh scenes)."""
        dice = Dice(self.seed << 8 | 255, step)
        rows, cols = (side // (MERGE * PATCH) for side in batch["pixels"].shape[-2:])
        begin = len(self._head)
        end = torch.full((len(batch["pixels"]),), begin + max(rows, cols), device=self.device)
        if stage.questions and dice.below(100) < NO_IMAGE:
            start = end if dice.below(2) else torch.full_like(end, begin)
            out, shared = packed_pass(self.model, None, None, batch | {"start": start})
            loss, _ = self._answers(stage, packed_answers(self.model, out, shared, batch)[0], batch)
            return loss, {"none": float(loss.detach())}
        visual, where, goal, weight, aux, found = self._see(stage, step, batch, rows, cols)
        if not stage.questions:
            low = first_layer(self.model, visual, mrope_positions(where, cols, begin), self._head)
            taught = distance(low, goal, weight)
            return stage.taught * taught + aux, {**found, "taught": float(taught.detach())}
        whole = dice.below(100) >= stage.pruned
        if not whole:
            keep = max(1, where.shape[1] * dice.between(int(stage.fewest * 1000), int(stage.most * 1000)) // 1000)
            kept = self._random(where.shape, step).topk(keep, dim=1).indices.sort(dim=1).values
            visual, where = take(visual, kept), take(where, kept)
            goal, weight = (None, None) if goal is None else (take(goal, kept), take(weight, kept))
        out, shared = packed_pass(self.model, visual, mrope_positions(where, cols, begin), batch | {"start": end})
        logits, middle = packed_answers(self.model, out, shared, batch)
        loss, right = self._answers(stage, logits, batch)
        away = self.heads.named(middle, batch["spots"])
        scores = {name: found[name] for name in ("char", "word", "alike", "place")} | {"away": float(away.detach())}
        if whole:
            scores |= right
        loss = loss + AUX * aux + away
        if goal is not None:
            taught = distance(out.hidden_states[1][:, begin : begin + where.shape[1]], goal, weight)
            loss, scores["taught"] = loss + stage.taught * taught, float(taught.detach())
        return loss, scores

    def _see(self, stage: Stage, step: int, batch: dict[str, Tensor], rows: int, cols: int):
        """Returns visual tokens, their raster indices, what they are to be and how much that counts, and loss and scores of the patches."""
        pixels = batch["pixels"]
        patches = unit_patches(2 * rows, 2 * cols, self.device)
        where = torch.arange(len(patches), device=self.device).expand(len(pixels), -1)
        shown = (batch["color"] > 0)[:, patches].any(-1)
        kept = None
        if stage.seen < 1:  # objects first
            order = self._random(where.shape, step) + 0.6 * shown
            kept = order.topk(int(stage.seen * where.shape[1]), dim=1).indices.sort(dim=1).values
            where = kept
        seen = patches[where].flatten(1)  # (B, 4 K)
        labels = batch | {name: take(batch[name], seen) for name in (*HEADS, *CONTEXT, "place")}
        own = torch.stack([seen % (2 * cols), seen // (2 * cols)], -1) + 0.5
        labels["place"] = labels["place"] - (own * 2 / GRID - 1)
        features, visual = qwen_tower_pass(self.model.model.visual, pixels, kept)
        aux, found = self.heads(features, None, labels)
        if not stage.taught:
            return visual, where, None, None, aux, found
        goal, weight = self._teach(pixels, seen, labels["color"] > 0)
        return visual, where, goal, weight, aux, found

    @torch.no_grad()
    def _teach(self, pixels: Tensor, seen: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what tiny-llava makes of every 2 x 2 patches, mostly of those that show something, and how much it counts."""
        assert self.teacher is not None
        cells = pixels.shape[-1] // PATCH
        where = grid_positions(torch.zeros(len(pixels), 2, dtype=torch.long, device=pixels.device), cells, cells)
        features, _ = tower_pass(self.teacher.model.vision_tower, pixels, where, False, seen)
        tokens = self.teacher.model.multi_modal_projector(features).unflatten(1, (-1, 4))
        share = torch.where(shown, 1.0, 0.05).unflatten(1, (-1, 4))[..., None]
        return (tokens * share).sum(2) / share.sum(2), torch.where(shown.unflatten(1, (-1, 4)).any(-1), 1.0, 0.2)


def distance(tokens: Tensor, goal: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared distance of tokens `(B, K, D)` from what they should be, relative to how much that varies."""
    scale = (goal - goal.mean((0, 1))).square().mean()
    return ((tokens - goal).square().mean(-1) * weight).sum() / weight.sum() / scale
