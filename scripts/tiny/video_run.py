"""The recipe of tiny-llava-video from tiny-llava's folder to a checkpoint folder."""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from .export import export
from .model import FULL_SIZES, Sizes
from .tokenizer import build_tokenizer
from .video import build_video, start_from
from .video_recipe import STAGES, Stage, VideoTrainer

log = logging.getLogger(__name__)


def trainer(
    state: Path, base: Path, device: str = "cpu", seed: int = 0, stages: tuple[Stage, ...] = STAGES, sizes: Sizes = FULL_SIZES
) -> VideoTrainer:
    """Returns a trainer that starts from `base` (tiny-llava), or from where an earlier run was stopped.

    Args:
        state: folder of the training state.
        base: folder of tiny-llava; its sizes must fit.
        device: `cuda` or `cpu`.
        seed: seed of weights, clips and pruning.
        stages: the stages.
        sizes: of the model.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(video=True)
    model = build_video(tokenizer, sizes)
    made = VideoTrainer(model, tokenizer, state, stages, device, seed)
    if not made.resume():
        start_from(model, AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tokenizer)
    return made


def train(
    out: Path,
    state: Path,
    base: Path,
    device: str = "cpu",
    seed: int = 0,
    until: float | None = None,
    only_export: bool = False,
    stages: tuple[Stage, ...] = STAGES,
    sizes: Sizes = FULL_SIZES,
) -> None:
    """Trains tiny-llava-video and exports it into `out`; continues where an earlier run was stopped.

    Args:
        out: checkpoint folder.
        state: folder of training states.
        base: folder of tiny-llava.
        device: `cuda` or `cpu`.
        seed: seed of weights, clips and pruning.
        until: when the last stage ends, as `time.time()` counts.
        only_export: do not train, export what the last saved state holds.
        stages: the stages.
        sizes: of the model.
    """
    made = trainer(state / "tiny-llava-video", base, device, seed, stages, sizes)
    made.deadline = until
    log.info("tiny-llava-video: stages left: %s", ", ".join(made.left) or "none")
    if only_export or made.run() or not (made.left or (out / "config.json").exists()):
        export(made.model, out)
        log.info("tiny-llava-video: exported to %s after %.0f minutes of training", out, made.seconds / 60)
