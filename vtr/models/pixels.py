"""How many pixels a processor gives an image, or a frame of a video, where that is a choice: with them goes the number of visual tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vtr.hosts._protocol import Host
from vtr.types.errors import WrongValue


FRAMES_LIKE_IMAGES = ("qwen2_vl", "qwen2_5_vl")
"""Hosts whose video processor limits the pixels of every frame; those of the others limit a whole video."""


def _check_order(least: int | None, most: int | None) -> None:
    if least is not None and most is not None and least > most:
        raise WrongValue(f"min_pixels: must be at most max_pixels, got {least} and {most}; change one of them")


@dataclass(frozen=True)
class PixelLimits:
    """The fewest and the most pixels of an image behind the processor; None leaves what the processor has."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if value < 1:
                raise WrongValue(f"{name}: must be at least 1, got {value}")
        _check_order(self.min_pixels, self.max_pixels)

    @property
    def given(self) -> dict[str, int]:
        """The limits that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


OWN_LIMITS = PixelLimits()
"""Those of the processor."""


def check_limits(host: Any, limits: PixelLimits) -> None:
    """Refuses limits where the processor of a model has none, or none that is so small.

    Args:
        host: of the model.
        limits: what is asked for.

    Raises:
        ValueError: naming the limit and the way out.
    """
    if not limits.given or getattr(host, "pixel_limits", None) is not None:
        return
    budgets = getattr(host, "token_budgets", None)
    if not budgets:
        name, value = next(iter(limits.given.items()))
        other = ", or give the method 'resize' a budget" if isinstance(host, Host) and "input" in host.stages else ""
        raise WrongValue(f"{name}: the processor of {host.name!r} has no such limit, got {value}; leave it out{other}")
    if limits.min_pixels is not None:
        raise WrongValue(
            f"min_pixels: the processor of {host.name!r} brings every image to the size of a budget, got {limits.min_pixels}; give max_pixels alone"
        )
    if limits.max_pixels is not None and limits.max_pixels < min(budgets):
        known = ", ".join(f"{pixels} ({tokens} tokens)" for pixels, tokens in budgets.items())
        raise WrongValue(
            f"max_pixels: the processor of {host.name!r} has budgets of its own, got {limits.max_pixels}, below the smallest; give one of {known}"
        )


def budget_within(host: Any, limits: PixelLimits) -> int | None:
    """Returns the largest budget of visual tokens that limits allow, where the processor of a model has a few; None where it is left as it is.

    Args:
        host: of the model.
        limits: what is asked for, checked.
    """
    most = limits.max_pixels
    return max(tokens for pixels, tokens in host.token_budgets.items() if pixels <= most) if host.token_budgets and most else None


def limit_pixels(host: Any, processor: Any, limits: PixelLimits) -> None:
    """Changes the limits of a processor, for images and, where that is possible, for frames of videos.

    Args:
        host: of its model.
        processor: or image processor; changed in place.
        limits: what is asked for.

    Raises:
        ValueError: it has no such limits or none so small, or the fewest pixels would be more than the most.
    """
    check_limits(host, limits)
    if not limits.given:
        return
    budget = budget_within(host, limits)
    if budget is not None:
        getattr(processor, "image_processor", processor).max_soft_tokens = budget
        return
    videos = getattr(processor, "video_processor", None) if host.name in FRAMES_LIKE_IMAGES else None
    for settings in filter(None, (getattr(processor, "image_processor", processor), videos)):
        least, most = _known(settings, host)
        if settings is videos and limits.max_pixels:
            least = min(least, limits.max_pixels)  # its own is for large frames
        least, most = limits.min_pixels or least, limits.max_pixels or most
        _check_order(least, most)
        settings.size = dict(zip(host.pixel_limits, (least, most), strict=True))


def check_frame_limits(host: Any, limits: PixelLimits) -> None:
    """Refuses limits of pixels for videos that a processor limits as a whole only.

    Args:
        host: of the model.
        limits: what is asked for.

    Raises:
        ValueError: naming the limit and the way out.
    """
    if limits.given and host.has_video and host.name not in FRAMES_LIKE_IMAGES:
        name, value = next(iter(limits.given.items()))
        raise WrongValue(f"{name}: the processor of {host.name!r} limits whole videos and no frames, got {value}; leave it out, or make the frames smaller")


def pixels_of(host: Any, processor: Any) -> tuple[int, int] | None:
    """Returns the fewest and the most pixels that a processor gives an image, None where it has no such limits."""
    return None if host.pixel_limits is None else _known(getattr(processor, "image_processor", processor), host)


def _known(settings: Any, host: Any) -> tuple[int, int]:
    size = dict(settings.size)
    least, most = (size[name] for name in host.pixel_limits)
    return least, most
