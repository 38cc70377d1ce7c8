"""The notebook, executed by a real kernel on the memory of a real short run."""

from importlib import resources

import nbformat
from nbclient import NotebookClient

NOTEBOOK = resources.files("society.memory") / "inspect_memory.ipynb"


def test_the_notebook_runs_and_shows_plots_and_tables(small_lab, monkeypatch):
    monkeypatch.setenv("SOCIETY_LAB", str(small_lab))
    notebook = nbformat.reads(NOTEBOOK.read_text(), as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    kinds = {kind for out in shown for kind in out.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    assert sum("image/png" in out.get("data", {}) for out in shown) >= 4
    assert not [out for out in shown if out.output_type == "error"]
