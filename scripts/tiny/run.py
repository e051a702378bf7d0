"""The whole recipe from nothing to two checkpoint folders."""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtr.data.shapes import PER_FAMILY, test_samples

from .card import card
from .check import accuracy, predictions
from .export import export
from .model import build_model
from .recipe import NEXT_STAGES, STAGES, Stage, Trainer
from .tokenizer import build_tokenizer

log = logging.getLogger(__name__)
KEEPS = (None, 288, 192, 128, 64, 32, 16, 0)
NEXT_KEEPS = (None, 1440, 576, 288, 64, 0)


def start_log(folder: Path) -> None:
    """Writes what happens to `log.txt` in a folder and to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / "log.txt"), logging.StreamHandler()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def device_in_words(device: str) -> str:
    """Returns what it was trained on, for the card."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} cores"


def write(trainer: Trainer, folder: Path, keeps: tuple[int | None, ...], limit: int = PER_FAMILY) -> None:
    """Exports a trained model, measures what was exported and writes its card."""
    export(trainer.model, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(trainer.device).eval()
    samples = test_samples(limit=limit)
    answers = predictions(model, AutoProcessor.from_pretrained(folder), samples, keeps)
    scores = {keep: accuracy(samples, answers[keep]) for keep in keeps}
    for keep, found in scores.items():
        log.info("keep %s: %s", keep, {name: round(score[0], 1) for name, score in found.items()})
    words = device_in_words(trainer.device)
    text = card(trainer.model, trainer.stages, scores, trainer.seconds, words, trainer.seed, limit)
    (folder / "README.md").write_text(text)


def train(
    out: Path,
    state: Path,
    stage: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    stages: tuple[Stage, ...] = STAGES,
    next_stages: tuple[Stage, ...] = NEXT_STAGES,
    limit: int = PER_FAMILY,
) -> None:
    """Trains tiny-llava into `out` and tiny-llava-next into `out` + "-next"; continues where an earlier run was stopped.

    Args:
        out: checkpoint folder, e.g. `models/tiny-llava`.
        state: folder of training states (about 35 MB each).
        stage: only this stage; a checkpoint is written when its last stage is done.
        device: `cuda` or `cpu`.
        seed: seed of weights, scenes and pruning.
        stages: stages of tiny-llava.
        next_stages: stages of tiny-llava-next.
        limit: test questions per family for the card.

    Raises:
        ValueError: unknown stage.
    """
    names = [one.name for one in (*stages, *next_stages)]
    if stage not in (None, *names):
        raise ValueError(f"train: unknown stage {stage!r}; choose from {', '.join(names)}")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    base = Trainer(build_model(tokenizer), tokenizer, state / "tiny-llava", stages, device, seed)
    base.resume()
    log.info("tiny-llava: stages left: %s", ", ".join(base.left) or "none")
    if base.run(stage) or not (base.left or (out / "README.md").exists()):
        write(base, out, KEEPS, limit)
    if base.left or stage not in (None, *(one.name for one in next_stages)):
        return
    anyres = Trainer(build_model(tokenizer, next_=True), tokenizer, state / "tiny-llava-next", next_stages, device, seed)
    if not anyres.resume():
        anyres.model.load_state_dict(base.model.state_dict(), strict=False)  # all but the newline
    next_out = out.with_name(out.name + "-next")
    if anyres.run(stage) or not (anyres.left or (next_out / "README.md").exists()):
        write(anyres, next_out, NEXT_KEEPS, limit)
