"""Facts about devices, a fake accelerator's timeline, the loader's thread, failures in words."""

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from society.doctor import describe_card
from society.model import advice, device, timeline
from society.model.loader import Loader
from society.model.recipe import Recipe

# ------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peak_rates_go_by_the_exact_card(name: str, rate: float | None) -> None:
    assert device.peak_flops(name) == rate


def test_the_memory_class_is_part_of_a_cards_name() -> None:
    def label(name: str, gib: float) -> str:
        return device.Card("cuda:0", name, "sm_89", int(gib * device.GIB), 0).label

    assert label("NVIDIA GeForce RTX 4090", 23.6) == "NVIDIA GeForce RTX 4090 24GB"
    assert label("NVIDIA H100 80GB HBM3", 79.2) == "NVIDIA H100 80GB HBM3"


def test_the_doctor_says_what_a_card_can_do() -> None:
    known = device.Card("cuda:0", "NVIDIA H100 80GB HBM3", "sm_90", 80 * device.GIB, 8 * device.GIB)
    assert describe_card(known) == "NVIDIA H100 80GB HBM3 (8.0 GiB free, 989.5 TFLOP/s in bf16)"
    unknown = device.Card("cuda:0", "Tesla T4", "sm_75", 15 * device.GIB, 8 * device.GIB)
    assert "Tesla T4 15GB (8.0 GiB free, peak rate unknown" in describe_card(unknown)


def test_a_device_that_is_not_there_is_said() -> None:
    assert device.cards("cpu") == ()
    with pytest.raises(device.NoDevice, match="sees 0 CUDA devices"):
        device.cards("cuda")
    with pytest.raises(device.NoDevice, match="cuda:0, cuda:1"):
        device.cards("gpu7")


ZEN = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
LAKE = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"


def test_the_arithmetic_tells_processors_of_one_capability_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in device.ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = []
    for text in (ZEN, LAKE, "CPU implementer\t: 0x41\nFeatures\t: fp asimd bf16 sve\n"):
        (tmp_path / "cpuinfo").write_text(text)
        found.append(device.arithmetic("cpu", tmp_path / "cpuinfo"))
    assert found == [
        "AuthenticAMD avx2 avx512f avx512_bf16",
        "GenuineIntel avx2 avx512f avx512_bf16 amx_bf16",
        "0x41 bf16 sve",
    ]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert device.arithmetic("cpu", tmp_path / "cpuinfo") == "0x41 bf16 sve ONEDNN_MAX_CPU_ISA=AVX2"
    assert device.arithmetic("cpu", tmp_path / "none").endswith(" ONEDNN_MAX_CPU_ISA=AVX2")


def test_a_cpu_has_no_mfu() -> None:
    assert device.mfu(1e12, 1.0, "cpu") is None


def test_compiled_code_is_kept_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CHOSEN_BY_USER", None)
    monkeypatch.setenv(device.COMPILE_CACHE, "/torchs/own/default")
    with device.compile_cache(tmp_path):
        assert os.environ[device.COMPILE_CACHE] == str(tmp_path / "compile")
    assert os.environ[device.COMPILE_CACHE] == "/torchs/own/default"
    monkeypatch.setattr(device, "CHOSEN_BY_USER", "/mine")
    with device.compile_cache(tmp_path):
        assert os.environ[device.COMPILE_CACHE] == "/torchs/own/default"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_failed_allocations_are_recognised(error: Exception, expected: bool) -> None:
    assert device.is_out_of_memory(error) is expected


# ---------------------------------------------------------------------------- timeline


class FakeMark:
    def __init__(self, owner: "FakeDevice", step: int, value: float) -> None:
        self.owner, self.step, self.value = owner, step, value

    def read(self) -> tuple[float, float]:
        self.owner.read.append(self.step)
        return 2.0 * self.step, self.value


class FakeDevice:
    """Every step takes two seconds of a clock of its own."""

    ahead = 2

    def __init__(self) -> None:
        self.made, self.read, self.started = 0, list[int](), 0

    def start(self) -> None:
        self.started += 1

    def mark(self, value: Tensor) -> FakeMark:
        self.made += 1
        return FakeMark(self, self.made, value.item())


def test_steps_land_in_order_and_late() -> None:
    clock = FakeDevice()
    flight = timeline.Flight(clock)
    landed = []
    for step in range(1, 6):
        flight.launch(torch.tensor(float(step)), step / 10)
        landed += list(flight.land())
        assert flight.launched - len(landed) <= clock.ahead
    assert clock.started == 1
    assert clock.read == [1, 2, 3]
    assert flight.seconds == 6.0
    assert flight.expected_s == 10.0  # five steps at two seconds, two of them not seen yet
    landed += list(flight.land(everything=True))
    assert [(x.step, x.loss, x.progress) for x in landed] == [(n, n, n / 10) for n in range(1, 6)]
    assert flight.seconds == 10.0


