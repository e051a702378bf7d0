"""Replays of settings that no vector at hand has, on vectors made here by the cards, token by token in float64."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.replay import Vector


def replay(method: str, tensors: dict[str, Tensor], params: dict[str, Any]) -> None:
    with torch.no_grad():
        importlib.import_module(f"scripts.replay.{method}").replay(Vector(Path("here"), method, tensors, params))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))


def best(score: Tensor, count: int) -> list[int]:
    return score.argsort(descending=True, stable=True)[:count].tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_weight_of_holovs_variance(alpha: float) -> None:
    attention = noise(1, 2, 13).mul(2).softmax(2)
    score = attention[..., 1:].mean(1)
    crops = 1000 * (1 + alpha) * score.view(3, 4).mean(1)
    share = crops / (crops.sum() + 1e-6) * 5
    quota = share.floor().long()
    quota[best(crops, 5 - int(quota.sum()))] += 1
    order = [4 * c + n for c, count in enumerate(quota.tolist()) for n in best(score[0, 4 * c : 4 * c + 4], count)]
    tensors = {"features": noise(1, 12, 8, seed=1), "cls_attention": attention, "score": score, "crop_score": crops[None]}
    replay("holov", {**tensors, "quota": quota[None], "kept_order": torch.tensor([order])}, {"crops": 3, "keep": 5, "alpha": alpha})


def test_the_quotas_of_holovs_paper_are_compared() -> None:
    score, features = noise(1, 12).softmax(1), noise(1, 12, 8, seed=1)
    share = score.view(3, 4).mean(1) / score.mean() / 3 * 4
    quota = share.floor().long()
    quota[best(share, 4 - int(quota.sum()))] += 1
    kept = sorted(4 * c + n for c, count in enumerate(quota.tolist()) for n in best(score[0, 4 * c : 4 * c + 4], count))
    tensors = {"features": features, "score": score, "quota": quota[None], "kept": torch.tensor([kept])}
    params = {"crops": 3, "keep": 4, "rule": "attention"}
    replay("holov", tensors, params)
    with pytest.raises(AssertionError, match="quota"):
        replay("holov", {**tensors, "quota": quota.roll(1)[None]}, params)


def turned(row: Tensor, place: int) -> Tensor:
    """The rotary embedding of one head."""
    half = len(row) // 2
    angle = place * 10000.0 ** (-torch.arange(half).double() / half)
    return torch.cat([row[:half] * angle.cos() - row[half:] * angle.sin(), row[half:] * angle.cos() + row[:half] * angle.sin()])


def layer(length: int, heads: int, groups: int, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states and weights of an LLM layer with fewer heads for keys; its attention `(length, length)`, mean over heads."""
    hidden, scale = noise(1, length, 16), noise(16, seed=1).exp()
    weights = {"q_weight": noise(heads * width, 16, seed=2), "k_weight": noise(groups * width, 16, seed=3)}
    normed = hidden[0].double() / (hidden[0].double().square().mean(1, keepdim=True) + 1e-5).sqrt() * scale.double()
    query, key = (normed @ weights[name].double().T for name in ("q_weight", "k_weight"))
    rows = torch.full((heads, length, length), -torch.inf, dtype=torch.float64)
    for head in range(heads):
        own = head // (heads // groups)
        for asks in range(length):
            asked = turned(query[asks, head * width : (head + 1) * width], asks)
            for place in range(asks + 1):
                rows[head, asks, place] = asked @ turned(key[place, own * width : (own + 1) * width], place) / width**0.5
    return {"hidden": hidden, "ln_weight": scale, **weights}, rows.softmax(2).mean(0)


def test_vscan_with_fewer_heads_for_keys() -> None:
    length, start, number, keep = 11, 2, 6, 3
    tensors, rows = layer(length, 4, 2, 4)
    kept = sorted(start + n for n in best(rows[-1, start : start + number], keep))
    index = torch.tensor([n for n in range(length) if not start <= n < start + number or n in kept])
    tensors |= {"kept_abs": index[None], "new_hidden": tensors["hidden"][:, index], "new_position_ids": torch.arange(len(index))[None]}
    params = {"image_start": start, "image_tokens": number, "keep": keep, "num_heads": 4, "num_kv_heads": 2, "rms_eps": 1e-5}
    replay("vscan", tensors, params)


