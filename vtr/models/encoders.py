"""Any vision encoder that has a host, with what turns a picture into its input.

timm, open_clip and transformers are imported inside the functions, each only where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vtr.data.pictures import as_shown
from vtr.hosts._protocol import host_of
from vtr.models.dense import load_dense
from vtr.models.loading import Checkpoint, check_device, check_dtype, find_checkpoint, load_config
from vtr.types import VtrError

Prepare = Callable[[Image.Image], Tensor]


def is_encoder(name: str) -> bool:
    """Tells whether a model's name stands for an encoder without an LLM, as `load_encoder` takes it.

    Raises:
        ValueError, VtrError: as `find_checkpoint`.
    """
    if name.startswith(("timm:", "open_clip:")) or _is_timm(name):
        return True
    checkpoint = find_checkpoint(name)
    if "architecture" in _config(checkpoint):
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

    return load_config(checkpoint).model_type not in MULTIMODAL


def load_encoder(name: str, device: str | None = None, dtype: str = "auto") -> tuple[nn.Module, Prepare]:
    """Loads an encoder in `eval()` state, and the function from a picture to its input `(1, 3, h, w)`.

    Args:
        name: `timm:NAME` or a bare name of timm, `open_clip:ARCHITECTURE/WEIGHTS`, the folder or hub id of a Hugging Face encoder, or the
            folder or recipe of a dense checkpoint of ours. timm and open_clip take `local-dir:FOLDER` and `hf-hub:ID` as names too.
        device, dtype: as for `load_model`.

    Raises:
        ValueError: unknown name, device or dtype.
        VtrError: it cannot be loaded, or has no host.
    """
    device = check_device(device)
    wanted = check_dtype(dtype, device, None)
    try:
        model, prepare = _load(name, device)
    except (RuntimeError, OSError) as error:  # what libraries raise for weights that they cannot get
        if isinstance(error, VtrError):
            raise
        raise VtrError(f"load_encoder: {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model = model.to(device, wanted).eval()
    return model, lambda picture: prepare(as_shown(picture)).to(device, wanted)


def _load(name: str, device: str) -> tuple[nn.Module, Prepare]:
    library, _, rest = name.partition(":")
    if library == "open_clip":
        import open_clip

        architecture, tag = (rest, None) if ":" in rest else (rest.split("/")[0], rest.partition("/")[2] or None)
        whole, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=tag)
        return whole.visual, lambda picture: transform(picture)[None]
    if library == "timm" or _is_timm(name):
        return _timm(rest if library == "timm" else name)
    checkpoint = find_checkpoint(name)
    config = _config(checkpoint)
    if "pretrained_cfg" in config:
        return _timm(f"local-dir:{checkpoint.source}")
    if "architecture" in config:
        dense = load_dense(checkpoint.source, device)
        return dense, lambda picture: dense.prepare([np.asarray(picture)])
    import transformers

    found = load_config(checkpoint)
    kind = getattr(transformers, (found.architectures or ["AutoModel"])[0], transformers.AutoModel)
    model = kind.from_pretrained(checkpoint.source, revision=checkpoint.revision, dtype=torch.float32)
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint.source, revision=checkpoint.revision)
    encoder = host_of(model).model  # without the prompts and queries that a model around it asks for
    return encoder, lambda picture: processor(images=[picture], return_tensors="pt")["pixel_values"]


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns `config.json` of a folder; empty where there is none, or none that can be read (`load_config` says why)."""
    try:
        content = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8")) if checkpoint.folder else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _timm(name: str) -> tuple[nn.Module, Prepare]:
    import timm

    model = timm.create_model(name, pretrained=True, num_classes=0)
    settings, size = timm.data.resolve_model_data_config(model), getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:  # what the model was built for; older timm gives what its pretrained original was
        settings["input_size"] = (settings["input_size"][0], *size)
    transform = timm.data.create_transform(**settings, is_training=False)
    return model, lambda picture: transform(picture)[None]


def _is_timm(name: str) -> bool:
    if Path(name).is_dir() or "/" in name:
        return False
    import timm

    return bool(timm.is_model(name))
