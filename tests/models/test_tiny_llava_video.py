"""The embedded LLaVA-NeXT-Video: weights that answer, and small enough for the repository."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtr.data.shapes import is_correct
from vtr.data.shapes_video import FAMILIES, split_samples

FOLDER = Path(__file__).parents[2] / "models" / "tiny-llava-video"


@torch.no_grad()
def test_it_answers_about_8_frames_and_about_16():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True)

    def right(frames: int, count: int) -> int:
        asked = [sample for family in FAMILIES for sample in split_samples("examples", family, count, frames)]
        contents = [[{"type": "video"}, {"type": "text", "text": sample.question}] for sample in asked]
        prompts = [processor.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True) for one in contents]
        videos = [sample.frames for sample in asked]
        inputs = processor(text=prompts, videos=videos, do_sample_frames=False, padding=True, return_tensors="pt")
        assert ((inputs["input_ids"] == model.config.video_token_id).sum(1) == 36 * frames).all()
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(made, skip_special_tokens=True)
        return sum(is_correct(answer, sample.answer) for answer, sample in zip(answers, asked, strict=True))

    assert right(8, 3) >= 12  # of 15
    assert right(16, 1) >= 3  # of 5


def test_it_is_small_enough_for_the_repository():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20
