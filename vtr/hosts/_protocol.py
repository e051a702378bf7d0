"""What the engine must know about one model family, and nothing about methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.hosts._layout import Kind, Layout, frames_of_one_video, runs_of
from vtr.hosts._not_hosted import NOT_HOSTED
from vtr.hosts._probe import keywords_of
from vtr.hosts._towers import Pooling, Stack, Tower
from vtr.hosts._versions import cache_keyword, rotary_limit, takes_layer_type
from vtr.hosts._wrappers import model_type_of, names_of, wrapped
from vtr.registry import find_host, list_hosts
from vtr.types import STAGES, Geometry, VtrError
from vtr.types.errors import WrongType
from vtr.types.naming import closest


@dataclass
class Host:
    """Says how one multimodal LLM is entered: its stacks, placeholders and layouts. A family fills it in one file.

    Args:
        name: model type.
        model, base, projector: the modules of those roles.
        language: the LLM.
        tower: the vision tower.
        placeholder_ids: ids in `input_ids` that visual tokens of each kind replace.
        layouts: `(kind, arguments of its encoding method by name) -> list[Layout]`, one per image or video, host side only.
        most_tokens: the most visual tokens one image can produce, None where nobody knows.
        default_layout: layout of an image when only placeholders are known; None when it depends on the image size.
        encode: name of the base model's method that encodes each kind.
        renumber: survivors may get consecutive positions.
        stages: where a reduction may act.
        anyres: an image may have several views, a thumbnail and crops.
        beside: arguments of the LLM with which the model adds features to visual tokens behind its first layers: their mask, and a list of
            features. The engine adds them itself, to the tokens that are left.
        runs: placeholders that stand side by side are one image; `layouts` gets how many as `visual_runs`, where the prompt is known.
        tiles: an image may have several views whose arrangement nobody knows, as with `runs`.
        closed: why the tower can be neither read nor cut, empty where it can.
        bidirectional: tokens of an image see each other, by masks that the base model makes.
        shared: last layers of the LLM that use keys of earlier ones.
        per_token: arguments of the LLM with an entry for every token, `(B, S, ...)`, beside embeddings and positions.
        next_positions: `columns (B, q) -> position ids (3, B, q)` of tokens that go on behind a prompt, for models that would count them from
            the length of the cache; columns count removed tokens, too.
        pictures: that a frame of a video stands for; 2 where the model puts them together in twos.
        as_frames: the images of a prompt are the frames of one video, see `with_frames`.
        pooling: of videos, None where their patches become tokens as those of images do.
        one_view: settings of the processor with which it makes one view of every image, where it would make several.
        pixel_limits: keys of the image processor's `size` that hold the fewest and the most pixels of an image, where it has such limits.
        token_budgets: most pixels of an image -> its most visual tokens, ascending, where the image processor has a few such budgets to choose from.
    """

    name: str
    model: Any
    base: Any
    projector: Any
    language: Stack
    tower: Tower
    placeholder_ids: Mapping[Kind, int]
    layouts: Callable[[Kind, dict[str, Any]], list[Layout]]
    most_tokens: int | None = None
    default_layout: Layout | None = None
    encode: Mapping[Kind, str] = field(default_factory=lambda: {"image": "get_image_features"})
    renumber: bool = True
    stages: tuple[str, ...] = STAGES
    anyres: bool = False
    beside: tuple[str, str] | None = None
    runs: bool = False
    tiles: bool = False
    closed: str = ""
    bidirectional: bool = False
    shared: int = 0
    per_token: tuple[str, ...] = ()
    next_positions: Callable[[Tensor], Tensor] | None = None
    pixel_limits: tuple[str, str] | None = None
    token_budgets: Mapping[int, int] = field(default_factory=dict)
    pooling: Pooling | None = None
    pictures: int = 1
    as_frames: bool = False
    one_view: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frame_settings(self) -> dict[str, Any]:
        """Settings of the processor for images as they are shown: where they are frames, each is one view."""
        return dict(self.one_view) if self.as_frames else {}

    def images_of(self, inputs: Mapping[str, Any]) -> list[Layout]:
        """Returns the layouts of the images in what the processor made of prompts, in order; `input_ids` is `(B, S)`."""
        if inputs.get("pixel_values") is None:
            return []
        given = dict(inputs)
        if self.runs:
            given["visual_runs"] = runs_of(inputs["input_ids"] == self.placeholder_ids["image"])
        return self.layouts("image", given)

    @property
    def llm_layers(self) -> int:
        """Layers of the LLM."""
        return len(self.language.blocks)

    @property
    def has_video(self) -> bool:
        """Whether a prompt may hold videos."""
        return "video" in self.kinds

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of visuals that methods see."""
        return tuple(map(self.shown, self.encode))

    def shown(self, kind: Kind) -> Kind:
        """Returns as what methods see visuals that the model encodes as images, or as videos."""
        return "video" if self.as_frames else kind

    @property
    def has_cls(self) -> bool:
        """Whether the tower has a CLS token."""
        return self.tower.has_cls

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Tower layers whose outputs become features."""
        return self.tower.feature_layers

    def attention_name(self, tower: bool) -> str:
        """Returns the attention backend in use, e.g. `sdpa`."""
        return (self.tower if tower else self.language).backend

    def geometry(self) -> Geometry:
        """The facts that methods may build their steps from."""
        config, tower = self.language.module.config, self.tower
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"]
        names += ["head_dim", "rope_parameters", "layer_types"]
        return Geometry(
            host=self.name,
            tower_layers=len(tower.blocks),
            feature_layer=min(tower.feature_layers),
            prefix_tokens=tower.prefix_tokens,
            has_cls=tower.has_cls,
            patch_grid=tower.patch_grid,
            llm_layers=len(self.language.blocks),
            most_tokens=self.most_tokens,
            anyres=self.anyres,
            kinds=self.kinds,
            tiles=self.runs or self.tiles,
            joins=tower.joins,
            layer_kinds=tuple(map(self.layer_kind, range(self.llm_layers))),
            text_config={n: value_of(config, n) for n in names},
            patch_norm=partial(patch_norm, tower.module),
        )

    def causal_mask(self, hidden: Tensor, columns: Tensor, cache: Any, layer: int, may_skip: bool = True) -> Any:
        """The mask that this model's layer `layer` takes, made by transformers for `columns (B, keys)` of real keys."""
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            config=self.language.module.config,
            inputs_embeds=hidden,
            attention_mask=columns,
            position_ids=None,
            layer_idx=layer,
            **{cache_keyword(): cache},
            **({} if may_skip else {"allow_is_causal_skip": False}),
        )

    def layer_kind(self, layer: int) -> str:
        """Type of an LLM layer as its configuration names it, e.g. `full_attention` or `sliding_attention`."""
        kinds = getattr(self.language.module.config, "layer_types", None)
        return str(kinds[layer]) if kinds else "full_attention" if self.sliding_window() is None else "sliding_attention"

    @cached_property
    def with_keys(self) -> tuple[int, ...]:
        """LLM layers that have keys of their own in the cache: not those of linear attention, nor those that use the keys of earlier ones."""
        return tuple(i for i in range(self.llm_layers - self.shared) if not self.linear(i))

    def keys_of(self, layer: int) -> int:
        """The LLM layer whose keys a layer without its own uses: the last of its kind that has some."""
        return next(i for i in reversed(self.with_keys) if self.layer_kind(i) == self.layer_kind(layer))

    @cached_property
    def hybrid(self) -> bool:
        """Whether some LLM layers are recurrences."""
        return any(map(self.linear, range(self.llm_layers)))

    @cached_property
    def reads_positions(self) -> bool:
        """Whether the attention of the LLM must be given the position ids, beside the rotary table made of them (Ministral 3, Mistral 4)."""
        attention = getattr(self.language.blocks[self.with_keys[0]], "self_attn", None)
        needed = (keywords_of(attention) or {}).get("position_ids") if attention is not None else None
        return needed is not None and needed.default is needed.empty

    def position_ids(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns the position ids `(B, S)` of tokens as an argument of their attention, nothing where it has the rotary table alone."""
        return {"position_ids": ids} if self.reads_positions else {}

    @property
    def latent_keys(self) -> bool:
        """Whether the cache holds something that all heads make their keys and values of (DeepSeek's latent attention, Mistral 4)."""
        return bool(value_of(self.language.module.config, "kv_lora_rank"))

    @property
    def counted(self) -> int:
        """The LLM layer whose keys a cache counts as its length."""
        return self.with_keys[0]

    def linear(self, layer: int) -> bool:
        """Whether an LLM layer is a recurrence over the tokens, without keys and positions."""
        return "linear" in self.layer_kind(layer)

    def slides(self, layer: int) -> bool:
        """Whether an LLM layer sees a window of the last tokens only."""
        return "sliding" in self.layer_kind(layer)

    def window_mask(self, hidden: Tensor, real: Tensor, where: Tensor) -> Tensor:
        """The mask of a sliding-window layer whose distances count removed tokens, too.

        Args:
            hidden: `(B, S, D)`, whose tokens are the last S keys.
            real: `(B, keys)` bool.
            where: `(B, keys)` int64, logical column of every key.

        Returns:
            `(B, 1, S, keys)`, bool for SDPA, additive for eager attention.

        Raises:
            VtrError: the attention backend takes no such mask.
        """
        window, name = self.sliding_window() or 0, self.language.backend
        if name not in ("sdpa", "eager"):
            raise VtrError(
                f"vtr: the prompt is longer than the sliding window of {window}, where distances count removed tokens, and {name} takes no mask "
                "that says so; use attn_implementation='sdpa'"
            )
        length = hidden.shape[1]
        distance = where[:, -length:, None] - where[:, None]
        own = torch.eye(length, dtype=torch.bool, device=real.device)
        seen = real[:, None] & (distance >= 0) & (distance < window)
        seen[:, :, real.shape[1] - length :] |= own  # no row without a key
        return seen[:, None] if name == "sdpa" else additive(seen[:, None], hidden.dtype)

    def rotary(self, hidden: Tensor, ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """The rotary table `(cos, sin)` of positions `ids`, `(B, S)` or `(3 or 4, B, S)`, in layers of a kind, by the model's own module."""
        module, ids = self.language.module.rotary_emb, ids[-3:] if ids.ndim == 3 else ids  # of four kinds the first is that of the text
        return module(hidden, position_ids=ids, layer_type=kind) if takes_layer_type(module) else module(hidden, position_ids=ids)

    @cached_property
    def rotary_limit(self) -> int | None:
        """Positions beyond which rotary frequencies depend on the length of the prompt, None where they never do."""
        return rotary_limit(self.language.module.config)

    def new_cache(self) -> Any:
        """The cache that this model would make for itself."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.language.module.config)

    def sliding_window(self) -> int | None:
        """Window of the LLM's sliding-window layers, None when every layer sees everything."""
        config = self.language.module.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        slides = any("sliding" in k for k in kinds) if kinds else bool(getattr(config, "use_sliding_window", window is not None))
        return int(window) if window and slides else None


def value_of(config: Any, name: str) -> Any:
    """Returns a value of an LLM's configuration, None where there is none, or where it differs between layers (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # `AmbiguousGlobalPerLayerAttributeError` of transformers
        return None


@torch.no_grad()
def patch_norm(tower: nn.Module) -> float | None:
    """Euclidean norm of the weights of the first convolution in `tower`, the patch embedding; None where there is none with values."""
    weight = next((p for p in tower.parameters() if p.ndim == 4), None)
    return None if weight is None or weight.is_meta else float(torch.linalg.vector_norm(weight, dtype=torch.float32))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to logits so that only keys that are seen (bool) count: 0, and the least number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def closed_tower(name: str, reason: str) -> VtrError:
    """The refusal of a method that reads or shortens a tower which allows neither."""
    return VtrError(f"{name}: reads or shortens the vision tower, but {reason}; use a method that needs no tower, such as 'divprune'")


def pooled_tower(name: str, host: str) -> VtrError:
    """The refusal of a method that shortens a tower whose patches become tokens several at a time."""
    return VtrError(
        f"{name}: shortens the vision tower, but {host!r} makes each token of a video of several patches, which must all be there; use a method "
        "that acts behind the tower, such as 'divprune'"
    )


def feature_layers(asked: int | Sequence[int], count: int) -> tuple[int, ...]:
    """0-based tower layers, ascending, that transformers' `vision_feature_layer` names.

    Args:
        asked: indices into the hidden states, of which number 0 is the embedding: 1 is the output of layer 0, -1 that of the last layer.
        count: layers of the tower.
    """
    return tuple(sorted(v + count if v < 0 else v - 1 for v in ([asked] if isinstance(asked, int) else asked)))


def check_layer_kinds(name: str, config: Any, linear: bool = False) -> None:
    """Refuses an LLM with layers whose attention is neither full nor a sliding window, nor linear where that can be followed.

    Raises:
        VtrError: names the first such layer.
    """
    for i, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention", *(("linear_attention",) if linear else ())):
            raise VtrError(
                f"{name}: layer {i} of the LLM is of type {kind!r}, whose masks a removal cannot follow; use a model with full attention and "
                "sliding windows only"
            )


def with_frames(host: Host) -> Host:
    """Returns the host of a model that takes images, which are then the frames of one video per prompt.

    Raises:
        VtrError: it has videos of its own.
    """
    if host.has_video:
        raise VtrError(
            f"vtr.apply: {host.name!r} takes videos, got visuals='prompt', which makes one of all images; pass the frames as a video"
        )
    return replace(host, as_frames=True)


def one_video(host: Host, images: Sequence[Layout]) -> Layout:
    """Returns the images of one prompt as the frames of one video.

    Raises:
        VtrError: an image has several views.
    """
    try:
        return frames_of_one_video(images, tiles=host.tiles)
    except ValueError as error:
        ways = [f"{name}={value}" for name, value in host.one_view.items()]
        way = f"let the processor make one view of each ({', '.join(ways)}), or leave" if ways else "leave"
        raise VtrError(
            f"{host.name}: visuals='prompt' takes every image as a frame, but {error}; {way} it out (visuals='each': every frame is an image)"
        ) from error


def host_of(model: nn.Module) -> Any:
    """Returns the host of a model, a `Host` or the `DenseHost` of a ViT without an LLM; of a module that wraps one known model, that one's.

    Looked up by `model.config.model_type`, then by library and class.

    Raises:
        TypeError: not a torch module.
        VtrError: no host for this model type, several models inside a wrapper, or a model that is not built as its type says.
    """
    if not isinstance(model, nn.Module):
        raise WrongType(f"vtr.apply: model must be a torch module, got {type(model).__name__}; load it with from_pretrained first")
    inner = wrapped(model)
    if len(inner) > 1:
        raise VtrError(f"vtr.apply: {type(model).__name__} holds {len(inner)} models with a host ({', '.join(inner)}); give one of them")
    if inner:
        return host_of(next(iter(inner.values())))
    model_type = model_type_of(model)
    build = find_host(*names_of(model))
    if build is None:
        if model_type in NOT_HOSTED:
            raise VtrError(
                f"vtr.apply: {model_type!r} cannot be reduced: {NOT_HOSTED[model_type]}; docs/models.md lists the families that can"
            )
        known = list_hosts()
        near = closest(model_type, known) if model_type else ""
        raise VtrError(
            f"no host for {model_type or type(model).__name__!r}; known: {', '.join(known)}{near}; "
            f"register one with @vtr.register_host({model_type or 'model_type'!r})"
        )
    try:
        host = build(model)
    except AttributeError as error:
        raise VtrError(
            f"vtr.apply: {type(model).__name__} is not built as the host for {model_type or names_of(model)[0]!r} knows it: {error}; give the "
            "model itself if this is a wrapper, else register a host for it"
        ) from error
    base = getattr(host, "base", model)
    if base is not model and not any(module is base for module in model.modules()):
        raise VtrError(f"vtr.apply: {type(model).__name__} wraps a model that is not among its modules; give that model itself")
    return host
