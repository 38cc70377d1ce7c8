"""Settings: merging, ranges, and clear errors."""

import pytest
import yaml
from pydantic import ValidationError

from society.errors import UnknownName, UsageError
from society.settings import DEFAULT_ROLES, Settings, load_settings, parse_roles, validate


def test_the_defaults_are_valid_and_unbounded():
    settings = Settings()
    assert settings.agents == 8
    assert settings.task == "pretrain"
    assert not settings.bounded


@pytest.mark.parametrize("budget", [{"runs": 5}, {"minutes": 0.5}, {"until": 1.5}])
def test_any_budget_bounds(budget):
    assert Settings(**budget).bounded


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().agents = 3  # type: ignore[misc]


def test_every_setting_survives_being_stored():
    settings = Settings(task="synthetic", runs=5, roles={"verifier": 8}, extra_roles=("a:B",))
    assert validate(settings.model_dump(mode="json"), source="the notebook") == settings


def test_the_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"agents": 4, "runs": 10, "task": "synthetic"}))
    settings = load_settings(config, agents=6, runs=None)
    assert (settings.agents, settings.runs, settings.task) == (6, 10, "synthetic")


def test_an_empty_file_gives_the_defaults(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("# nothing yet\n")
    assert load_settings(config) == Settings()


def test_an_unknown_key_names_the_file_and_the_nearest_key(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("minuts: 4\n")
    with pytest.raises(UnknownName, match=r"mine\.yaml.*minuts.*Did you mean 'minutes'"):
        load_settings(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b\n", "expected `key: value`"), ("a: [", "not YAML"), ("agents: many", "agents")],
)
def test_an_unreadable_file_is_named(tmp_path, text, words):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    with pytest.raises(UsageError, match=words) as refusal:
        load_settings(config)
    assert "mine.yaml" in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "values",
    [
        {"agents": 1},
        {"agents": 513},
        {"runs": 0},
        {"minutes": -1},
        {"slots": 0},
        {"patience": -1},
        {"device": "tpu"},
        {"agents": 3, "roles": {"verifier": 2}},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UsageError):
        load_settings(None, **values)


def test_parse_roles():
    assert parse_roles("experimenter=4, verifier=2") == {"experimenter": 4, "verifier": 2}
    assert parse_roles("") == {}


@pytest.mark.parametrize("text", ["experimenter", "experimenter=", "verifier=0", "verifier=-1"])
def test_parse_roles_refuses(text):
    with pytest.raises(UsageError, match="name=count"):
        parse_roles(text)


def test_the_usual_roles_are_installed():
    from society.roles import known_roles

    assert set(DEFAULT_ROLES) <= set(known_roles())


@pytest.mark.parametrize(
    "place",
    ["embedded", "off", "http://127.0.0.1:8000", "https://recall.example.org", "http://[::1]:8000"],
)
def test_the_semantic_index_has_a_place(place):
    assert validate({"recall": place}, source="x").recall == place
    assert validate({"recall": f"{place}"}, source="x") == Settings(recall=place)


@pytest.mark.parametrize(
    "place",
    [
        "own", "", "127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://a:99999",
        "http://a/b", "http://user:secret@a:8000",
    ],
)  # fmt: skip
def test_another_place_is_refused(place):
    with pytest.raises(UsageError, match=r"recall: .*choose embedded, off or the address"):
        validate({"recall": place}, source="x")


def test_a_trailing_slash_names_the_same_server():
    assert Settings(recall="http://a:1/").recall == "http://a:1"


def test_a_society_goes_on_with_another_allowance_and_address_but_the_same_model(tmp_path):
    from society.app import resume_settings
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger

    folder = NotebookFolder(tmp_path / "lab").create()
    first = Settings(task="synthetic", endpoint={"model": "a", "max_tokens": 9})
    with Ledger.open(folder.ledger) as ledger:
        ledger.start_society(1, first.model_dump(mode="json"), home=folder.home)
    given = load_settings(
        None, endpoint={"model": "b", "max_dollars": 2.0, "base_url": "http://127.0.0.1:9/v1"}
    )
    found = resume_settings(folder, given).endpoint
    assert (found.model, found.max_tokens, found.max_dollars) == ("a", 9, 2.0)
    assert found.base_url == "http://127.0.0.1:9/v1"
