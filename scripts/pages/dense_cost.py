"""What a reduction inside a dense ViT saves: multiply-adds, time and memory, interleaved with the full model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.bench.stopwatch import Stopwatch, choosing_in_process_time, clock_name, peak_bytes
from vtr.cost import GIGA, TransformerShape, clustering_flops, encoder_flops, matching_flops
from vtr.hosts._protocol import host_of
from vtr.markdown import markdown_table
from vtr.models.devices import synchronize
from vtr.ops.clusters import cluster, hard_labels, tiles_of
from vtr.ops.reconstruct import are_few
from vtr.ops.sharpness import LADDER, SKETCH, auto_tau
from vtr.reduction import reduced
from vtr.registry import method_from
from vtr.types.naming import FULL

Variant = tuple[str, dict[str, Any]]
"""Registry name and settings of a method; `full` without settings is the model as it is."""


class DenseShape(NamedTuple):
    """A timm model with random weights, its input, and the clustering it is measured with."""

    architecture: str
    arguments: dict[str, Any]
    pixels: int
    settings: dict[str, Any]


SHAPES = {
    "vit-l-640": DenseShape("vit_large_patch16_224", {"img_size": 640}, 640, {"alpha": 10, "grid": (28, 28)}),
    "sam-l": DenseShape("samvit_large_patch16", {}, 1024, {"alpha": 6, "grid": (9, 9)}),
    "sam-h": DenseShape("samvit_huge_patch16", {}, 1024, {"alpha": 6, "grid": (9, 9)}),
    "tiny": DenseShape("vit_tiny_patch16_224", {"img_size": 96, "depth": 4}, 96, {"alpha": 2, "grid": (4, 4)}),
}
"""Published for the first: 659.0 to 443.8 GFLOPs with its decoder, 6.55 to 9.51 images/s (arXiv 2210.01035)."""


class DenseCost(NamedTuple):
    """One variant: tokens at every block (prefix tokens excluded), multiply-adds of an image without the head (None where no formula
    fits), median milliseconds of a batch and of clustering or merging and restoring in it, images, and bytes at the peak of a batch."""

    variant: Variant
    tokens: list[int]
    gflops: float | None
    ms: float
    choosing_ms: float
    images: int
    peak_bytes: int

    @property
    def images_per_s(self) -> float:
        """Images per second."""
        return 1e3 * self.images / self.ms


def build(shape: DenseShape, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 0) -> tuple[Any, Tensor]:
    """Returns the model in eval mode and random pixels `(batch, 3, pixels, pixels)`."""
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(shape.architecture, pretrained=False, num_classes=0, **shape.arguments).to(device, dtype).eval()
    return model, torch.randn(batch, 3, shape.pixels, shape.pixels).to(device, dtype)


@torch.no_grad()
def measure(
    model: Any, pixels: Tensor, variants: Iterable[Variant], repeats: int = 3, advance: Callable[[], None] = lambda: None
) -> list[DenseCost]:
    """Times the full model and every variant in turn, `repeats` times over after a warm-up, then looks at memory.

    Args:
        model: a ViT with a host, or a module around one.
        pixels: one batch.
        variants: with `full` or without it, which comes first then.
        repeats: counted rounds.
        advance: called after every run.
    """
    variants = list(variants)
    if all(name != FULL for name, _ in variants):
        variants.insert(0, (FULL, {}))
    runs: list[list[tuple[float, float]]] = [[] for _ in variants]
    reports: list[Any] = [None] * len(variants)
    with choosing_in_process_time():
        for _ in range(repeats + 1):
            for n, (name, settings) in enumerate(variants):
                with nullcontext() if name == FULL else reduced(model, name, **settings) as reduction:
                    watch = Stopwatch(model)
                    watch.mark("start")
                    model(pixels)
                    watch.mark("end")
                    synchronize(model)
                    reports[n] = reduction.report() if reduction else None
                    runs[n].append((watch.ms("start", "end"), reports[n].choosing_ms if reduction else 0.0))
                advance()
    costs = []
    for variant, own, report in zip(variants, runs, reports, strict=True):
        with nullcontext() if report is None else reduced(model, variant[0], **variant[1]):
            peak = peak_bytes(lambda: model(pixels), model)
        advance()
        ms, choosing = (statistics.median(column) for column in zip(*own[1:], strict=True))
        vit = plain_vit(model)
        gflops = None if vit is None else flops(vit, pixels, report) / GIGA
        costs.append(DenseCost(variant, report.tokens_per_block if report else [], gflops, ms, choosing, len(pixels), peak))
    return costs


def plain_vit(model: Any) -> Any | None:
    """Returns the ViT of timm or the DINOv2 of transformers in which every block attends over all tokens, or None: windows need other formulas."""
    from timm.models import VisionTransformer

    return next((m for m in model.modules() if isinstance(m, VisionTransformer) or type(m).__name__ == "Dinov2Model"), None)


def flops(vit: Any, pixels: Tensor, report: Any | None) -> float:
    """Multiply-adds of one image through a plain ViT as it ran, clustering or matching and restoring included.

    Args:
        vit: from `plain_vit`.
        pixels: `(B, 3, h, w)`.
        report: of the reduction, None for the full model.
    """
    if hasattr(vit, "config"):
        config = vit.config
        patch, prefix = (config.patch_size, config.patch_size), 1
        sizes = (config.num_hidden_layers, config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.num_attention_heads)
    else:
        first, patch, prefix = vit.blocks[0], vit.patch_embed.patch_size, vit.num_prefix_tokens
        sizes = (len(vit.blocks), vit.embed_dim, first.mlp.fc1.out_features, first.attn.num_heads)
    layers, hidden, inner, heads = sizes
    shape = TransformerShape(
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp_matrices=2,
    )
    patches = (pixels.shape[-2] // patch[0]) * (pixels.shape[-1] // patch[1])
    values = pixels.shape[1] * patch[0] * patch[1]
    if report is None:
        return encoder_flops(shape, [patches + prefix] * shape.layers, patches, values)
    method = report.methods[0]
    lengths = [n + prefix for n in report.tokens_per_block]
    if any(step.at == "mlp" for step in method_from(method).steps(host_of(vit).geometry())):  # merges between attention and MLP
        merged = report.assignment[:1]
        left = [*report.tokens_per_block[1:], len(set(merged[0])) if merged else report.tokens_per_block[-1]]
        merging = [n for n, rest in zip(report.tokens_per_block, left, strict=True) if rest < n]
        return encoder_flops(shape, lengths, patches, values, [n + prefix for n in left]) + matching_flops(shape, merging)
    extra = 0.0
    if "iterations" in method:  # of a clustering
        tiles = tiles_of(report.grid, report.small_grid, method["window"], torch.device("cpu"))
        clusters = report.small_grid[0] * report.small_grid[1]
        compared, tried = tiles.bias.numel() / patches, len(LADDER) if method["tau"] == "auto" else 0
        some = method["neighbours"] if not method["compat"] and are_few(method["neighbours"], clusters) else None
        extra = clustering_flops(
            shape.hidden, patches, clusters, method["iterations"], compared, tried=tried, sketch=SKETCH, neighbours=some
        )
    return encoder_flops(shape, lengths, patches, values) + extra


def markdown(name: str, costs: Sequence[DenseCost], device: torch.device, dtype: torch.dtype) -> str:
    """Returns a table with the factor by which each variant is faster than the full model, and what choosing takes of its time."""
    full = next(cost for cost in costs if cost.variant[0] == FULL)
    said = (
        f"`{name}`, batch {full.images}, {str(dtype).removeprefix('torch.')}, random weights, {clock_name(device)}, "
        f"{torch.get_num_threads()} of them, torch {torch.__version__}:"
    )
    body = []
    for cost in costs:
        gflops = "" if cost.gflops is None else f"{cost.gflops:.1f}"
        own = ["", ""] if cost is full else [f"{cost.choosing_ms:.1f}", f"{100 * cost.choosing_ms / full.ms:.1f}"]
        body.append([label(cost.variant), gflops, f"{cost.ms:.0f}", f"{full.ms / cost.ms:.2f}", *own, f"{cost.peak_bytes / 2**20:.0f}"])
    head = ["variant", "GFLOPs", "ms", "factor", "clustering and restoring ms", "percent of full", "peak MiB"]
    return f"{said}\n\n{markdown_table(head, body)}"


def label(variant: Variant) -> str:
    """Returns a name such as `expedit alpha=10 grid=28x28`."""
    name, settings = variant
    words = [f"{k}={'x'.join(map(str, v)) if isinstance(v, (list, tuple)) else v}" for k, v in settings.items()]
    return " ".join([name, *words])


@torch.no_grad()
def cluster_labels(vit: Any, pixels: Tensor, alpha: int, grid: tuple[int, int], window: int = 5) -> Tensor:
    """Returns the nearest cluster of every token when clustering before block `alpha`, as `expedit` with tau="auto" clusters: `(B, N)` int64.

    Args:
        vit: timm's `VisionTransformer` without a reduction.
        pixels: `(B, 3, h, w)`.
        alpha, grid, window: as for `expedit`.
    """
    seen: list[Tensor] = []
    handle = vit.blocks[alpha].register_forward_pre_hook(lambda _block, args: seen.append(args[0][:, vit.num_prefix_tokens :]))
    try:
        vit(pixels)
    finally:
        handle.remove()
    patch = vit.patch_embed.patch_size
    full = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
    tau = auto_tau(seen[0], full, grid, window, torch.arange(len(pixels), device=pixels.device))
    return hard_labels(seen[0], cluster(seen[0], full, grid, tau=tau, window=window))
