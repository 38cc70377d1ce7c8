"""Facts about devices: names, memory, peak rates, instruction sets. torch is imported on demand.

Nothing in here is measured; rates are the makers' own, for dense bf16 matrix products.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from society.errors import SocietyError

GIB = 2**30

COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
CHOSEN_BY_USER = os.environ.get(COMPILE_CACHE)
"""Read before torch compiles anything: it puts its own default there."""

PEAK_BF16 = (
    # (words that the name must hold, dense bf16 FLOP/s, where the maker says so); first match wins
    (("GB300",), 2500e12, "NVIDIA GB300 NVL72 data sheet, half the sparse rate"),
    (("GB200",), 2500e12, "NVIDIA GB200 NVL72 data sheet, half the sparse rate"),
    (("B300",), 2250e12, "NVIDIA HGX B300 data sheet, half the sparse rate"),
    (("B200",), 2250e12, "NVIDIA HGX B200 data sheet, half the sparse rate"),
    (("B100",), 1750e12, "NVIDIA HGX B100 data sheet, half the sparse rate"),
    (("H200", "NVL"), 835.5e12, "NVIDIA H200 data sheet, half the sparse rate"),
    (("H200",), 989.5e12, "NVIDIA H200 data sheet, half the sparse rate"),
    (("GH200",), 989.5e12, "NVIDIA GH200 data sheet, half the sparse rate"),
    (("H100", "NVL"), 835.5e12, "NVIDIA H100 data sheet, half the sparse rate"),
    (("H100", "PCIe"), 756.5e12, "NVIDIA H100 data sheet, half the sparse rate"),
    (("H100",), 989.5e12, "NVIDIA H100 data sheet (SXM), half the sparse rate"),
    (("H800", "PCIe"), 756.5e12, "as H100 PCIe"),
    (("H800",), 989.5e12, "as H100 SXM"),
    (("H20",), 148e12, "NVIDIA H20 data sheet"),
    (("A100",), 312e12, "NVIDIA A100 data sheet"),
    (("A800",), 312e12, "as A100"),
    (("A40",), 149.7e12, "NVIDIA A40 data sheet"),
    (("A30",), 165e12, "NVIDIA A30 data sheet"),
    (("A10",), 125e12, "NVIDIA A10 data sheet"),
    (("L40S",), 362.05e12, "NVIDIA L40S data sheet"),
    (("L40",), 181.05e12, "NVIDIA L40 data sheet"),
    (("L4",), 121e12, "NVIDIA L4 data sheet, half the sparse rate"),
    (("RTX 6000 Ada",), 364.25e12, "NVIDIA RTX 6000 Ada data sheet, half the sparse rate"),
    (("RTX A6000",), 154.85e12, "NVIDIA RTX A6000 data sheet, half the sparse rate"),
    (("RTX 5090",), 209.5e12, "NVIDIA RTX Blackwell white paper, fp32 accumulation"),
    (("RTX 5080",), 112.6e12, "NVIDIA RTX Blackwell white paper, fp32 accumulation"),
    (("RTX 4090",), 165.2e12, "NVIDIA Ada white paper, fp32 accumulation"),
    (("RTX 4080",), 97.5e12, "NVIDIA Ada white paper, fp32 accumulation"),
    (("RTX 4070 Ti",), 80.2e12, "NVIDIA Ada white paper, fp32 accumulation"),
    (("RTX 3090",), 71e12, "NVIDIA GA102 white paper, fp32 accumulation"),
    (("RTX 3080",), 59.5e12, "NVIDIA GA102 white paper, fp32 accumulation"),
    (("MI325X",), 1307.4e12, "AMD MI325X data sheet"),
    (("MI300X",), 1307.4e12, "AMD MI300X data sheet"),
    (("MI250X",), 383e12, "AMD MI250X data sheet, both dies"),
)
"""Consumer cards are listed with fp32 accumulation, which is what training uses."""

OTHER_CARDS = frozenset({"D", "LAPTOP", "MAX-Q", "MIG", "SUPER", "TI"})
"""Words that make another card (or a part of one) of a name in the table."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "sve", "sve2")
"""Instruction sets that change which matrix kernels oneDNN and MKL choose."""

ISA_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
"""Environment variables by which the arithmetic libraries can be told to use less."""


