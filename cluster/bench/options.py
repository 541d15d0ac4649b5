"""What all benchmarks are asked with: model, dtype, threads, repeats; and the set-up they report.

Knows no benchmark. Torch is imported only by what needs it, so that a wrong option is told at once.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
DEFAULT_MODEL = Path("models") / "bench-125m"
DEFAULT_SCRATCH = Path("runs")
PACKAGES = ("torch", "transformers", "ray", "pyarrow")


def _silent(_: str) -> None:
    """Default of BenchOptions.progress."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """One request for benchmarks. ConfigError, with advice, for what cannot be."""

    model: str
    """A folder or a hub id; `default_model()` makes one."""
    dtype: str = "auto"
    """auto: as stored where the hardware computes it natively, else float32 (see `computed_dtype`)."""
    device: str = "auto"
    """auto (cuda when present), cpu, cuda."""
    num_threads: int = 0
    """Torch threads; 0 takes all cores (see `threads`)."""
    repeats: int = 5
    """Samples of each measure; ratios are medians over pairs of them."""
    quick: bool = False
    """Small sizes: shows that a benchmark runs, its figures mean nothing."""
    scratch: str = str(DEFAULT_SCRATCH)
    """Where files of the SSD tier go, on the disk to be measured; see `scratch_folder`."""
    data: str | None = None
    """Folder with the shared traces, for `workload`."""
    progress: Callable[[str], None] = field(default=_silent, compare=False, repr=False)
    """Told now and then, in a few words, what a benchmark is at."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("no model: give --model (a folder or a hub id), or leave it out for the 125M Llama")
        for name, known in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.num_threads < 0:
            raise ConfigError(f"threads must be 0 (all cores) or more, not {self.num_threads}")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, not {self.repeats}")
        if "://" in self.scratch:
            raise ConfigError(f"scratch must be a folder of this machine, not {self.scratch!r}")
        if self.data is not None and not Path(self.data).is_dir():
            raise ConfigError(f"no folder {self.data} with traces; see --data")

    @property
    def threads(self) -> int:
        """Torch threads, never 0."""
        return self.num_threads or len(os.sched_getaffinity(0))

    @cached_property
    def computed_device(self) -> str:
        """cpu or cuda. ConfigError for cuda without a CUDA device."""
        import torch

        has_cuda = torch.cuda.is_available()
        if self.device == "cuda" and not has_cuda:
            raise ConfigError("device is cuda but torch sees no CUDA device; take --device cpu or auto")
        return "cuda" if has_cuda and self.device != "cpu" else "cpu"

    @cached_property
    def dtype_choice(self) -> DtypeChoice:
        """What the model is computed in, and why."""
        if self.dtype != "auto":
            return DtypeChoice(self.dtype, "as asked for")
        stored = _stored_dtype(self.model)
        if stored not in ("bfloat16", "float16"):
            return DtypeChoice("float32", f"as stored ({stored})" if stored == "float32" else "the model names none")
        if self.computed_device == "cuda":
            return DtypeChoice(stored, "as stored; the GPU computes it natively")
        if stored == "bfloat16" and cpu_has_bf16():
            return DtypeChoice(stored, "as stored; this CPU has bf16 instructions")
        reason = f"stored as {stored}, which this CPU computes several times slower: it would flatter reuse"
        return DtypeChoice("float32", reason)

    @property
    def computed_dtype(self) -> str:
        return self.dtype_choice.dtype

    @contextmanager
    def scratch_folder(self, name: str) -> Iterator[Path]:
        """A fresh folder below `scratch`, removed in the end. ConfigError if there can be none."""
        try:
            Path(self.scratch).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=f"bench-{name}-", dir=self.scratch, ignore_cleanup_errors=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.scratch}: {error.strerror}; see --scratch") from None
        with folder as path:
            yield Path(path).absolute()

    def setup(self, **more: Any) -> dict[str, Any]:
        """The part of every `Result.setup` that is the same; `more` is a benchmark's own."""
        return {
            "model": self.model,
            "dtype": self.computed_dtype,
            "dtype_reason": self.dtype_choice.reason,
            "device": self.computed_device,
            "threads": self.threads,
            "repeats": self.repeats,
            "quick": self.quick,
            "machine": machine(self.computed_device),
            "versions": versions(),
            **more,
        }


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    dtype: str
    reason: str


def default_model(folder: Path = DEFAULT_MODEL) -> str:
    """The 125M-parameter Llama with random weights, stored in bf16; made at the first call, under `folder`."""
    from cluster.tiny_model import make_tiny_model

    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = make_tiny_model(Path(temporary) / "model", size="125m", dtype="bfloat16")
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    return str(folder)


def cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 have instructions of their own here (avx512_bf16, amx_bf16, Arm's bf16)."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def machine(device: str) -> str:
    """Processor, cores and memory in words."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    words = f"{_cpu_name()}, {cores} cores, {memory:.0f} GiB"
    if device == "cuda":
        import torch

        words += f", {torch.cuda.get_device_name()}"
    return words


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _stored_dtype(model: str) -> str | None:
    """What the model's config says; None where there is none, or it says nothing."""
    if Path(model).is_dir():
        try:
            config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    else:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model).to_dict()
        except (OSError, ValueError):
            return None
    stored = config.get("dtype") or config.get("torch_dtype")
    return str(stored).removeprefix("torch.") if stored else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
