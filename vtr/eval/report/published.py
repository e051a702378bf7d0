"""What papers printed, by model, method, tokens and benchmark: every source, never one chosen for the reader.

The files are `eval/published/*.csv`; its README says what is in them, where each number was read and what to be careful with.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vtr.recipes import shared_folders
from vtr.types.naming import FULL

SPEED, DISAGREEMENTS = "speed", "disagreements"
_MODELS = {  # file -> names of the checkpoint: recipe, hub id without owner
    "llava-1.5-7b": ("llava-1.5-7b", "llava-1.5-7b-hf"),
    "llava-next-7b": ("llava-next-7b", "llava-v1.6-vicuna-7b-hf"),
    "qwen2.5-vl-7b": ("qwen2.5-vl-7b", "qwen2.5-vl-7b-instruct"),
    "llava-onevision-video": ("llava-onevision-7b", "llava-onevision-qwen2-7b-ov-hf"),
}
_METHODS = {"vanilla": FULL, "noimagetokens": "none", "llavaprumerge": "prumerge", "resizeonly": "resize"}  # printed -> registry name
_TASKS = {  # printed benchmark -> tasks of lmms-eval that measure it
    "GQA": ("gqa",),
    "MMB": ("mmbench_en_dev", "mmbench_en"),
    "MMB-CN": ("mmbench_cn_dev", "mmbench_cn"),
    "MME": ("mme",),
    "POPE": ("pope",),
    "SQA-I": ("scienceqa_img",),
    "TextVQA": ("textvqa_val", "textvqa"),
    "VQAv2": ("vqav2_test", "vqav2_val", "vqav2"),
    "VizWiz": ("vizwiz_vqa_val", "vizwiz_vqa_test", "vizwiz_vqa"),
    "MM-Vet": ("mmvet",),
    "MMMU": ("mmmu_val",),
    "OCRBench": ("ocrbench",),
    "SEED": ("seedbench",),
    "MVBench": ("mvbench",),
    "LongVideoBench": ("longvideobench_val_v",),
    "MLVU": ("mlvu_dev", "mlvu"),
    "VideoMME": ("videomme",),
    "EgoSchema": ("egoschema", "egoschema_subset"),
    "PerceptionTest": ("perceptiontest_val_mc",),
}


@dataclass(frozen=True)
class Value:
    """One printed number, names as printed.

    Args:
        model: name of the file.
        method, venue: the method and where it appeared, which is not where the number did.
        tokens: visual tokens kept: a count, a share such as `22.2%`, or either with a remark. Methods inside the LLM print a mean over layers.
        benchmark, score, unit: percent is 0 to 100.
        source, table: arXiv number (or name) of the paper that printed it, and where in it.
    """

    model: str
    method: str
    venue: str
    tokens: str
    benchmark: str
    score: float
    unit: str
    source: str
    table: str

    def has_tokens(self, tokens: float, visual_tokens: float) -> bool:
        """Tells whether this is the number for `tokens` left of `visual_tokens`: less than one token away, or the share rounded as printed."""
        found = re.fullmatch(r"(\d+(?:\.(\d+))?)(%?)", self.tokens)
        if not found:
            return False
        printed, decimals, share = float(found[1]), len(found[2] or ""), bool(found[3])
        return abs(100 * tokens / visual_tokens - printed) <= 0.5 * 10**-decimals if share else abs(tokens - printed) < 1


@dataclass(frozen=True)
class Published:
    """All printed numbers for one cell of a table; empty where nobody printed one."""

    values: tuple[Value, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{value.score:g} ({value.source})" for value in self.values)

    @property
    def conflict(self) -> bool:
        """Whether sources disagree."""
        return len({value.score for value in self.values}) > 1

    @property
    def lowest(self) -> float:
        """Smallest printed score."""
        return min(value.score for value in self.values)

    @property
    def highest(self) -> float:
        """Largest printed score."""
        return max(value.score for value in self.values)


def find_published(model: str, method: str, tokens: float, visual_tokens: float, task: str) -> Published:
    """Returns every number that was printed for an experiment.

    Args:
        model: name of a recipe, hub id, or name of a folder.
        method: registry name, or `full`.
        tokens: visual tokens left per sample, mean over the LLM's layers, which is how papers count; not looked at for `full`.
        visual_tokens: before any reduction, for papers that print shares.
        task: of lmms-eval (`mmbench_en_dev`), or the benchmark as printed (`MMB`).

    Returns:
        Empty for any name that no paper is known to have measured. Numbers that one source prints twice appear once.
    """
    found = {
        (value.source, value.tokens, value.score): value
        for value in load_published()
        if model.split("/")[-1].lower() in _MODELS[value.model]
        and _same_method(value.method, method)
        and (task == value.benchmark or task in _TASKS.get(value.benchmark, ()))
        and (method == FULL or value.has_tokens(tokens, visual_tokens))
    }
    return Published(tuple(found[key] for key in sorted(found)))


@cache
def load_published() -> tuple[Value, ...]:
    """Returns all numbers of the score files, in their order; none when the files are not installed."""
    return tuple(
        Value(
            model=model,
            method=row["method"],
            venue=row["venue"],
            tokens=row["tokens"],
            benchmark=row["benchmark"],
            score=float(row["score"]),
            unit=row["unit"],
            source=row["source_arxiv"],
            table=row["source_table"],
        )
        for model in _MODELS
        for row in read_table(model)
    )


def read_table(name: str) -> Iterator[dict[str, str]]:
    """Yields the rows of `eval/published/NAME.csv`, the nearest one (working folder first); none where it is missing."""
    for folder in shared_folders("eval/published"):
        path = Path(folder, f"{name}.csv")
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                yield from csv.DictReader(stream)
            return


def _same_method(printed: str, method: str) -> bool:
    """Tells whether a printed name is a method: `LLaVA-PruMerge` is `prumerge`; a variant in brackets is a method of its own."""
    plain = re.sub(r"[^a-z0-9+()]", "", printed.lower())
    return _METHODS.get(plain, plain) == re.sub(r"_plus$", "+", method).replace("_", "")