class NoDevice(SocietyError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How a recipe is executed on a device; what is computed stays the same but for rounding."""

    attention: str = "auto"
    """Kernel of the attention on an accelerator: `auto` measures, see `kernels.FAMILIES`."""
    compiler: str = "auto"
    """`auto`: torch.compile on an accelerator only; `off`; or the name of a compiler backend."""
    micro_rows: int = 0
    """Rows of a batch that are computed at once; 0: all on a CPU, what fits on an accelerator."""
    cache: Path | None = None
    """Folder for compiled code and measured choices; None keeps nothing."""
    fused: bool = True
    """Whether the optimiser's updates are those of `fused` where anything is compiled; not if
    `optim` was changed, whose arithmetic `fused` repeats."""


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator."""

    device: str
    """What torch calls it, e.g. `cuda:0`."""
    name: str
    capability: str
    """Compute capability, e.g. `sm_90`."""
    mem_bytes: int
    free_bytes: int

    @property
    def label(self) -> str:
        """Name with the memory class, e.g. `NVIDIA GeForce RTX 4090 24GB`."""
        if re.search(r"\d+ ?gb", self.name, re.IGNORECASE):
            return self.name
        return f"{self.name} {round(self.mem_bytes / GIB)}GB"


def cards(device: str) -> tuple[Card, ...]:
    """The accelerators behind a device name: all for `cuda`, one for `cuda:1`, none for `cpu`.

    Starts them: call it in a process that forks no more.

    Raises:
        NoDevice: torch sees no such device.
    """
    if device == "cpu":
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = range(count) if device == "cuda" else [_index(device)]
    if not count or any(index >= count for index in wanted):
        raise NoDevice(
            f"torch {torch.__version__} sees {count} CUDA devices here, so {device!r} cannot be "
            "used. Use --device cpu, or install a torch built for this accelerator and its driver."
        )
    return tuple(_card(index) for index in wanted)


def _card(index: int) -> Card:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return Card(f"cuda:{index}", name, f"sm_{major}{minor}", total, free)


def _index(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise NoDevice(f"Unknown device {device!r}: use cpu, cuda, or cuda:0, cuda:1 and so on.")
    return int(number)


def identify(device: str) -> tuple[str, str]:
    """Name and instruction set of a device, e.g. `cuda:NVIDIA H100 80GB HBM3` and `sm_90`."""
    if device == "cpu":
        import torch

        return device, str(torch.backends.cpu.get_cpu_capability())
    card = cards(device)[0]
    return f"cuda:{card.label}", card.capability


def arithmetic(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the bits depend on beyond name and capability, in one line.

    Two processors of one capability (e.g. AVX512, with and without bf16 instructions, or of two
    makers) run other kernels of oneDNN and MKL, and give other bits.
    """
    set_here = [f"{name}={os.environ[name]}" for name in ISA_VARIABLES if name in os.environ]
    if device != "cpu":
        import torch

        version = torch.version.cuda or torch.version.hip
        return " ".join([*([f"CUDA {version}"] if version else []), *set_here])
    return " ".join([*_cpu_words(cpuinfo), *set_here])


def _cpu_words(cpuinfo: Path) -> list[str]:
    """Vendor and matrix instructions of this CPU."""
    import platform

    try:
        text = cpuinfo.read_text()
    except OSError:  # not Linux
        return [word for word in (platform.processor() or platform.machine(),) if word]
    vendor = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(\S+)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    found = set(flags[1].split()) if flags else set()
    return [vendor[1] if vendor else platform.machine(), *(f for f in CPU_FLAGS if f in found)]


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of an accelerator by its name; None where it is unknown or shared."""
    upper = name.upper()
    for words, rate, _ in PEAK_BF16:
        patterns = [rf"\b{re.escape(word.upper())}(?![0-9A-Z])" for word in words]
        if all(re.search(pattern, upper) for pattern in patterns):
            another = (set(upper.split()) ^ set(" ".join(words).upper().split())) & OTHER_CARDS
            return None if another else rate
    return None


def mfu(flops: float, seconds: float, device: str) -> float | None:
    """Share of the device's peak rate that was used; None on a CPU and on unknown cards.

    Args:
        flops: FLOPs of forward and backward passes, the optimiser's not included.
        seconds: Seconds they took.
        device: A torch device.
    """
    if device == "cpu" or seconds <= 0:
        return None
    import torch

    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else flops / seconds / peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch raises a plain RuntimeError on the CPU."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def free_memory(device: str) -> int:
    """Bytes that a run may take now; the limit of this process is taken into account."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    limit = _Limits.by_device.get(device)
    return free if limit is None else min(free, limit)


class _Limits:
    """What this process may use, by device; torch cannot be asked for it."""

    by_device: dict[str, int] = {}  # noqa: RUF012 - one per process, on purpose


def limit_memory(device: str, mem_bytes: int) -> None:
    """Let this process take no more of a card; it shares it with others.

    An allocation beyond that fails as if the card were full, in this process only.
    """
    import torch

    index = torch.device(device).index or 0
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, mem_bytes / total), index)
    _Limits.by_device[device] = mem_bytes


@contextmanager
def compile_cache(folder: Path | None) -> Iterator[None]:
    """Keep what torch.compile and Triton build in a folder, for this process and later ones.

    https://docs.pytorch.org/tutorials/recipes/torch_compile_caching_configuration_tutorial.html
    A folder that the user chose by the same variable stays.
    """
    if folder is None or CHOSEN_BY_USER is not None:
        yield
        return
    before = os.environ.get(COMPILE_CACHE)
    os.environ[COMPILE_CACHE] = str(folder / "compile")
    try:
        yield
    finally:
        if before is None:
            del os.environ[COMPILE_CACHE]
        else:
            os.environ[COMPILE_CACHE] = before
