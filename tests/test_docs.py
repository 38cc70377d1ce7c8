"""The documentation says what is true: links, commands, options, tables and the example role."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from society.cli import app
from society.experiments import Space, load_task
from society.roles import experimenter, meta_analyst, statistician, verifier

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
DUTY = re.compile(r'(?:Duty\(\s*self\.name,|self\._run\()\s*"(\w+)"([^)]*)')
ROW = re.compile(r"^\| ([\w-]+) \| `(\w+)` \| ([\d a-z]+) \|", re.MULTILINE)


def commands():
    """(page, command line) of every line of a bash block."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in block.strip().splitlines():
                yield pytest.param(line, id=f"{page.name}: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("line", list(commands()))
def test_commands_exist(line):
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:1] == ["society"] or words[:3] == ["python", "-m", "society"]:
        check(words[1:] if words[0] == "society" else words[3:])
    elif words[:1] == ["python"]:
        assert (ROOT / words[1]).is_file()
    elif words[0] != "pip":
        assert (ROOT / words[0]).is_file()


def check(words):
    """The words are a command of ours with options that it has."""
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, words[0]
        command, words = command.commands[words[0]], words[1:]
    known = {name for option in command.params for name in option.opts}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, word


def test_the_cli_page_names_every_command_and_every_option_of_run():
    text = (ROOT / "docs/cli.md").read_text()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"society {name}" in text
        if name == "run":
            for option in command.params:
                if option.name != "lab":
                    assert f"`{option.opts[0]}" in text, option.opts
    for name in group.commands["memory"].commands:
        assert f"society memory {name}" in text


def test_the_example_role_is_in_the_docs_word_by_word():
    code = (ROOT / "docs/example_role.py").read_text()
    assert len(code.splitlines()) <= 30
    assert f"```python\n{code}```" in (ROOT / "docs/roles.md").read_text()


def test_the_table_of_duties_is_that_of_the_code():
    rows = ROW.findall((ROOT / "docs/roles.md").read_text())
    documented = {(role, duty): value for role, duty, value in rows}
    found = {}
    for module in (experimenter, verifier, statistician, meta_analyst):
        role = module.__name__.rpartition(".")[2].replace("_", "-")
        for duty, fields in DUTY.findall(Path(module.__file__).read_text()):
            value = re.search(r"value=([\d.]+)", fields)
            found[role, duty] = value.group(1) if value else ""
    assert set(documented) == set(found)
    for key, value in found.items():
        assert documented[key].split()[0] == value, key


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def test_the_table_of_knobs_is_that_of_the_recipe():
    space = Space.of(load_task("pretrain", "cpu"))
    page = (ROOT / "docs/trainer.md").read_text().partition("## Knobs")[2]
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\S+) \| (.*) \|$", page, re.MULTILINE)
    told = {name: (group, default, rest) for group, name, default, rest in rows if name != "knob"}
    assert list(told) == list(space.knobs)
    for name, knob in space.knobs.items():
        group, default, rest = told[name]
        shown = space.default(name)
        assert (group, default) == (knob.group, plainly(shown))
        assert rest.endswith(f"| {knob.unit} | {knob.about} | {knob.source}"), name
        values = knob.choices or [knob.low, knob.high] * (type(shown) is not bool)
        for value in values:
            assert plainly(value) in rest, name


def plainly(value):
    return f"{value:g}" if type(value) is float else str(value)
