"""Recipes: one YAML file per checkpoint that people use, with what has to be known before it is downloaded.

Looked for in `./models` first, then in the copies installed with the package, then beside a source checkout.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vtr.registry import closest


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
        image: image settings of the processor.
        tokens: token geometry: `patch_grid` of a view, `per_view`, `most_views`, `most` visual tokens of an image, `newlines`.
        prompt: the template, `{question}` filled in; the processor's own chat template is what is used.
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
    prompt: str
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
    """Read one recipe file.

    Raises:
        ValueError: not YAML, an unknown or missing key (with the closest names).
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path}: must be a mapping of keys, got {type(content).__name__}")
    known = [f.name for f in fields(Recipe) if f.name not in ("file", "name")]
    for key in content:
        if key not in known:
            raise ValueError(f"recipe {path}: unknown key {key!r}{closest(str(key), known)}")
    missing = [key for key in known if key not in ("revision", "notes", "config", "settings") and key not in content]
    if missing:
        raise ValueError(f"recipe {path}: keys missing: {', '.join(missing)}")
    return Recipe(name=path.stem, file=path.resolve(), **content)


def shared_folders(name: str) -> list[Path]:
    """Existing folders that hold `name` (`models`, `eval/examples`): the working folder, package data, a source checkout."""
    package = Path(__file__).resolve().parents[1]
    places = [Path.cwd() / name, package / "_data" / name, package.parent / name]
    found: list[Path] = []
    for place in places:
        if place.is_dir() and place.resolve() not in found:
            found.append(place.resolve())
    return found


def list_recipes() -> list[Recipe]:
    """All recipes, sorted by name; of two with one name the nearer wins (`./models` first)."""
    files: dict[str, Path] = {}
    for folder in shared_folders("models"):
        for file in sorted(folder.glob("*.yaml")):
            files.setdefault(file.stem, file)
    return [load_recipe(files[name]) for name in sorted(files)]


def find_recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None."""
    for folder in shared_folders("models"):
        if (folder / f"{name}.yaml").is_file():
            return load_recipe(folder / f"{name}.yaml")
    return None
