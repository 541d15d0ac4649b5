"""A model's folder and its tokenizer. Knows nothing of the model: whoever needs only these waits for no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """The model cannot be loaded; the message says why and what to do."""


def find_folder(name: str) -> Path:
    """The folder of a local path, or of a hub id after downloading it (once; later from the cache)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    looks_local = (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") != 1
        or os.sep != "/"
        or path.parent.is_dir()
    )
    if path.exists():
        raise ModelError(f"{name} is a file; give the folder that holds config.json and the weights")
    if looks_local:
        raise ModelError(f"no model folder {name}: check the path (from {Path.cwd()}), or give a hub id like org/name")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is neither a folder here nor in the local hub cache, and the hub cannot be reached: give a local"
            " folder, or download the model first"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"cannot get {name} from the hub: {first_line(error) or type(error).__name__}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder or hub id, without its model. ModelError."""
    return tokenizer_in(find_folder(name))


def tokenizer_in(folder: Path) -> Any:
    """The same of a folder that is there."""
    from transformers import AutoTokenizer  # seconds, which the importers of this file need not spend

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: no usable tokenizer ({first_line(error)}); copy tokenizer.json there") from error


def first_line(error: BaseException) -> str:
    """Of its words; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
