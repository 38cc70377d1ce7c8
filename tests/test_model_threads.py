"""Settings of a worker process that may change its speed, and never its results."""

import platform
import subprocess
import sys

PROGRAM = """
import torch
from society.model.threads import keep_pages, single_thread
single_thread()
assert torch.get_num_threads() == 1
print(keep_pages())
torch.manual_seed(0)
print(torch.randn(500, 500).mm(torch.randn(500, 500)).sum().item())
"""


def test_keeping_pages_works_under_glibc_and_changes_no_bit() -> None:
    kept, changed = _run(PROGRAM).split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    _, plain = _run(PROGRAM.replace("keep_pages()", "None")).split()
    assert changed == plain


def _run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout
