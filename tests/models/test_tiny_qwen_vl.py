"""The embedded Qwen2.5-VL: weights that answer, and small enough for the repository."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtr
from vtr.eval.run.asking import encode

ROOT = Path(__file__).parents[2]
FOLDER, EXAMPLES = ROOT / "models" / "tiny-qwen-vl", ROOT / "eval" / "examples"


@torch.no_grad()
def test_it_answers_with_all_tokens_and_with_a_third_of_them():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
    asked = json.loads((EXAMPLES / "questions.json").read_text())
    images = [Image.open(EXAMPLES / one["image"]).convert("RGB") for one in asked]
    inputs = encode(processor, [one["question"] for one in asked], [[image] for image in images])

    def right() -> int:
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(made, skip_special_tokens=True)
        return sum(answer.strip() == one["answer"] for answer, one in zip(answers, asked, strict=True))

    assert right() >= 5
    with vtr.reduced(model, "divprune", keep=48) as reduction:
        assert right() >= 4
    assert all(image.visual_tokens == 144 and len(image.retained) == 48 for image in reduction.report().images)


def test_it_is_small_enough_for_the_repository():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20
