"""What is fixed about a model when a method is applied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtr.types.errors import VtrError, WrongValue
from vtr.types.view import Kind


@dataclass(frozen=True)
class Geometry:
    """Holds what is fixed about a model when a method is applied to it.

    Args:
        host: name of the host, e.g. `llava`.
        tower_layers: number of layers of the vision tower.
        feature_layer: 0-based index of the tower layer whose output is the visual features; without an LLM the last block.
        prefix_tokens: CLS and registers in front of the patches inside the tower.
        has_cls: whether the first of them is a CLS token.
        patch_grid: `(rows, cols)` of tokens of one view, None where every image has a grid of its own.
        llm_layers: number of LLM layers, 0 without an LLM.
        most_tokens: the most visual tokens (newlines excluded) that one image can have, None where nobody knows; without an LLM those of
            `patch_grid`.
        text_config: shape facts of the LLM (`hidden_size`, `num_attention_heads`, ...), for methods with published per-model lists.
        first_layer: first tower layer whose input may be merged.
        anyres: an image may have several views, a thumbnail and crops.
        tiles: an image may have several views whose arrangement nobody knows.
        kinds: what a prompt may hold, images or videos.
        joins: patches that make one visual token.
        layer_kinds: type of every LLM layer as the configuration names it, e.g. `full_attention`; empty without an LLM.
        fixed_grid: every input has `patch_grid`; False: it is that of the model's own size, and others are possible.
        patch_norm: gives the Euclidean norm of the patch embedding's weights, which tells encoders of one shape apart; None = unknown.
    """

    host: str
    tower_layers: int
    feature_layer: int
    prefix_tokens: int
    has_cls: bool
    patch_grid: tuple[int, int] | None
    llm_layers: int
    most_tokens: int | None
    text_config: Mapping[str, Any] = field(default_factory=dict)
    anyres: bool = False
    tiles: bool = False
    kinds: tuple[Kind, ...] = ("image",)
    joins: int = 1
    layer_kinds: tuple[str, ...] = ()
    fixed_grid: bool = True
    first_layer: int = 0
    patch_norm: Callable[[], float | None] | None = field(default=None, compare=False)


def check_llm_layer(who: str, layer: int, geometry: Geometry, least: int = 0, symbol: str = "") -> None:
    """Refuses a layer that is none of the LLM's.

    Args:
        who: what the message begins with.
        layer: 0-based.
        geometry: of the model.
        least: the first layer that will do.
        symbol: what the paper calls the layer.

    Raises:
        ValueError: it is out of range.
    """
    if not least <= layer < geometry.llm_layers:
        paper = f" (the paper's {symbol} = {layer})" if symbol else ""
        raise WrongValue(
            f"{who}: layer {layer}{paper} is out of range: this LLM has {geometry.llm_layers} layers; use {least} to {geometry.llm_layers - 1}"
        )


def check_crops(who: str, geometry: Geometry) -> None:
    """Refuses a model whose images have several views, but no thumbnail with crops in known places.

    Raises:
        VtrError: naming the host.
    """
    if geometry.tiles:
        raise VtrError(
            f"{who}: needs a thumbnail and crops whose places are known, but the tiles of {geometry.host!r} come without; use a method that sees "
            "tokens alone, such as 'divprune'"
        )
