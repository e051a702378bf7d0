"""How tiny-llava is trained: a supervised tower, then the whole model on windows, then on whole pictures.

Every stage draws new scenes on the fly. Windows of 12 x 12 patches lie anywhere in the 24 x 24 grid and keep the positions they
have there, for the tower and for the LLM, so that whole pictures need no new positions. Visual tokens are pruned at random in
a share of the steps, and now and then there are none: less work, and a model that copes with fewer.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.data.scenes import CANVAS, Dice

from . import training
from .batches import FAMILIES, Batches
from .model import CONTEXT, GRID, HEADS, Supervision, anyres_layout, grid_positions, llm_pass, take, tower_pass


@dataclass(frozen=True)
class Stage(training.Stage):
    """A stage of tiny-llava; lengths in scene pixels."""

    closeups: int = 0
    questions: bool = True
    anyres: bool = False  # thumbnail and crops, with the tower as it is
    seen: float = 1.0  # share of the patches that the tower gets to see, objects first
    tower_every: int = 1  # the tower learns in every so many steps
    pruned: int = 50  # percent of steps with randomly pruned visual tokens
    fewest: float = 0.3  # smallest share of them that stays
    most: float = 1.0  # largest share
    reading: float = 1.0  # weight of questions about text


STAGES = (
    Stage("tower", 1200, 32, CANVAS // 2, 1.5e-3, closeups=8, questions=False, seen=0.6),
    Stage("llava96", 12000, 8, CANVAS // 2, 1.2e-3, seen=0.6, tower_every=3, pruned=10),
    Stage("llava192", 7000, 6, CANVAS, 8e-4, closeups=10, seen=0.4, tower_every=4, pruned=15, fewest=0.2),
    Stage("whole", 6000, 6, CANVAS, 5e-4, closeups=10, tower_every=2, pruned=80, fewest=0.15),
)
NEXT_STAGES = (Stage("next", 3600, 4, CANVAS, 5e-4, anyres=True, pruned=92, fewest=0.08, most=0.5, reading=4.0),)
TOWER_RATE = 0.5  # of the learning rate, once the tower has had its own stage
FAMILY_WEIGHT = {"relation": 3.0, "counting": 5.0}  # learned last
NO_IMAGE = 3  # percent of steps without visual tokens
RENUMBERED = 25  # percent of pruned steps whose positions close the gaps


class Trainer(training.Training):
    """Trains one LLaVA through its stages.

    Args:
        model: LLaVA to train, in place.
        tokenizer: its tokenizer.
        folder: where the training state and the log are kept.
        stages: stages in order.
        device: `cuda` or `cpu`.
        seed: seed of scenes and pruning; weights are seeded by whoever builds the model.
        save_every_s: seconds between two saved states.
    """

    families: tuple[str, ...] = FAMILIES
    weights: dict[str, float] = FAMILY_WEIGHT  # of answers

    def __init__(self, model, tokenizer, folder: Path, stages=STAGES, device: str = "cpu", seed: int = 0, save_every_s: int = 180):
        super().__init__(model, folder, stages, device, seed, save_every_s)
        self.tokenizer = tokenizer
        if device == "cpu" and not any(stage.anyres for stage in stages):
            model.set_attn_implementation("eager")  # short sequences: its backward pass in bf16 takes a fifth of the time of SDPA's
        self.heads = Supervision(model.config.vision_config.hidden_size).to(device)

    def batches(self, stage: Stage) -> Batches:
        asking = self.tokenizer if stage.questions else None
        return Batches(asking, stage.steps, stage.batch, stage.canvas, stage.closeups, stage.anyres, self.seed)

    def groups(self, stage: Stage) -> list[dict]:
        tower = set(self.model.model.vision_tower.parameters())
        others = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p not in tower]
        return [
            {"params": [p for p in self.model.parameters() if p in tower], "scale": TOWER_RATE if stage.questions else 1.0},
            {"params": others, "scale": 1.0},
        ]

    def loss(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch and the share of questions answered right per family (on fresh scenes: a held-out score)."""
        dice = Dice(self.seed << 8 | 255, step)
        if stage.questions and dice.below(100) < NO_IMAGE:
            logits, _ = llm_pass(self.model, None, None, batch | {"start": torch.full_like(batch["ids"][:, 0], 2)})
            loss, _ = self._answers(stage, logits, batch)
            return loss, {"none": float(loss.detach())}
        visual, where, aux, found = self._visual(stage, step, batch)
        if not stage.questions:
            return aux, found
        start = torch.full_like(where[:, 0], where.shape[1] if stage.anyres else GRID * GRID)
        if dice.below(100) < stage.pruned:
            keep = max(1, where.shape[1] * dice.between(int(stage.fewest * 1000), int(stage.most * 1000)) // 1000)
            kept = self._random(where.shape, step).topk(keep, dim=1).indices.sort(dim=1).values
            visual, where = take(visual, kept), take(where, kept)
            if dice.below(100) < RENUMBERED:
                where, start = torch.arange(keep, device=where.device).expand_as(where), torch.full_like(start, keep)
        logits, middle = llm_pass(self.model, visual, where + 2, batch | {"start": start + 2})
        loss, right = self._answers(stage, logits, batch)
        away = self.heads.named(middle, batch["spots"])
        return loss + 0.3 * aux + away, {**right, **found, "away": float(away.detach())}

    def _random(self, shape: tuple[int, ...], step: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed << 32 | step)).to(self.device)

    def _visual(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """Visual tokens `(B, K, D)`, their raster indices `(B, K)`, loss and scores of the tower's supervision."""
        model, pixels = self.model.model, batch["pixels"]
        cells = pixels.shape[-1] // model.vision_tower.config.patch_size
        if stage.anyres:
            whole = torch.arange(cells * cells, device=pixels.device).expand(pixels.shape[0] * pixels.shape[1], -1)
            with torch.no_grad():
                features, _ = tower_pass(model.vision_tower, pixels.flatten(0, 1), whole, False)
            visual = anyres_layout(model.multi_modal_projector(features).unflatten(0, pixels.shape[:2]), model.image_newline)
            where = torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)
            return visual, where, visual.new_zeros(()), {}
        where = grid_positions(batch["corner"], cells, cells)
        learns = step % stage.tower_every == 0
        kept = None
        if stage.seen < 1:  # objects first
            order = self._random(where.shape, step) + 0.6 * (batch["color"] > 0)
            kept = order.topk(int(stage.seen * where.shape[1]), dim=1).indices.sort(dim=1).values
            batch = batch | {name: take(batch[name], kept) for name in (*HEADS, *CONTEXT, "place")}
        with torch.set_grad_enabled(learns):
            features, cls = tower_pass(model.vision_tower, pixels, where, learns, kept)
        where = where if kept is None else take(where, kept)
        aux, found = self.heads(features, cls, batch) if learns else (features.new_zeros(()), {})
        if stage.questions:
            return (
                model.multi_modal_projector(features),
                where,
                aux,
                {name: found[name] for name in ("char", "word", "alike", "place") if learns},
            )
        return features, where, aux, found

    def _answers(self, stage: Stage, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        asked = batch["target"] >= 0
        target, family = batch["target"][asked], batch["family"][asked]
        row = torch.arange(len(asked), device=asked.device)[:, None].expand_as(asked)
        weights = self.weights | {"text": stage.reading}
        weight = torch.tensor([weights.get(name, 1.0) for name in self.families], device=target.device)[family]
        loss = (weight * F.cross_entropy(logits.float(), target, reduction="none")).sum() / weight.sum()
        which = (row * 64 + batch["question"])[asked]
        wrong = torch.zeros(len(asked) * 64 + 64, device=asked.device).index_add(0, which, (logits.argmax(-1) != target).float())
        right = (wrong[which] == 0).float()
        return loss, {name: float(right[family == n].mean()) for n, name in enumerate(self.families) if (family == n).any()}
