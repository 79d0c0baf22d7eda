"""`vatt doctor`: what this machine can do, and why not the rest. Reports; never fails for something that is missing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from vatt_engine import dispatch
from vatt_engine.cpus import CHOICES_OF_WAITING, usable_cpus
from vatt_engine.data.dali import dali_missing
from vatt_engine.data.encode import has_codec
from vatt_engine.engine.logging import versions
from vatt_engine.schema import PathText
from vatt_engine.tasks.flags import parse_flags

REQUIRED = ("torch", "numpy", "av", "tokenizers", "safetensors", "tyro", "PyYAML", "matplotlib")
OPTIONAL = {  # package -> what it is for
    "triton": "Triton kernels on a GPU",
    "nvidia-dali-cuda130": "video decoding on the GPU",
    "deepspeed": "ZeRO: models and batches larger than one GPU",
    "tensorboard": "--engine.tensorboard True",
}
DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4", "aac", "opus", "mp3", "flac")
ENCODERS = ("libx264", "aac", "libvpx-vp9", "libopus")

Lines = Iterable[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What this machine can do, and why not the rest.

    Args:
        folder: where free disk space is looked up, for example the parent of your run folders.
    """

    folder: PathText = "."


def main(argv: Sequence[str]) -> int:
    config = parse_flags(DoctorConfig, argv, prog="vatt doctor", positional=("folder",))
    for title, lines in report(config.folder).items():
        print(f"{title}\n" + "\n".join(f"  {name:<22}{text}" for name, text in lines))
    return 0


def report(folder: str = ".") -> dict[str, list[tuple[str, str]]]:
    """Sections of (what, state); a section that cannot be looked at says why in its place."""
    sections: dict[str, Callable[[], Lines]] = {
        "machine": lambda: _machine(folder),
        "packages": _packages,
        "GPU": _gpu,
        "native module": _native,
        "ops (first that can run is used)": _ops,
        "media": _media,
        "DALI (prepared shards)": _dali,
    }
    found = {}
    for title, look in sections.items():
        try:
            found[title] = list(look())
        except Exception as error:  # a doctor reports whatever a broken installation raises
            found[title] = [("could not be examined", f"{type(error).__name__}: {error}")]
    return found


def _machine(folder: str) -> Lines:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    there, usable = os.cpu_count(), usable_cpus()
    limited = "" if usable == there else f", this process may use {usable}"
    yield "cores", f"{there}{limited}, torch uses {torch.get_num_threads()}"
    yield "OpenMP waits", next((f"{n}={os.environ[n]}" for n in CHOICES_OF_WAITING if n in os.environ), "busily")
    free = shutil.disk_usage(folder).free / 2**30
    yield "free disk", f"{free:.1f} GiB at {os.path.abspath(folder)}"


def _packages() -> Lines:
    for name, version in versions("vatt_engine", *REQUIRED).items():
        yield name, version or ("not installed, runs from its source tree" if name == "vatt_engine" else _pip(name))
    for name, version in versions(*OPTIONAL).items():
        yield name, version or f"not installed (optional: {OPTIONAL[name]})"


def _pip(name: str) -> str:
    return f"MISSING, run `pip install {name}`"


def _gpu() -> Lines:
    yield "torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            reason = "this torch is a CPU build; install a CUDA build of torch"
        elif not os.path.exists("/dev/nvidiactl"):
            reason = "no NVIDIA driver is loaded (/dev/nvidiactl is missing)"
        else:
            reason = "the driver does not work with this torch; compare `nvidia-smi` with the CUDA version above"
        yield "devices", f"none: {reason}"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}, {bf16}"


def _native() -> Lines:
    reason = dispatch.native_missing()
    yield "vatt_engine._C", reason or "built"
    if reason is None:
        native = importlib.import_module("vatt_engine._C")
        archs = getattr(native, "cuda_archs", "")
        yield "its CUDA kernels", dispatch.native_missing(cuda=True) or f"built for {archs}"


def _ops() -> Lines:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in dispatch.list_ops():
            for name, reason in dispatch.available_impls(op, device).items():
                yield f"{op} on {device}", f"{name}: {reason or 'can run'}"


def _media() -> Lines:
    try:
        import av
    except ImportError as error:
        yield "PyAV", f"cannot be imported ({error}); {_pip('av')}"
        return
    yield "PyAV", f"{av.__version__}, FFmpeg libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
    for title, mode, names in (("decodes", "r", DECODERS), ("encodes", "w", ENCODERS)):
        missing = [name for name in names if not has_codec(name, mode)]
        yield title, ", ".join(name for name in names if name not in missing) or "nothing"
        if missing:
            yield f"does not {title[:-1]}", ", ".join(missing)


def _dali() -> Lines:
    reason = dali_missing("cpu")
    if reason is not None:
        yield "DALI", reason
        return
    yield "DALI", importlib.import_module("nvidia.dali").__version__
    yield "on the CPU", "can decode VP9 and MJPEG (FLAC always on the CPU); not H.264: there PyAV decodes"
    yield "on the GPU", dali_missing("cuda") or "can decode H.264, VP9 and MJPEG, not timed by anybody yet"
