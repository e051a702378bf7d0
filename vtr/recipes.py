"""Files that come with the toolkit (`models`, `eval/...`): where they lie, and the settings that recipes hold for methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


def shared_folders(name: str) -> list[Path]:
    """Returns the existing folders that hold `name` (`models`, `eval/examples`): the working folder, package data, a source checkout."""
    package = Path(__file__).resolve().parent
    places = [Path.cwd() / name, package / "_data" / name, package.parent / name]
    return list(dict.fromkeys(place.resolve() for place in places if place.is_dir()))


def calibrated(method: str) -> list[Mapping[str, Any]]:
    """Returns what recipes (`models/*.yaml`) hold under `settings` for a method, `./models` first; the method knows which one is meant."""
    files = [file for folder in shared_folders("models") for file in sorted(folder.glob("*.yaml"))]
    found = [_recipe_settings(str(file), file.stat().st_mtime_ns).get(method) for file in files]
    return [entry for entry in found if isinstance(entry, Mapping)]


@lru_cache(maxsize=256)
def _recipe_settings(file: str, _changed: int) -> Mapping[str, Any]:
    """Returns the part `settings` of a recipe; `_changed` is the time of its last change, so that an edited file is read again."""
    import yaml

    text = Path(file).read_text(encoding="utf-8", errors="replace")
    if "settings:" not in text:
        return {}
    try:
        content = yaml_of(text)
    except yaml.YAMLError:  # `load_recipe` says what is wrong with it
        return {}
    settings = content.get("settings") if isinstance(content, Mapping) else None
    return settings if isinstance(settings, Mapping) else {}


def yaml_of(text: str) -> Any:
    """Parses YAML as `yaml.safe_load` does, by libyaml where PyYAML has it, which is six times as fast."""
    import yaml

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
