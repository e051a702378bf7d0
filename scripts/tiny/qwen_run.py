"""The recipe of tiny-qwen-vl from tiny-llava's folder to a checkpoint folder."""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from .batches import Batches
from .export import export
from .qwen import FULL_SIZES, QwenSizes, build_qwen, start_from
from .qwen_recipe import STAGES, QwenTrainer, Stage
from .tokenizer import build_tokenizer

log = logging.getLogger(__name__)


def trainer(
    state: Path, base: Path, device: str = "cpu", seed: int = 0, stages: tuple[Stage, ...] = STAGES, sizes: QwenSizes = FULL_SIZES
) -> QwenTrainer:
    """Returns a trainer that starts from `base` (tiny-llava), or from where an earlier run was stopped.

    Args:
        state: folder of the training state.
        base: folder of tiny-llava; its sizes must fit.
        device: `cuda` or `cpu`.
        seed: seed of weights, scenes and pruning.
        stages: the stages.
        sizes: of the model.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(qwen=True)
    teacher = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = build_qwen(tokenizer, sizes)
    made = QwenTrainer(model, tokenizer, teacher, state, stages, device, seed)
    if not made.resume():
        some = Batches(None, 1, 4, stages[-1].canvas, seed=seed, others=())[0]
        start_from(model, teacher, some["pixels"].to(device))
    return made


def train(
    out: Path,
    state: Path,
    base: Path,
    stage: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    until: float | None = None,
    stages: tuple[Stage, ...] = STAGES,
    sizes: QwenSizes = FULL_SIZES,
) -> None:
    """Trains tiny-qwen-vl and exports it into `out` when the last stage is done; continues where an earlier run was stopped.

    Args:
        out: checkpoint folder.
        state: folder of training states.
        base: folder of tiny-llava.
        stage: only this stage.
        device: `cuda` or `cpu`.
        seed: seed of weights, scenes and pruning.
        until: when the last stage ends, as `time.time()` counts.
        stages: the stages.
        sizes: of the model.

    Raises:
        ValueError: unknown stage.
    """
    names = [one.name for one in stages]
    if stage not in (None, *names):
        raise ValueError(f"train: unknown stage {stage!r}; choose from {', '.join(names)}")
    made = trainer(state / "tiny-qwen-vl", base, device, seed, stages, sizes)
    made.deadline = until
    log.info("tiny-qwen-vl: stages left: %s", ", ".join(made.left) or "none")
    if made.run(stage) or not (made.left or (out / "config.json").exists()):
        export(made.model, out)
        log.info("tiny-qwen-vl: exported to %s after %.0f minutes", out, made.seconds / 60)
