"""What each family of models can and cannot do, asked of small models of the real classes: docs/models.md and the README's table."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import vtr
from vtr.hosts._not_hosted import NOT_HOSTED
from vtr.hosts._protocol import Host
from vtr.hosts._towers import JoinedTower, PackedTower
from vtr.markdown import markdown_table
from vtr.registry import create_method, method_class
from vtr.testing.tiny_models import model_of

ROWS: dict[str, tuple[str, ...]] = {
    "LLaVA-1.5": ("llava", "llava_siglip"),
    "LLaVA-NeXT (1.6)": ("llava_next", "llava_next_siglip"),
    "LLaVA-NeXT-Video": ("llava_next_video",),
    "LLaVA-OneVision": ("llava_onevision",),
    "Qwen2-VL": ("qwen2_vl",),
    "Qwen2.5-VL": ("qwen2_5_vl",),
    "Qwen3-VL, dense and MoE": ("qwen3_vl", "qwen3_vl_moe"),
    "Qwen3.5, dense and MoE": ("qwen3_5", "qwen3_5_moe"),
    "GLM-4.1V, GLM-4.5V (MoE)": ("glm4v", "glm4v_moe"),
    "InternVL 2.5, 3, 3.5": ("internvl",),
    "SmolVLM, Idefics 3": ("smolvlm", "idefics3"),
    "Mistral 3, Ministral 3": ("mistral3", "ministral3"),
    "Pixtral (in LLaVA)": ("llava_pixtral",),
    "Gemma 3": ("gemma3",),
    "Gemma 4": ("gemma4",),
    "Gemma 4 E2B, E4B": ("gemma4_small",),
    "Gemma 4, encoder-free": ("gemma4_unified",),
}
"""Name -> kinds of `vtr.testing.tiny_models.FAMILIES`, the first of which is asked."""


def image_of(host: Host) -> str:
    """Returns what an image is to the LLM, in words."""
    joins = "" if host.tower.joins == 1 else f", {host.tower.joins} patches a token"
    if host.anyres:
        return "thumbnail and crops, newline tokens" + joins
    if host.tiles or host.runs:
        return "tiles of one size" + joins
    return ("a grid of its own" if host.tower.patch_grid is None else "one view") + joins


def video_of(host: Host) -> str:
    """Returns what a frame of a video is to the LLM, in words."""
    if not host.has_video:
        return "-"
    if host.pooling is None:
        return "two frames a grid of their own"
    rows, cols = host.tower.patch_grid or (0, 0)
    where = "behind" if host.pooling.behind_projector else "in front of"
    return f"{rows} x {cols} patches a frame pooled to {host.pooling.grid[0]} x {host.pooling.grid[1]} {where} the projector"


def tower_of(host: Host) -> str:
    """Returns how the vision tower is entered, in words."""
    if host.closed:
        return f"not entered: {host.closed}"
    kind = "one sequence" if isinstance(host.tower, PackedTower) else "joined views" if isinstance(host.tower, JoinedTower) else "views"
    return kind + (", CLS" if host.has_cls else "")


def llm_of(host: Host) -> str:
    """Returns what is special about the LLM, in words."""
    kinds = sorted({host.layer_kind(i).removesuffix("_attention") for i in range(host.llm_layers)})
    found = [" and ".join(kinds) + " attention"]
    found += ["images see themselves"] * host.bidirectional + ["features behind its first layers"] * (host.beside is not None)
    found += ["late layers share keys"] * bool(host.shared) + ["positions are kept"] * (not host.renumber)
    return ", ".join(found)


def refusals(host: Host, model: Any) -> dict[str, list[str]]:
    """Returns the methods of the registry that this family cannot run, by reason."""
    found = defaultdict(list)
    for name in vtr.list_methods():
        cls = method_class(name)
        if not cls.__module__.startswith("vtr.methods.") or (cls.card.needs_video and not host.has_video):
            continue
        settings: dict[str, Any] = {"keep_ratio": 0.5} if cls.takes_budget else {}
        settings |= cls.timed_settings(host.llm_layers)
        try:
            scores: Any = [] if cls.card.needs_frame_scores else None
            vtr.plan(model, create_method(name, **settings), question="", frame_scores=scores)
        except (vtr.VtrError, ValueError) as error:
            found[str(error).removeprefix(f"{name}: ").removeprefix("vtr.apply: ")].append(name)
    return dict(found)


def families_line() -> str:
    """Returns the families that are hosted in a sentence, and in another one those of videos."""
    videos = [name for name, kinds in ROWS.items() if vtr.host_of(model_of(kinds[0])).has_video]
    return f"{'; '.join(ROWS)}. With videos: {'; '.join(videos)}."


def families_table() -> str:
    """Returns the table of hosted families as markdown."""
    body = []
    for name, kinds in ROWS.items():
        models = [model_of(kind) for kind in kinds]
        host, types = vtr.host_of(models[0]), dict.fromkeys(f"`{model.config.model_type}`" for model in models)
        inside = [video_of(host), tower_of(host), llm_of(host)]
        body.append([name, ", ".join(types), image_of(host), *inside, ", ".join(host.stages)])
    return markdown_table(["family", "model types", "an image", "a video (tiny model)", "vision tower", "LLM", "stages"], body)


def methods_tables() -> str:
    """Returns, per family, the methods that are refused and why, as markdown."""
    parts = []
    for name, kinds in ROWS.items():
        model = model_of(kinds[0])
        refused = refusals(vtr.host_of(model), model)
        lines = [f"- {', '.join(f'`{method}`' for method in methods)}: {reason}" for reason, methods in refused.items()]
        parts.append(f"### {name}\n\n" + ("\n".join(lines) if lines else "Every method runs."))
    return "\n\n".join(parts)


def not_hosted_table() -> str:
    """Returns the table of families that cannot be hosted as markdown."""
    return markdown_table(
        ["model type", "why it cannot be reduced"], [[f"`{name}`", reason] for name, reason in sorted(NOT_HOSTED.items())]
    )
