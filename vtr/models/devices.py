"""The CUDA devices that a model is spread over, and waiting for all of them."""

from __future__ import annotations

from typing import Any

import torch


def cuda_devices(place: Any) -> list[torch.device]:
    """Returns the CUDA devices of a model, its first one first; of a `torch.device` that device itself; nothing on the CPU.

    Args:
        place: a model, also one that `device_map` spread over several devices or keeps on the CPU between its layers, or a `torch.device`.
    """
    if isinstance(place, torch.device):
        found = [place]
    else:
        mapped = [torch.device(one) for one in (getattr(place, "hf_device_map", None) or {}).values() if one != "disk"]
        own = [place.device] if isinstance(getattr(place, "device", None), torch.device) else []
        found = [*own, *(parameter.device for parameter in place.parameters()), *mapped]
    return list(dict.fromkeys(device for device in found if device.type == "cuda"))


def synchronize(place: Any) -> None:
    """Waits for every device of a model, or for one device; nothing on the CPU."""
    for device in cuda_devices(place):
        torch.cuda.synchronize(device)
