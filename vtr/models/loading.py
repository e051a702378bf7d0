"""From a name, a folder or a hub id to a model and its processor.

transformers is imported inside the functions: asking what there is must not cost the seconds of its import.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtr.hosts._protocol import host_of
from vtr.models.pixels import PixelLimits, limit_pixels
from vtr.models.recipes import Recipe, find_recipe, list_recipes
from vtr.registry import find_host, list_hosts
from vtr.types.naming import closest
from vtr.types import VtrError
from vtr.types.errors import WrongValue, out_of_memory

_log = logging.getLogger(__name__)
DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16"}
DTYPES |= {"float64": "float64", "fp64": "float64"}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
_WEIGHTS = (".safetensors", ".bin")
_CONTENT = (*_WEIGHTS, ".json", ".jinja", ".model", ".txt")
_HUB_SECONDS = 10
_WHOLE = 64 * 2**20  # files up to this size are hashed whole, larger ones by size and first mebibyte


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found but not loaded: `source` is a folder or a hub id."""

    name: str
    source: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, or None for a hub id."""
        return Path(self.source) if Path(self.source).is_dir() else None


def find_checkpoint(name: str) -> Checkpoint:
    """Finds a folder, the name of a recipe, or a hub id, in that order.

    Raises:
        ValueError: none of the three (the message has the closest recipes), or a folder without `config.json` or without weights.
        VtrError: an embedded checkpoint that is not in this copy of the repository.
    """
    folder = Path(name)
    if folder.is_dir() and not (find_recipe(name) and not (folder / "config.json").is_file()):
        _check_folder(folder)
        return Checkpoint(folder.resolve().name, str(folder))
    recipe = find_recipe(name) if "/" not in name else None
    if recipe:
        if Path(recipe.source).is_dir():
            _check_folder(Path(recipe.source))
        elif "/" not in recipe.source:
            raise VtrError(
                f"load_model: the folder {recipe.source!r} that belongs beside {recipe.file} is not there; a wheel has no room for all, get the repository"
            )
        return Checkpoint(recipe.name, recipe.source, recipe.revision)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir():
        return Checkpoint(name.split("/")[1], name)
    if "/" in name:
        raise WrongValue(f"model: no folder {name!r}; give a folder, a hub id such as 'llava-hf/llava-1.5-7b-hf' or a name of vtr models")
    raise WrongValue(f"model: unknown name {name!r}{closest(name, [r.name for r in list_recipes()])}; see vtr models")


def recipe_of(name: str, checkpoint: Checkpoint) -> Recipe | None:
    """Returns the recipe of a checkpoint that was found by `name`, None without one."""
    return find_recipe(name) or next((one for one in list_recipes() if one.hub_id == checkpoint.source), None)


def stored_checkpoint(checkpoint: Checkpoint) -> Checkpoint | None:
    """Returns what of a checkpoint of the hub is on this machine, as a folder named by its commit; None for other ones and where nothing is."""
    from huggingface_hub import try_to_load_from_cache

    if checkpoint.folder:
        return None
    config = try_to_load_from_cache(checkpoint.source, "config.json", revision=checkpoint.revision)
    return Checkpoint(checkpoint.name, str(Path(config).parent)) if isinstance(config, str) else None


def load_config(checkpoint: Checkpoint) -> Any:
    """Loads the config alone.

    Raises:
        ValueError: damaged, or of a model type that no host serves.
        VtrError: of a hub id, and it cannot be read.
    """
    return _read_config(checkpoint, _hub_options(checkpoint))


def _read_config(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if checkpoint.folder:  # an unknown model type has to be named by us: AutoConfig would only list its own
        try:
            content = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise WrongValue(f"load_model: {checkpoint.folder / 'config.json'} is not JSON ({error}); the checkpoint is damaged") from None
        _check_model_type(content.get("model_type") if isinstance(content, dict) else None, checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.source, **options)
    except (OSError, ValueError) as error:
        advice = "check the id and the network, or give a folder"
        raise VtrError(f"load_model: config of {checkpoint.source!r} cannot be read: {_first_line(error)}; {advice}") from error
    _check_model_type(config.model_type, checkpoint)
    return config


def check_device(device: str | None) -> str:
    """Returns `device`, checked to exist; None = CUDA where there is one, else the CPU; `auto` = accelerate spreads the model.

    Raises:
        ValueError: not a device name, or no such device here.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.mps.is_available():
        here.append("mps")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise WrongValue(f"device: unknown name {device!r}; here are {', '.join(here)}") from None
    if str(wanted) not in here and not (":" not in device and any(name.split(":")[0] == wanted.type for name in here)):
        raise WrongValue(f"device: {device!r} does not exist on this machine; here are {', '.join(here)}")
    return device


