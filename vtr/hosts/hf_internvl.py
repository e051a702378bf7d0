"""InternVL 2.5, 3 and 3.5 on Hugging Face transformers: tiles of one size, four patches joined into one token by pixel shuffle.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model, pixel_shuffle}`, `vision_tower.{encoder.layer, layernorm}`; of a
block its parts `attention`, `mlp`, `layernorm_before`, `layernorm_after`, `dropout`, `lambda_2`. Read at transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._protocol import Host, check_layer_kinds
from vtr.hosts._towers import JoinedTower, llm_stack
from vtr.registry import register_host
from vtr.types import VtrError


@register_host("internvl")
def internvl(model: Any) -> Host:
    """Tiles whose placeholders stand side by side are the views of one image; without a prompt every tile is an image."""
    config, base = model.config, getattr(model, "model", model)
    vision, llm, tower = config.vision_config, base.language_model, base.vision_tower
    if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
        raise VtrError(
            f"internvl: features must be those of the last tower layer without CLS, got vision_feature_layer={config.vision_feature_layer} and "
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}; use -1 and 'default'"
        )
    check_layer_kinds("internvl", llm.config)
    rows, cols = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    side = round(1 / config.downsample_ratio)
    # the family's own shuffle, run on the numbers of patches
    numbers = torch.arange(rows * cols, dtype=torch.float32).view(1, rows, cols, 1)
    members = base.pixel_shuffle(numbers, scale_factor=config.downsample_ratio).reshape(-1, side**2).long()
    tile = views_of_one_image([(rows // side, cols // side)])

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        count, runs = len(arguments["pixel_values"]), arguments.get("visual_runs")
        if runs is None:
            return [tile] * count
        if any(run % tile.length for run in runs) or sum(runs) != count * tile.length:
            raise VtrError(
                f"internvl: placeholders must be {tile.length} for each of {count} tiles, those of an image side by side, got runs of {runs}; pass "
                "every tile once"
            )
        return [views_of_one_image(list(tile.grids) * (run // tile.length)) for run in runs]

    return Host(
        name="internvl",
        model=model,
        base=base,
        projector=base.multi_modal_projector,
        language=llm_stack(llm),
        tower=JoinedTower(
            module=tower,
            blocks=tower.encoder.layer,
            attention=attrgetter("attention"),
            mlp=attrgetter("mlp"),
            before_attention=attrgetter("layernorm_before"),
            before_mlp=attrgetter("layernorm_after"),
            feature_layers=(len(tower.encoder.layer) - 1,),
            patch_size=vision.patch_size[0],
            patch_grid=tile.grids[0],
            prefix_tokens=1,
            has_cls=True,
            joins=side**2,
            members=members,
            restore=(tower.layernorm,),
            added=lambda block, output: block.lambda_2 * block.dropout(output),
        ),
        placeholder_ids={"image": config.image_token_id},
        layouts=layouts,
        default_layout=tile,
        runs=True,
        one_view={"crop_to_patches": False},
        stages=("tower", "boundary", "prefill", "decode"),
    )
