"""HoliTom vectors (authors' code): windows and tokens in front of the LLM, in the authors' order, and the merge inside it."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import ReplayError, Vector, close, same_index, same_value
from scripts.replay._videos import authors_peaks, frames_of_tokens
from vtr.methods.holitom import authors_shares, blocks_of, holitom, windows_of
from vtr.ops.halving import merge_by_halves, nearest_kept
from vtr.ops.topk import topk_mask


def replay(vector: Vector) -> None:
    if vector.has("features", "attn", "out", "windows"):
        _outer(vector)
    elif vector.has("hidden", "attn_last_row", "out_hidden", "keep_indices"):
        _inner(vector)
    else:
        raise vector.unknown_schema()


def _outer(vector: Vector) -> None:
    if float(vector.param("D", 0)) or not vector.param("use_beta", True):
        raise ReplayError(f"holitom: only D = 0 and use_beta = true run, got {vector.param('D', 0)} and {vector.param('use_beta', True)}")
    frames = frames_of_tokens(vector["features"])
    windows, _ = windows_of(frames, float(vector.param("tau")), int(vector.param("max_window_size", 1024)))
    starts = windows.start[0].unique()
    same_index("windows", torch.stack([starts, windows.last[0, starts]], 1), vector["windows"])
    same_value("total_reduced", float(windows.gain[0]), float(vector.param("total_reduced")))
    same_index("static_counts", blocks_of(frames, windows)[1][0, starts], vector["static_counts"])
    shares, ratio = authors_shares(frames, windows, float(vector.param("retain_ratio")))
    close("adjusted_ratio", ratio[0], torch.tensor(float(vector.param("adjusted_ratio"))))
    beta, neighbours = float(vector.param("Beta")), int(vector.param("K"))
    found = holitom(frames, vector["attn"][None], windows, shares, beta, neighbours, least=1)
    kept, tokens, static = found.keep[0], found.tokens[0], windows.static[0]
    for first, last in vector["windows"].tolist():
        number = int(shares.static[0, first])
        if number > 0 and min(number, neighbours) < 3:
            place = static[first].nonzero()[:, 0]
            mean = vector["features"][first : last + 1, place].mean(0)
            kept[first, place] = False
            for centre, value in _clusters(mean, authors_peaks(mean, number, neighbours), beta):
                kept[first, place[centre]], tokens[first, place[centre]] = True, value
    pieces, sizes = [], []
    for first, last in vector["windows"].tolist():
        masks = [(t, kept[t]) for t in range(first, last + 1)]
        if vector.param("newline_mode") == "one_token":  # static tokens in front, then the frames
            masks = [(first, kept[first] & static[first]), *((t, mask & ~static[t]) for t, mask in masks)]
        rows = [row for t, mask in masks for row in _rows(tokens[t], mask, vector)]
        pieces += rows
        sizes.append(len(rows))
    same_index("segment_sizes", torch.tensor(sizes), vector["segment_sizes"])
    close("out", torch.stack(pieces), vector["out"])


def _clusters(tokens: Tensor, into: Tensor, beta: float) -> list[tuple[int, Tensor]]:
    """Returns the centre of each cluster of `tokens (n, D)` and its value; `into (n,)` is the centre of each token."""
    found = []
    for centre in into.unique().tolist():
        others = tokens[(into == centre) & (torch.arange(len(tokens)) != centre)]
        own = tokens[centre]
        found.append((centre, beta * own + (1 - beta) * others.mean(0) if len(others) else own))
    return found


def _rows(tokens: Tensor, mask: Tensor, vector: Vector) -> list[Tensor]:
    """Kept tokens of a frame in order; with newlines of a grid one behind every row that has a token."""
    if vector.param("newline_mode") == "one_token":
        return list(tokens[mask])
    found: list[Tensor] = []
    for row in range(len(mask) // int(vector.param("grid"))):
        place = slice(row * int(vector.param("grid")), (row + 1) * int(vector.param("grid")))
        own = list(tokens[place][mask[place]])
        found += [*own, vector["newline"]] if own else []
    return found


def _inner(vector: Vector) -> None:
    hidden, start, length = vector["hidden"], int(vector.param("image_token_start_index")), int(vector.param("image_token_length"))
    place = slice(start, start + length)
    tokens = hidden[:, place]
    keep = round(length * (1 - float(vector.param("r"))))
    real = torch.ones(1, length, dtype=torch.bool)
    mask = topk_mask(vector["attn_last_row"].mean(1)[:, place], real, torch.tensor([keep]))
    everything = torch.ones(1, hidden.shape[1], dtype=torch.bool)
    everything[:, place] = mask
    same_index("keep_indices", everything[0].nonzero()[:, 0], vector["keep_indices"])
    merged = hidden.clone()
    merged[:, place] = merge_by_halves(tokens, real, mask, nearest_kept(tokens, real, mask, keep))
    close("out_hidden", merged[everything][None], vector["out_hidden"])