def test_transprune_with_fewer_heads_for_keys() -> None:
    length, start, number, keep = 11, 2, 6, 3
    tensors, rows = layer(length, 4, 2, 4)
    asked, moved = rows[start + number :, start : start + number], noise(2, length, seed=4).exp()
    own = moved.double().sum(0)[start : start + number]
    parts = [part / (part.sum() + 1e-8) for part in (asked.mean(0), own)]
    kept = torch.tensor(sorted(start + n for n in best(parts[0] + parts[1], keep)))
    index = torch.tensor([n for n in range(length) if not start <= n < start + number or n in kept])
    tensors |= {"ttv_layers": moved, "iga_rows": asked, "iga": parts[0], "ttv_accum": parts[1], "score": parts[0] + parts[1]}
    tensors |= {"kept_abs": kept, "new_hidden": tensors["hidden"][:, index], "new_position_ids": torch.arange(len(index))[None]}
    params = {"image_start": start, "image_tokens_current": number, "keep": keep, "num_heads": 4, "num_kv_heads": 2}
    replay("transprune", {**tensors, "ttv_layers_after": moved[:, index]}, params)


def test_pyramiddrop_beside_a_prompt_without_an_image() -> None:
    length, start, number, keep = 9, 1, 5, 2
    tensors, rows = layer(length, 2, 2, 4)
    score = rows[-1, start : start + number]
    kept = torch.tensor(sorted(best(score, keep)))
    index = torch.tensor([n for n in range(length) if not start <= n < start + number or n - start in kept])
    other, there = noise(1, length, 16, seed=7), torch.ones(2, length, dtype=torch.bool)
    there[1, 6:] = False
    hidden = torch.cat([tensors["hidden"], other])
    inputs = {"hidden_states": hidden, "rms_weight": tensors["ln_weight"], "q_weight": tensors["q_weight"], "k_weight": tensors["k_weight"]}
    inputs |= {"position_ids": torch.arange(length).expand(2, -1), "attention_mask": there, "image_score0": score, "kept_in_image0": kept}
    after = {"new_hidden": torch.stack([hidden[0, index], hidden[1, : len(index)]]), "new_position_ids": torch.arange(6).expand(2, -1)}
    params = {
        "ratios": [0.4],
        "stage": 0,
        "image_positions": [start, -1],
        "image_tokens_in": [number, 0],
        "image_tokens_original": [number, 0],
    }
    replay("pyramiddrop", {**inputs, **after}, {**params, "heads": 2, "rms_eps": 1e-5})


def test_todre_down_to_the_last_token() -> None:
    """The gaps of late picks are below what float32 resolves."""
    tokens = noise(150, 16) + 40
    unit = tokens.double() / tokens.double().norm(dim=1, keepdim=True)
    order, total, sums = [7], unit @ unit[7], [torch.nan]
    for _ in range(148):
        total[order] = torch.inf
        order.append(int(total.argmin()))
        sums.append(float(unit[order[-1]] @ unit[order[:-1]].sum(0)))
        total = unit @ unit[order].sum(0)
    attention = (torch.arange(150) == 7).float()
    chosen = torch.tensor(order)
    tensors = {"tokens": tokens, "cls_attention": attention, "selected_order": chosen, "selected_sorted": chosen.sort().values}
    replay("todre", {**tensors, "cumulative_similarity_at_pick": torch.tensor(sums, dtype=torch.float64)}, {"k": 149})


def test_v2drop_ranks_every_prompt_as_the_first() -> None:
    before, now = noise(2, 8, 4), noise(2, 8, 4, seed=1)
    variation = (now - before)[:, 2:7].norm(dim=2)
    kept = torch.tensor([0, 1, *sorted(2 + n for n in best(variation[0], 2)), 7])
    tensors = {"hidden_prev_0": before, "hidden_in_0": now, "keep_index_0": kept, "hidden_out_0": now[:, kept]}
    tensors |= {"position_ids_0": kept[None], "image_tokens_0": torch.tensor([5, 2])}
    for found in (variation, variation[0]):
        replay("v2drop", {**tensors, "variation_0": found}, {"keep_ratio": [0.4], "image_start": 2})


def test_dycokes_floor_of_a_float_product() -> None:
    features = noise(60, 8)
    frames = features.view(6, 10, 8)  # 1 - 0.9 is below 0.1, so that nothing of a frame of 10 is left
    index = torch.cat([torch.arange(10), torch.arange(40, 50)])
    assert int((1 - 0.9) * 10) == 0 and len(frames) == 6
    replay(
        "dycoke",
        {"features": features, "indices": index, "out": features[index]},
        {"num_frames": 6, "num_tokens_per_frame": 10, "merging_ratio": 0.9},
    )


