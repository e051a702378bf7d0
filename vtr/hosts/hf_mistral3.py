"""Mistral 3, and Pixtral inside LLaVA, on Hugging Face transformers: images of any grid in one packed sequence.

Internals used: `model.model.{vision_tower, multi_modal_projector, language_model}`, `vision_tower.{transformer.layers, patch_size}`,
`config.{spatial_merge_size, vision_feature_layer, vision_feature_select_strategy}`; of a block its parts `attention`, `feed_forward`,
`attention_norm`, `ffn_norm`; that `image_sizes` say how much of `pixel_values (images, 3, H, W)` is no filler. Read at transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from operator import attrgetter
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from vtr.hosts._layout import Kind, Layout, views_of_one_image
from vtr.hosts._protocol import Host, check_layer_kinds, feature_layers
from vtr.hosts._towers import PackedTower, gone, llm_stack
from vtr.registry import register_host
from vtr.types import VtrError


@dataclass(frozen=True, kw_only=True)
class RasterTower(PackedTower):
    """A packed tower `(1, S * joins, D)` with the patches of an image in raster order and images told apart by a mask (Pixtral).

    Patches are put side by side, unit by unit, when the first unit goes; mask and rotary positions follow.
    """

    padded: ClassVar[bool] = True

    def pixel_rows(self, layout: Layout) -> int:
        return 1

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        patches = hidden.reshape(-1, hidden.shape[-1])
        return (patches if run.arranged else patches[self._order(run)]).reshape(1, -1, self.joins * hidden.shape[-1])

    def hidden(self, units: Tensor, given: Tensor, run: Any) -> Tensor:
        run.arranged = True
        return units.reshape(*given.shape[:-2], -1, given.shape[-1])

    def _order(self, run: Any) -> Tensor:
        """Returns the patches `(S * joins,)` of the whole sequence unit by unit."""
        side, orders, first = isqrt(self.joins), [], 0
        for rows, cols in (layout.grids[0] for layout in run.layouts):
            patches = torch.arange(first, first + rows * cols * self.joins)
            orders.append(rearrange(patches, "(r i c j) -> (r c i j)", i=side, c=cols, j=side))
            first += rows * cols * self.joins
        return torch.cat(orders).to(run.tokens.column.device, non_blocking=True)

    def arguments(self, i: int, hidden: Tensor, args: tuple, kwargs: dict, run: Any) -> tuple[tuple, dict]:
        if not run.arranged:
            return args, kwargs
        names = ("attention_mask", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k")
        followed = {name: self._followed(run, kwargs[name]) for name in names if kwargs.get(name) is not None}
        return tuple(None if a is None else self._followed(run, a) for a in args), {**kwargs, **followed}

    def _followed(self, run: Any, given: Any) -> Any:
        """Returns a mask, borders of images or a rotary table, of the units that are left; made once for all blocks between two removals."""
        if isinstance(given, Tensor) and given.ndim == 1:
            return super()._followed(run, given)
        if id(given) not in run.followed:
            left = self._order(run).view(-1, self.joins)[run.tokens.column[0]].flatten()
            if isinstance(given, Tensor):
                made: Any = given[:, :, left][..., left]
                if run.sized:
                    made = made + run.bias(0, made.dtype).repeat_interleave(self.joins, 1)[:, None, None]
            else:
                made = self._rotary(run, given, self._order(run))
            run.followed[id(given)] = given, made
        return run.followed[id(given)][1]

    def detour(self, i: int, current: Callable[[], Any]) -> None:
        return None

    def full(self, output: Tensor, run: Any) -> Tensor:
        units = self.units(output, run)[0]
        full = units.new_full((run.tokens.gid_of.shape[1], units.shape[-1]), gone()).index_copy(0, run.tokens.column[0], units)
        patches = full.view(-1, output.shape[-1])[self._order(run).argsort()]
        return patches.reshape(*output.shape[:-2], -1, output.shape[-1])

    def seen(self, i: int, query: Tensor, key: Tensor, value: Tensor, run: Any) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.tensor(run.there) * self.joins
        place = torch.arange(max(counts.tolist()))
        real = place < counts[:, None]
        index = torch.where(real, (counts.cumsum(0) - counts)[:, None] + place, 0).to(query.device)
        run.segments[i] = index, real.to(query.device)
        where = index if run.arranged else self._order(run)[index]
        q, k, v = (t[0][:, where].transpose(0, 1) for t in (query, key, value))
        return q, k, v


@register_host("mistral3")
def mistral3(model: Any) -> Host:
    """Every image is one view of its own grid; `spatial_merge_size ** 2` patches (2 x 2) become one visual token.

    Rows of an image are closed by break tokens of the prompt, which are text and stay.
    """
    return _pixtral(model, int(model.config.spatial_merge_size))


def pixtral(model: Any) -> Host:
    """Pixtral inside LLaVA: as Mistral 3, but every patch becomes one visual token."""
    if model.config.vision_feature_select_strategy != "full":
        raise VtrError("llava: vision_feature_select_strategy='default' cuts off the first patch of a tower without CLS; use 'full'")
    return _pixtral(model, 1)


def _pixtral(model: Any, side: int) -> Host:
    config, base = model.config, getattr(model, "model", model)
    llm, tower = base.language_model, base.vision_tower
    check_layer_kinds(config.model_type, llm.config)
    patch = int(tower.patch_size)

    def layouts(_kind: Kind, arguments: dict[str, Any]) -> list[Layout]:
        pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
        if sizes is None:  # nothing is filler
            sizes = [pixels.shape[-2:]] * len(pixels)
        return [layout_of(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]

    def layout_of(height: int, width: int) -> Layout:
        layout = views_of_one_image([(height // (patch * side), width // (patch * side))], image_size=(height, width))
        if height // patch % side or width // patch % side:
            return replace(layout, closed=f"an image of {height} x {width} pixels has patches that become no token")
        return layout

    return Host(
        name=config.model_type,
        model=model,
        base=base,
        projector=base.multi_modal_projector,
        language=llm_stack(llm),
        tower=RasterTower(
            module=tower,
            blocks=tower.transformer.layers,
            attention=attrgetter("attention"),
            mlp=attrgetter("feed_forward"),
            before_attention=attrgetter("attention_norm"),
            before_mlp=attrgetter("ffn_norm"),
            feature_layers=feature_layers(config.vision_feature_layer, len(tower.transformer.layers)),
            patch_size=patch,
            joins=side**2,
            restore=(base.multi_modal_projector.norm,) if hasattr(base.multi_modal_projector, "patch_merger") else (),
        ),
        placeholder_ids={"image": config.image_token_id},
        layouts=layouts,
        stages=("tower", "boundary", "prefill", "decode"),
    )
