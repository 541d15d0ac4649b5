"""Names for a model's weights and for a tokenizer that are equal on every machine exactly when KV is exchangeable.

A model's fingerprint covers its configuration (without fields that say where it came from or what wrote it) and its
weights: small safetensors files byte by byte; of big ones size, header (names, types, shapes, offsets) and samples
spread evenly over the file. Two fine-tunes of one model differ in nearly every weight, so samples tell them apart; an
edit of a few weights between two samples of a big file would go unseen.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

_WHOLE_BYTES = 64 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 16 << 10
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


def fingerprint_files(config: Any, weights: list[Path]) -> str:
    """Of a model folder: its configuration and its safetensors files, in name order."""
    digest = hashlib.sha256(_config_json(config))
    for path in sorted(weights, key=lambda p: p.name):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            if path.stat().st_size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            length = file.read(8)  # of the header, which follows
            digest.update(length + file.read(int.from_bytes(length, "little")))
            for i in range(_NUM_SAMPLES):
                file.seek(i * (path.stat().st_size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprint_weights(model: Any) -> str:
    """Of a model in memory: its configuration and, per parameter, name, type, shape and up to 16 Ki values."""
    digest = hashlib.sha256(_config_json(model.config))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE_BYTES)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any, folder: Path | None) -> str:
    """Of the files that say which text is which token; of the vocabulary where there are none; "none" without one."""
    if tokenizer is None:
        return "none"
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()] if folder is not None else []
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    if not files:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _config_json(config: Any) -> bytes:
    fields = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return json.dumps(fields, sort_keys=True, default=str).encode()