def check_dtype(dtype: str, device: str, config: Any) -> torch.dtype:
    """Returns the dtype to load as; `auto` = float32 on the CPU (half precision is slow there), elsewhere the checkpoint's own.

    Raises:
        ValueError: unknown name.
    """
    if dtype == "auto":
        own = getattr(config, "dtype", None) or getattr(getattr(config, "text_config", None), "dtype", None)
        own = getattr(torch, own) if isinstance(own, str) else own
        return torch.float32 if device == "cpu" or own is None else own
    if dtype not in DTYPES:
        raise WrongValue(f"dtype: unknown name {dtype!r}; one of auto, {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[dtype])


def check_attention(attention: str) -> str:
    """Returns `attention`, checked to be a backend that is supported.

    Raises:
        ValueError: unknown name.
    """
    if attention not in ATTENTIONS:
        raise WrongValue(f"attention: unknown backend {attention!r}; one of {', '.join(ATTENTIONS)}")
    return attention


def load_model(
    name: str | Checkpoint,
    device: str | None = None,
    dtype: str = "auto",
    attention: str = "sdpa",
    progress: bool = False,
    pixels: PixelLimits | None = None,
) -> tuple[Any, Any]:
    """Loads model and processor, in `eval()` state on `device`.

    Args:
        name: a folder, a hub id, the name of a recipe, or what `find_checkpoint` returned.
        device: see `check_device`.
        dtype: see `check_dtype`.
        attention: `sdpa`, `eager` or `flash_attention_2`.
        progress: show the bars of transformers.
        pixels: limits of an image in place of the processor's own.

    Raises:
        ValueError: unknown model, device, dtype or attention backend; limits that the processor does not have; a folder that is incomplete, damaged, or of an unsupported model type; no
            FlashAttention here.
        VtrError: a checkpoint that cannot be got from the hub, or not be loaded into this machine's memory.
    """
    checkpoint = find_checkpoint(name) if isinstance(name, str) else name
    device, attention = check_device(device), check_attention(attention)
    if dtype != "auto":
        check_dtype(dtype, device, None)
    options = _hub_options(checkpoint)
    config = _read_config(checkpoint, options)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = {} if device == "cpu" else {"device_map": device}
    try:
        with _bars(progress):
            model, info = AutoModelForImageTextToText.from_pretrained(
                checkpoint.source,
                dtype=check_dtype(dtype, device, config),
                attn_implementation=attention,
                output_loading_info=True,
                **where,
                **options,
            )
        processor = AutoProcessor.from_pretrained(checkpoint.source, **options)
    except Exception as error:  # transformers raises many kinds, all mean: this checkpoint cannot be loaded here
        if isinstance(error, ImportError) and attention == "flash_attention_2":
            raise WrongValue(
                f"attention: {attention!r} cannot be used here; use 'sdpa', or install the package flash-attn ({_first_line(error)})"
            ) from error
        damaged = checkpoint.folder is not None and not out_of_memory(error)
        kind = WrongValue if damaged else VtrError
        raise kind(f"load_model: {checkpoint.source!r} cannot be loaded: {_first_line(error)}") from error
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        raise WrongValue(
            f"load_model: the weights in {checkpoint.source!r} lack {len(missing)} tensors, first {missing[0]!r}; get them again"
        )
    if pixels is not None and pixels.given:
        limit_pixels(host_of(model), processor, pixels)
    return model.eval(), processor


def identify(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Returns what makes two checkpoints the same: name and content hash of a folder, id and commit of a hub checkpoint."""
    folder = checkpoint.folder
    if folder is None:
        from transformers.utils import cached_file

        config = cached_file(checkpoint.source, "config.json", **_hub_options(checkpoint))
        return {"name": checkpoint.source, "revision": Path(str(config)).parent.name}
    total = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _CONTENT):
        size = file.stat().st_size
        with file.open("rb") as stream:
            content = hashlib.sha256(stream.read() if size <= _WHOLE else stream.read(2**20)).hexdigest()
        total.update(f"{file.name} {size} {content}\n".encode())
    return {"name": checkpoint.name, "sha256": total.hexdigest()}


def _hub_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what `from_pretrained` is told about the hub; where it does not answer (asked once, no retries), only files that are here are used."""
    if checkpoint.folder:
        return {}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    away = False
    try:
        HfApi().model_info(checkpoint.source, revision=checkpoint.revision, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        pass  # it answers; what is wrong is said best when the files are asked for
    except Exception as error:  # of whatever HTTP library huggingface_hub uses
        _log.debug("the hub does not answer: %s", error)
        away = True
    return {"revision": checkpoint.revision, "local_files_only": away}


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Progress bars of transformers on or off inside the block."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise WrongValue(f"load_model: folder {str(folder)!r} has no config.json; give the folder of a Hugging Face checkpoint")
    if not any(f.suffix in _WEIGHTS for f in folder.iterdir()):
        raise WrongValue(f"load_model: folder {str(folder)!r} has no weights (*.safetensors or *.bin); copy or download them there")


def _check_model_type(model_type: str | None, checkpoint: Checkpoint) -> None:
    if model_type is None or find_host(model_type) is None:
        known = ", ".join(list_hosts())
        raise WrongValue(f"load_model: {checkpoint.source!r} has model type {model_type!r}, for which there is no host; known: {known}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
