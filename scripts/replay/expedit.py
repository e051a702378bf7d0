"""Replays Expedit's vectors: one grid clustered as a whole (`centers`), or by attention windows (`clustered_grid`)."""

from __future__ import annotations

from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.ops.clusters import cell_means, cluster, hard_labels, home_cells
from vtr.ops.reconstruct import reconstruct, reconstruction
from vtr.ops.windows import from_windows, to_windows

NORMALIZED = {"reconstructed": "l2", "reconstructed_sumnorm": "sum"}


def replay(vector: Vector) -> None:
    """Centres, labels and both reconstructions.

    Raises:
        ReplayError: an unknown schema, or a difference.
    """
    if vector.has("tokens", "clustered_grid"):
        _windows(vector)
    elif vector.has("tokens", "centers"):
        _grid(vector)
    else:
        raise vector.unknown_schema()


def _grid(vector: Vector) -> None:
    tokens, grid, clusters = vector["tokens"], _sides(vector, "H", "W"), _sides(vector, "h", "w")
    if vector.has("init_centers"):
        close("init_centers", cell_means(tokens, grid, clusters), vector["init_centers"])
    if vector.has("init_label_map"):
        same_index("init_label_map", home_cells(grid, clusters).expand(len(tokens), -1), vector["init_label_map"])
    centres = cluster(tokens, grid, clusters, **_settings(vector))
    close("centers", centres, vector["centers"])
    labels = hard_labels(tokens, centres)
    if vector.has("hard_labels"):
        same_index("hard_labels", labels, vector["hard_labels"])
    if vector.has("reconstructed_naive"):
        naive = vector["refined"].gather(1, labels[..., None].expand(-1, -1, tokens.shape[2]))
        close("reconstructed_naive", naive, vector["reconstructed_naive"])
    _reconstructions(vector, tokens, centres, vector["refined"] if vector.has("refined") else None)


def _windows(vector: Vector) -> None:
    tokens, window = vector["tokens"], int(vector.param("window_size"))
    height, width = tokens.shape[1:3]
    count = (-(-height // window), -(-width // window))
    side = round(int(vector.param("clusters_per_window")) ** 0.5)
    cut = to_windows(tokens, window)
    centres = cluster(cut, (window, window), (side, side), **_settings(vector))
    close("clustered_grid", from_windows(centres, count), vector["clustered_grid"])
    if vector.has("hard_labels"):
        same_index("hard_labels", hard_labels(cut, centres), vector["hard_labels"])
    refined = to_windows(vector["refined"], side) if vector.has("refined") else None
    _reconstructions(vector, cut, centres, refined, (count, (height, width)))


def _reconstructions(
    vector: Vector, tokens: Tensor, centres: Tensor, refined: Tensor | None, windows: tuple[tuple[int, int], tuple[int, int]] | None = None
) -> None:
    for name, normalize in NORMALIZED.items():
        if refined is None or not vector.has(name):
            continue
        weights = reconstruction(
            tokens,
            centres,
            tau=float(vector.param("tau")),
            neighbours=int(vector.param("k")),
            normalize="l2" if normalize == "l2" else "sum",
        )
        full = reconstruct(weights, refined)
        close(name, full if windows is None else from_windows(full, *windows), vector[name])


def _sides(vector: Vector, rows: str, cols: str) -> tuple[int, int]:
    return int(vector.param(rows)), int(vector.param(cols))


def _settings(vector: Vector) -> dict:
    return {"tau": float(vector.param("tau")), "iterations": int(vector.param("n_iters")), "window": int(vector.param("window"))}