def test_a_cpu_lands_every_step_at_once() -> None:
    flight = timeline.Flight(timeline.timeline_of("cpu"))
    assert flight.expected_s == 0.0
    flight.launch(torch.tensor(3.0), 0.0)
    (landed,) = flight.land()
    assert (landed.step, landed.loss) == (1, 3.0)
    assert flight.expected_s == flight.seconds == landed.seconds > 0


# ------------------------------------------------------------------------------ loader


def blocks(count: int | None = None) -> Iterator[np.ndarray]:
    for number in range(count) if count is not None else itertools.count():
        yield np.full((2, 3), number, dtype=np.int64)


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_the_loader_gives_the_batches_of_its_source_in_order() -> None:
    with Loader(blocks(20), "cpu") as loader:
        found = [batch for batch in loader]
    assert [batch[0, 0].item() for batch in found] == list(range(20))
    assert found[0].dtype == torch.int64
    assert not loaders()


def test_the_loader_ends_while_its_thread_waits() -> None:
    loader = Loader(blocks(), "cpu", ahead=1)
    assert next(loader)[0, 0] == 0
    loader.close()
    loader.close()
    assert not loaders()
    with pytest.raises(StopIteration):
        next(loader)


def test_the_sources_errors_reach_the_caller_in_their_place() -> None:
    def source() -> Iterator[np.ndarray]:
        yield from blocks(2)
        raise ZeroDivisionError("no third batch")

    with Loader(source(), "cpu") as loader:
        assert [next(loader)[0, 0].item() for _ in range(2)] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="no third batch"):
            next(loader)
    assert not loaders()


def test_an_error_of_the_caller_stops_the_thread() -> None:
    with pytest.raises(RuntimeError, match="mine"), Loader(blocks(), "cpu"):
        raise RuntimeError("mine")
    assert not loaders()


# ------------------------------------------------------------------------------ advice

BASE = Recipe()


def changed(**knobs: object) -> Recipe:
    return BASE.model_copy(update=knobs)


def test_divergence_names_the_rates_that_were_raised() -> None:
    told = advice.divergence(changed(lr_scale=4.0, head_lr=0.05, matrix_lr=0.01, depth=2), BASE)
    assert told == (
        "Turn back what makes it less stable than the baseline: lr_scale=4 (1), head_lr=0.05 "
        "(0.004)."
    )
    assert "warm_up=0 (0.1)" in advice.divergence(BASE, changed(warm_up=0.1))


def test_divergence_without_a_raised_rate_names_what_differs() -> None:
    told = advice.divergence(changed(depth=8, activation="gelu"), BASE)
    assert "lower lr_scale, raise warm_up" in told
    assert "depth=8 (4), activation=gelu (relu2)" in told
    assert advice.divergence(BASE, BASE).startswith("The baseline itself diverges")


def test_memory_names_what_dominates_and_what_was_raised() -> None:
    large = changed(dim=512, depth=16, batch_tokens=2**20)
    told = advice.memory(large, BASE)
    assert "GiB, most of it for activations" in told
    assert "dim=512 (64)" in told
    assert "batch_tokens=1048576 (1024)" in told
    assert told.endswith("Lower batch_tokens, depth or dim.")
    long = changed(seq_len=8192, batch_tokens=8192)
    assert "attention scores" in advice.memory(long, BASE)
    assert "attention scores" not in advice.memory(long, BASE, scores=False)
    assert advice.memory(BASE, BASE).count("Lower ") == 1


def test_the_width_is_lowered_by_the_knob_that_sets_it() -> None:
    parts = advice.memory_parts(changed(aspect_ratio=64))
    knobs = {knob for part in parts for knob in part.knobs}
    assert "aspect_ratio" in knobs
    assert "dim" not in knobs


def test_the_estimate_is_of_the_right_size() -> None:
    """The public single-GPU benchmark holds 44 GiB at 128 rows, and has 50.3 M parameters.

    From the log in github.com/karpathy/autoresearch (program.md).
    """
    public = Recipe(depth=8, dim=512, heads=4, vocab=8192, seq_len=2048, batch_tokens=524288)
    held = sum(part.mem_bytes for part in advice.memory_parts(public, 128, scores=False))
    assert 20 * device.GIB < held < 90 * device.GIB
    assert held < sum(part.mem_bytes for part in advice.memory_parts(public, 128))
