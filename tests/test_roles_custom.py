"""A role of one's own: by `module:Class` and through the entry-point group."""

import json
from pathlib import Path

import pytest

from society.errors import UsageError
from society.memory import Ledger
from society.roles import Role, load_role

DOCS = Path(__file__).parents[1] / "docs"
GREETER = """
from society.records import NewInsight
from society.roles import Duty, Outcome, Role


class Greeter(Role):
    name = "greeter"
    about = "says hello once"

    def duties(self, view):
        known = any(activity.role == self.name for activity in view.ledger.activities())
        return [] if known else [Duty(self.name, "greet", value=100)]

    async def perform(self, duty, lab):
        return Outcome((NewInsight(f"hello from {lab.agent}", ()),), note="greeted")
"""


def acts(lab, role):
    """What agents did in a role."""
    with Ledger.open(lab, read_only=True) as ledger:
        return [activity for activity in ledger.activities() if activity.role == role]


def test_the_role_of_the_docs_acts(society, tmp_path):
    done = society(
        "run", "--task", "synthetic", "--runs", 48, "--agents", 4, "--slots", 1, "--seed", 3,
        "--role", "example_role:Simplifier", "--lab", tmp_path / "lab", cwd=DOCS,
    )  # fmt: skip
    assert done.code == 0, done.err
    undone = acts(tmp_path / "lab", "simplifier")
    assert undone
    assert all(act.duty == "undo" and "failed:" not in act.note for act in undone)
    assert any(act.note.startswith("without ") for act in undone)


@pytest.fixture
def installed(tmp_path):
    """A folder like site-packages, with a distribution that brings a role."""
    site = tmp_path / "site"
    metadata = site / "society_greeter-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "society_greeter.py").write_text(GREETER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: society-greeter\nVersion: 1.0")
    (metadata / "entry_points.txt").write_text(
        "[society.roles]\ngreeter = society_greeter:Greeter\n"
    )
    return site


def test_a_role_of_an_installed_package_acts(society, installed, tmp_path):
    done = society(
        "run", "--task", "synthetic", "--runs", 10, "--agents", 3, "--slots", 1, "--seed", 1,
        "--role", "greeter", "--lab", tmp_path / "lab", PYTHONPATH=str(installed),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [act.note for act in acts(tmp_path / "lab", "greeter")] == ["greeted"]
    with Ledger.open(tmp_path / "lab", read_only=True) as ledger:
        assert any(insight.text.startswith("hello from ") for insight in ledger.insights())


def test_it_is_listed(society, installed):
    roles = json.loads(society("roles", "--json", PYTHONPATH=str(installed)).out)
    assert {"name": "greeter", "about": "says hello once"} in roles


class Unnamed(Role):
    def duties(self, view):
        return []

    async def perform(self, duty, lab):
        raise NotImplementedError


class Abstract(Role):
    name = "abstract"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no.such.module:Role", "cannot import"),
        ("society.roles:Nothing", "has no 'Nothing'"),
        ("society.roles:Duty", "not a subclass"),
        ("custom_roles_of_the_tests:Unnamed", "needs a `name`"),
        ("custom_roles_of_the_tests:Abstract", "cannot be made"),
    ],
)
def test_what_is_no_role_is_refused(monkeypatch, path, words):
    import sys

    monkeypatch.setitem(sys.modules, "custom_roles_of_the_tests", sys.modules[__name__])
    with pytest.raises(UsageError, match=words):
        load_role(path)
