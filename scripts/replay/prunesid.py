"""PruneSID vectors (authors' code): component weights as drawn -> groups, survivors, quotas and tokens; and the default beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.prunesid import group_quota, groups_of, mean_cosine, ordered, prunesid, suppress
from vtr.ops.parts import members

SORTED_ABOVE = 150  # tokens; ZhengyaoFang/PruneSID, the file for Qwen2-VL at 4ef17d9


def replay(vector: Vector) -> None:
    if not vector.has("component_weight", "group", "kept_order"):
        raise vector.unknown_schema()
    qwen = vector.has("tokens")
    if qwen:
        features, weight, score = vector["tokens"][None], vector["component_weight"][None], None
    else:
        features, weight, score = vector["hidden_states"][:, 1:], vector["component_weight"], vector["cls_attention"][..., 1:].sum(1)
        close("saliency", score, vector["saliency"])
    keep = int(vector.param("keep") if qwen else vector.param("keep_with_cls"))
    real = torch.ones(features.shape[:2], dtype=torch.bool)
    n, groups = features.shape[1], weight.shape[2]
    best = weight.max(2)
    group = best.indices
    same_index("group", group, vector["group"].view_as(group))

    unit = F.normalize(features.double(), dim=-1)
    rho = mean_cosine(unit, real)
    threshold = keep / 32 * rho
    if qwen:  # half of the matrix with its diagonal, over all of it
        threshold = max(18 * keep / n, 1) * (rho * (n - 1) / 2 + 1) / n
    ranked = suppress(unit, best.values if score is None else score, group, real, threshold)
    size = members(group, real, groups)
    left = (size & torch.zeros_like(real).scatter(1, ranked.order, ranked.survives)[:, None]).sum(-1)
    same_index("survivors", left, vector["survivors"].view_as(left))
    budget = torch.full((len(features),), keep)
    quota = group_quota(size.sum(-1), left, budget, budget if qwen else budget - 1, keep)
    same_index("quota", quota, vector["quota"].view_as(quota))
    order, chosen = ordered(ranked, group, real, quota)
    kept = order[chosen].view(len(features), -1)
    same_index("kept_order", _written(kept, qwen), vector["kept_order"].view(len(features), -1))

    if vector.param("exact_rank", False):
        same_index("exact components", _partition(groups_of(features, real, torch.full_like(budget, groups), groups)[0]), _partition(group))
    if vector.has("default_kept"):
        mask = prunesid(features, score, real, budget, keep)
        same_index("default_kept", mask.nonzero()[:, 1].view(len(features), -1), vector["default_kept"])


def _written(kept: Tensor, qwen: bool) -> Tensor:
    """Tokens as the released code writes them: CLS is 0 and patches begin at 1, or in position order where many stay on Qwen."""
    if qwen:
        return kept.sort().values if kept.shape[1] > SORTED_ABOVE else kept
    return torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1)


def _partition(group: Tensor) -> Tensor:
    """Which tokens are in one group, whatever the groups are called."""
    return group[:, :, None] == group[:, None]
