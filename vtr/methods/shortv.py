"""ShortV: skip the computation of visual tokens in LLM layers where it hardly matters.

Paper: Yuan et al., ICCV 2025, arXiv 2504.00502.
Code:  github.com/icip-cas/ShortV at 737c28c, Apache-2.0: nothing copied, checked against its layer classes.
Stage: prefill. Reads: nothing. Batch: any. Deterministic: yes.

1. A fixed list of layers is frozen for visual tokens; no token is removed and the KV cache keeps its size.
2. In a frozen layer visual tokens still give keys and values, computed from the hidden states they came with.
3. Queries, attention output and MLP run for text tokens only, at their original positions; visual rows leave as they came.
4. Decoding runs the ordinary layers.

Which layers: by rising Layer Contribution, the KL divergence of the answer's logits when one layer is frozen (`vtr calibrate shortv`).
The published lists were made with KL(frozen || full); newline tokens freeze with their image.

Paper to code: N -> first, LC -> vtr.calibrate.shortv.layer_contribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from vtr.registry import register_method
from vtr.types import Card, Freeze, Geometry, Layer, Method, Stage, Step, at_least, is_integer
from vtr.types.naming import closest


class Published(NamedTuple):
    """A list that comes with the toolkit: the model it is for (`host` and `shape` of its LLM), layers by rising contribution."""

    host: str
    shape: Mapping[str, int]
    layers: tuple[int, ...]


_VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}

_TINY = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4}

# icip-cas/ShortV at 737c28c, by rising contribution; 60 % of the layers each. The embedded checkpoints' by `vtr calibrate shortv --samples 40`
PUBLISHED: dict[str, Published] = {
    "llava-1.5-7b": Published("llava", _VICUNA_7B, (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)),
    "llava-1.5-13b": Published(
        "llava", _VICUNA_13B, (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17)
    ),
    "llava-next-7b": Published("llava_next", _VICUNA_7B, (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2)),
    "llava-next-13b": Published(
        "llava_next", _VICUNA_13B, (39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17)
    ),
    "tiny-llava": Published("llava", _TINY, (5, 4, 1, 2)),
    "tiny-llava-next": Published("llava_next", _TINY, (5, 4, 2, 1)),
}


def published_layers(geometry: Geometry) -> tuple[int, ...] | None:
    """The published list for a model of this host and LLM shape, or None."""
    for entry in PUBLISHED.values():
        if entry.host == geometry.host and all(geometry.text_config.get(name) == size for name, size in entry.shape.items()):
            return entry.layers
    return None


def read_layers(name: str) -> tuple[int, ...]:
    """Layers of a preset or of a YAML file: a list, or a mapping with the list under `layers`.

    Raises:
        ValueError: neither a preset nor a readable file with a list of integers.
    """
    if name in PUBLISHED:
        return PUBLISHED[name].layers
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"shortv: layers={name!r} is neither a preset nor a file{closest(name, list(PUBLISHED))}; give layer numbers, a preset "
            "or the YAML file that `vtr calibrate shortv` wrote"
        )
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"shortv: {name} is not a readable YAML file ({error}); write it with `vtr calibrate shortv`") from error
    found = content.get("layers") if isinstance(content, Mapping) else content
    return _checked(found, f"file {name}")


def _checked(layers: Any, source: str) -> tuple[int, ...]:
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not all(map(is_integer, layers)):
        raise ValueError(f"shortv: {source} must be a list of layer numbers, got {layers!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"shortv: {source} names a layer twice, got {list(layers)}; name each once")
    return tuple(layers)


FROZEN_SHARE = 0.6
"""Share of the layers that the paper's lists freeze."""


@register_method("shortv")
@dataclass(frozen=True, kw_only=True)
class ShortV(Method):
    """Freezes visual tokens in the published layers of the model, or in given ones. Has no budget: no token is removed."""

    layers: tuple[int, ...] | str | None = None
    first: int | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    card: ClassVar[Card] = Card(
        title="ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers",
        paper="Yuan et al., 2025",
        venue="ICCV 2025",
        arxiv="2504.00502",
        code="github.com/icip-cas/ShortV (Apache-2.0, not used)",
        signals="nothing (a list of layers, calibrated once per model)",
        cost="no choosing; KV cache and decoding keep their size",
        settings={
            "layers": "0-based layers to freeze, a preset (llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b) or a YAML file; "
            "None takes the published list of the model",
            "first": "use only so many of the list's layers, those that matter least; None uses the whole list",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", _checked(self.layers, "layers"))  # YAML and JSON hand in lists
        at_least(self, "first", 0)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        layers = self.frozen_layers(geometry)
        out = [layer for layer in layers if not 0 <= layer < geometry.llm_layers]
        if out:
            raise ValueError(
                f"shortv: layer {out[0]} is out of range: this LLM has {geometry.llm_layers} layers, 0 to {geometry.llm_layers - 1} "
                "(the paper counts from 0, too)"
            )
        return tuple(Freeze(Layer(layer)) for layer in sorted(layers))

    def frozen_layers(self, geometry: Geometry) -> tuple[int, ...]:
        """The layers to freeze, in the order of the list.

        Raises:
            ValueError: no list given and none published for this model, or fewer layers than `first`.
        """
        layers = read_layers(self.layers) if isinstance(self.layers, str) else self.layers
        if layers is None:
            layers = published_layers(geometry)
        if layers is None:
            size = f"{geometry.llm_layers} layers of width {geometry.text_config.get('hidden_size', 'unknown')}"
            raise ValueError(
                f"shortv: no published layer list for host {geometry.host!r} with {size}; run `vtr calibrate shortv` on this model and "
                f"give layers=FILE, or name the layers, or a preset ({', '.join(PUBLISHED)})"
            )
        if self.first is not None and self.first > len(layers):
            raise ValueError(
                f"shortv: first={self.first} is more than the {len(layers)} layers of the list; lower it or calibrate a longer list"
            )
        return layers if self.first is None else layers[: self.first]

    @classmethod
    def timed_settings(cls, llm_layers: int) -> dict[str, Any]:
        """Returns the paper's share of the layers, the last ones: which ones does not change times."""
        return {"layers": tuple(range(llm_layers - round(FROZEN_SHARE * llm_layers), llm_layers))}

    @classmethod
    def identity(cls, n: int) -> Method:
        """No frozen layer."""
        return cls(layers=())
