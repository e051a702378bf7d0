"""Write a trained model as a plain checkpoint folder that `from_pretrained` loads."""

import copy
import json
from pathlib import Path

import torch

from .tokenizer import build_processor, build_qwen_processor, build_video_processor

BUILDERS = {"qwen2_5_vl": build_qwen_processor, "llava_next_video": build_video_processor}


def export(model, folder: Path) -> None:
    """Saves weights in fp16, configuration, generation settings, processor and tokenizer.

    Args:
        model: trained tiny-llava or another of the embedded checkpoints; not changed.
        folder: where to write; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to("cpu", torch.float16).save_pretrained(folder)
    kind = model.config.model_type
    processor = BUILDERS[kind]() if kind in BUILDERS else build_processor(next_=kind == "llava_next")
    processor.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers release knows
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