def test_dycoke_prunes_nothing_but_says_so() -> None:
    tensors = {
        "attn_0": noise(1, 2, 1, 5).softmax(3),
        "keep_0": torch.arange(5),
        "similarity": torch.zeros(1),
        "pruned": torch.tensor([True]),
    }
    replay("dycoke", tensors, {"image_token_start_index": 1, "image_token_length": 3, "dycoke_p": 0.0, "similarity_threshold": 0.9})


def test_holitoms_longest_window() -> None:
    features = (noise(1, 4, 8) + 0.01 * noise(5, 4, 8, seed=1)).contiguous()  # nothing moves
    windows = [(0, 1), (2, 3), (4, 4)]  # of at most two frames; of equally good cuts the one whose last window is shortest
    tokens = [*features[:2].mean(0), *features[2:4].mean(0), *features[4]]
    params = {
        "tau": 0.8,
        "retain_ratio": 1.0,
        "Beta": 0.6,
        "K": 7,
        "newline_mode": "one_token",
        "total_reduced": 8.0,
        "adjusted_ratio": 1.0,
    }
    tensors = {"features": features, "attn": torch.ones(5, 4), "windows": torch.tensor(windows), "static_counts": torch.tensor([4, 4, 0])}
    tensors |= {"segment_sizes": torch.tensor([4, 4, 4]), "out": torch.stack(tokens)}
    replay("holitom", tensors, {**params, "max_window_size": 2})
    with pytest.raises(AssertionError, match="windows"):
        replay("holitom", tensors, params)
    for other in ({"D": 0.5}, {"use_beta": False}):
        with pytest.raises(AssertionError, match="only D = 0"):
            replay("holitom", tensors, {**params, **other})


def test_holitoms_density_by_two_neighbours() -> None:
    """The nearest two tokens are equally dense, and none of them counts as denser: both become centres, whatever lies far away."""
    places = torch.tensor([[0.0, 0.9], [0.1, 0.9], [0.8, 0.9], [0.85, 2.0]])
    features = places.expand(2, -1, -1).contiguous()
    third = 0.6 * places[1] + 0.4 * places[2:].mean(0)
    tensors = {"features": features, "attn": torch.ones(2, 4), "windows": torch.tensor([[0, 1]]), "static_counts": torch.tensor([4])}
    tensors |= {"segment_sizes": torch.tensor([2]), "out": torch.stack([places[0], third])}
    params = {
        "tau": 0.8,
        "retain_ratio": 0.25,
        "Beta": 0.6,
        "K": 7,
        "newline_mode": "one_token",
        "total_reduced": 4.0,
        "adjusted_ratio": 0.5,
    }
    replay("holitom", tensors, params)


def test_fastvid_without_context_tokens() -> None:
    hidden, attention = noise(1, 3 * 6 + 3, 8), noise(3, 6, seed=1).softmax(1)
    salient = [sorted(best(row, 2)) for row in attention]
    video = [1 + 6 * t + n for t, row in enumerate(salient) for n in row]
    density = []
    for t, row in enumerate(salient):
        left = [hidden[0, 1 + 6 * t + n].double() for n in range(6) if n not in row]
        away = torch.tensor([[float((x - y).norm()) / math.sqrt(8) for y in left] for x in left], dtype=torch.float64)
        dense = (-away.sort(1).values[:, :3].square().mean(1)).exp()
        apart = [min([float(away[i, j]) for j in range(4) if dense[j] > dense[i]], default=float(away.max())) for i in range(4)]
        density.append(dense * torch.tensor(apart))
    index = torch.tensor([0, *video, 19, 20])
    tensors = {"hidden_states": hidden, "frame_attn": attention, "frame_global": noise(3, 8, seed=2), "keep_indices": index}
    tensors |= {"segment_sizes": torch.ones(3), "anchors_per_frame": torch.zeros(3), "salient_idx": torch.tensor(salient)}
    tensors |= {"density_score": torch.stack(density), "out_hidden": hidden[:, index]}
    params = {"video_start": 1, "video_len": 18, "num_frames": 3, "DySeg_tau": 2.0, "DySeg_c": 1, "STPrune_d": 0.4, "DTM_p": 4}
    replay("fastvid", tensors, {**params, "retention_ratio": 0.34, "DTM_beta": 0.6, "density_knn": 3})
