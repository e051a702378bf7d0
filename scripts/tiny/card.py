"""Model cards of the embedded checkpoints."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from vtr.data.shapes import FAMILIES, TEST_SHA256, VERSION, constant_accuracy
from vtr.markdown import markdown_table

Scores = Mapping[int | None, Mapping[str, tuple[float, float, float]]]

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

{what} It is a toy with a real architecture: it answers the questions of the generated benchmark `shapes` {version} and
nothing else, so that visual token reduction can be measured on a laptop. Made by `scripts/train_tiny.py` of this repository.

```python
model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```

## Architecture

{sizes}

## Training

Scenes are drawn while training, never twice; their random stream is not the test split's (`tests/data/test_shapes.py`
checks seeds and content). Signs carry random letters, too. No other data, no pretrained weights.

| Stage | Scenes | Images per step | Steps | Learning rate |
|---|---|---|---|---|
{stages}

{how}

Device: {device}. Wall time: {minutes:.0f} minutes{all_stages}. Seed: {seed} (weights, scenes, pruning). AdamW, bf16 autocast.
Versions: python {python}, torch {torch}, transformers {transformers}. Date: {date}. Licence: Apache-2.0.

## Scores

Exact match of the greedy answer on the test split of `shapes` {version} (sha256 `{sha}`), {count} questions,
fp16 weights computed in fp32 on CPU, percent with 95 % intervals. Visual tokens chosen at random between projector and LLM
(seed: the batch number), positions kept; 0 means a prompt without its placeholders. Best constant: the most frequent answer.

{table}

<!-- floors:begin -->
<!-- floors:end -->
"""
_WHAT = {
    "llava": "A LLaVA of {millions:.2f} M parameters with 576 visual tokens (24 x 24 patches of 8 pixels at 192 pixels).",
    "llava_next": "A LLaVA-NeXT of {millions:.2f} M parameters: thumbnail and up to 2 x 2 crops of 192 pixels, 2880 visual tokens and "
    "48 newline tokens for a square picture of 384 pixels. Starts from the weights of tiny-llava.",
}
_HOW = {
    "llava": "First the CLIP tower alone learns what every patch shows (shape and size, color, character and its place in the word,\n"
    "where the object's centre is) and, from CLS, what the picture holds. Then the whole model answers up to 12 questions per\n"
    "image, packed into one sequence in which no question sees another; the supervision of the tower goes on at weight 0.3.\n"
    "Windows lie anywhere in the 24 x 24 grid and keep their positions. In {pruned} % of the last stage's steps a random part of the\n"
    "visual tokens is pruned at the boundary (down to {fewest:.0%}), in 3 % of the steps there are none.",
    "llava_next": "The tower stays as it is; projector, newline and LLM learn to answer from thumbnail and crops. In {pruned} % of the steps\n"
    "only {fewest:.0%} to {most:.0%} of the visual tokens stay at the boundary, in 3 % of the steps there are none.",
}


def table(scores: Scores) -> str:
    """Returns the Markdown table of `scripts.tiny.check.accuracy` per keep count."""
    header = ["Visual tokens", *FAMILIES, "macro"]
    rows = [["best constant", *(f"{constant_accuracy(family):.1f}" for family in FAMILIES), ""]]
    for keep, found in scores.items():
        cells = [f"{found[name][0]:.1f} ({found[name][1]:.1f} to {found[name][2]:.1f})" for name in header[1:]]
        rows.append(["all" if keep is None else str(keep), *cells])
    return markdown_table(header, rows)


def card(model, stages: Sequence, scores: Scores, seconds: float, device: str, seed: int, per_family: int) -> str:
    """Returns the README of a checkpoint.

    Args:
        model: the trained model.
        stages: its stages, see `scripts.tiny.recipe.Stage`.
        scores: per keep count, None for all visual tokens.
        seconds: wall time of the training.
        device: device in words.
        seed: seed of the run.
        per_family: test questions per family that were asked.
    """
    kind, config, last = model.config.model_type, model.config, stages[-1]
    name = "tiny-llava" if kind == "llava" else "tiny-llava-next"
    tower, llm = config.vision_config, config.text_config
    rows = [
        f"| {stage.name} | {stage.canvas // 2} px | {stage.batch} | {stage.steps} ({stage.steps * stage.batch:,} images) | {stage.rate:g} |"
        for stage in stages
    ]
    return _CARD.format(
        name=name,
        folder=f"models/{name}",
        what=_WHAT[kind].format(millions=sum(p.numel() for p in model.parameters()) / 1e6),
        version=VERSION,
        sizes=f"CLIP tower: {tower.num_hidden_layers} layers, width {tower.hidden_size}, {tower.num_attention_heads} heads, CLS, patch "
        f"{tower.patch_size}, {tower.image_size} px; features before the last layer, without CLS. Projector: 2 layers. Llama: "
        f"{llm.num_hidden_layers} layers, width {llm.hidden_size}, {llm.num_attention_heads} heads, {llm.vocab_size} tokens "
        "(words of the benchmark; anything else is spelled).",
        stages="\n".join(rows),
        how=_HOW[kind].format(pruned=last.pruned, fewest=last.fewest, most=last.most),
        device=device,
        minutes=seconds / 60,
        all_stages="" if kind == "llava" else " after tiny-llava",
        seed=seed,
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        date=datetime.now(UTC).date(),
        sha=TEST_SHA256,
        count=per_family * len(FAMILIES),
        table=table(scores),
    )
