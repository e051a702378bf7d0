"""Recipes: one YAML file per checkpoint that people use, with what has to be known before it is downloaded.

Looked for in `./models` first, then in the copies installed with the package, then beside a source checkout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vtr.recipes import shared_folders, yaml_of
from vtr.types.naming import closest
from vtr.types.errors import WrongValue


VIDEO = {
    "frames": "how many frames papers show",
    "per_frame": "visual tokens of a frame",
    "joins": "frames that become one view together (1); these tokens are then shared among them",
    "of": "`[height, width]` of the frames that `per_frame` is assumed for, where it follows from their size",
    "most": "visual tokens of a whole video at most, where there is such a limit",
}
"""Keys of `tokens.video`: `frames` and `per_frame`, and those that apply."""


@dataclass(frozen=True)
class Recipe:
    """Facts about one checkpoint.

    Args:
        name: file name without `.yaml`; what `--model` takes.
        hub_id: Hugging Face id, or a folder relative to the recipe for a checkpoint that comes with the repository.
        host: `config.model_type`, which chooses the host.
        dtype: as which the weights are stored.
        licence: of the weights.
        memory_gib: weights alone in `dtype`, in GiB (2^30 bytes); activations and KV cache come on top.
        image: image settings of the processor: `patch` in pixels, `size` where every view has one, `min_pixels` and `max_pixels` where it has
            such limits, `fit` in words.
        tokens: token geometry: `most` visual tokens of an image, `least` where that is known, `most_views`, `newlines`, `joins` patches to a token
            (1); where all views are alike their `patch_grid` of tokens and `per_view` tokens; of a model with videos `video`, see `VIDEO`.
        prompt: the template, `{question}` filled in; the processor's own chat template is what is used. Empty without an LLM, and where it is not
            known here.
        revision: pinned commit on the hub; None = the newest.
        notes: remarks for `vtr models`.
        config: how the checkpoint's config differs from the host's default one, where that is known; plans can then be checked before it is here.
        settings: what was calibrated for the checkpoint, method -> settings (`vtr calibrate expedit --out RECIPE`).
        file: where the recipe was read from.
    """

    name: str
    hub_id: str
    host: str
    dtype: str
    licence: str
    memory_gib: float
    image: dict[str, Any]
    tokens: dict[str, Any]
    prompt: str = ""
    revision: str | None = None
    notes: str = ""
    config: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    file: Path = field(default=Path(), compare=False)

    @property
    def source(self) -> str:
        """What to load: an absolute folder for an embedded checkpoint, else the hub id."""
        beside = self.file.parent / self.hub_id
        return str(beside.resolve()) if beside.is_dir() else self.hub_id


def load_recipe(path: str | Path) -> Recipe:
    """Reads one recipe file.

    Raises:
        ValueError: not YAML, an unknown or missing key (with the closest names).
    """
    path = Path(path)
    try:
        content = yaml_of(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongValue(f"recipe {path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise WrongValue(f"recipe {path}: must be a mapping of keys, got {type(content).__name__}")
    known = [f.name for f in fields(Recipe) if f.name not in ("file", "name")]
    for key in content:
        if key not in known:
            raise WrongValue(f"recipe {path}: unknown key {key!r}{closest(str(key), known)}")
    needed = [f.name for f in fields(Recipe) if f.default is MISSING and f.default_factory is MISSING and f.name != "name"]
    missing = [key for key in needed if key not in content]
    if missing:
        raise WrongValue(f"recipe {path}: keys missing: {', '.join(missing)}")
    video = (content["tokens"] or {}).get("video", {"frames": 1, "per_frame": 1})
    if not isinstance(video, dict) or not {"frames", "per_frame"} <= set(video) <= set(VIDEO):
        got = ", ".join(video) if isinstance(video, dict) else type(video).__name__
        raise WrongValue(f"recipe {path}: tokens.video must have frames, per_frame and no others than {', '.join(VIDEO)}, got {got}")
    return Recipe(name=path.stem, file=path.resolve(), **content)


def with_settings(text: str, method: str, settings: Mapping[str, Any]) -> str:
    """Returns the text of a YAML file with `settings` of a method under its key `settings`; everything outside that key stays as it is written.

    Raises:
        ValueError: not a YAML mapping, or one whose key `settings` is not.
    """
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise WrongValue(f"recipe: not a YAML file ({str(error).splitlines()[0]}); name a new file or a recipe") from None
    known = content.get("settings") or {} if isinstance(content, dict) else None
    if not isinstance(known, dict):
        raise WrongValue("recipe: must be a mapping of keys, and so must its 'settings'; name a new file or a recipe")
    made = yaml.safe_dump({"settings": {**known, method: dict(settings)}}, sort_keys=False, default_flow_style=None)
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith("settings:")), len(lines))
    end = next((i for i, line in enumerate(lines) if i > first and line.strip() and not line.startswith(" ")), len(lines))
    before, after = "".join(lines[:first]), "".join(lines[end:])
    return before + ("\n" if before and not before.endswith("\n") else "") + made + after


def list_recipes() -> list[Recipe]:
    """Returns all recipes, sorted by name; of two with one name the nearer wins (`./models` first)."""
    files: dict[str, Path] = {}
    for folder in shared_folders("models"):
        for file in sorted(folder.glob("*.yaml")):
            files.setdefault(file.stem, file)
    return [load_recipe(files[name]) for name in sorted(files)]


def find_recipe(name: str) -> Recipe | None:
    """Returns the recipe called `name`, or None."""
    for folder in shared_folders("models"):
        if (folder / f"{name}.yaml").is_file():
            return load_recipe(folder / f"{name}.yaml")
    return None
