"""README.md: its commands parse, its files and numbers exist, CI runs its own test command."""

import importlib
import json
import re
import shlex
from unittest import mock

import pytest
from conftest import ROOT

import common

README = (ROOT / "README.md").read_text()
NAMES = re.findall(r"^\| \[`(\w+)\.py`\]", README, re.M)  # of the scripts that are there
SCRIPTS = {f"{name}.py": importlib.import_module(name).CONFIGS for name in NAMES}


def commands():
    """Every shell line of README's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
    return [
        line for block in blocks for line in block.splitlines() if re.match(r"(pip|python|torchrun) ", line)
    ]


def test_the_two_commands_to_start_are_there():
    assert "pip install -e . && python rlt.py" in commands()
    assert 'pip install -e ".[test]" && pytest' in commands()


def test_ci_runs_readmes_own_test_command():
    pattern = re.search(r"grep -m1 -E '([^']+)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    found = [line for line in README.splitlines() if re.search(pattern, line)]
    assert found[0] == 'pip install -e ".[test]" && pytest'


@pytest.mark.parametrize("line", [c for c in commands() if re.search(r"\w+\.py", c)])
def test_every_command_of_readme_is_understood(line, monkeypatch):
    monkeypatch.setattr(common, "need", mock.MagicMock())  # extras need not be here
    words = shlex.split(line)
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    assert (ROOT / words[script]).exists()
    if words[script].startswith("tests/"):
        return
    common.parse_config(SCRIPTS[words[script]], words[script + 1 :])


def test_a_row_for_each_of_ten_methods_and_coming_where_there_is_no_file():
    rows = re.findall(r"^\| \[?`(\w+\.py)`.*$", README, re.M)
    assert len(rows) == len(set(rows)) == 10
    for name in rows:
        line = next(x for x in README.splitlines() if x.startswith(("| `" + name, "| [`" + name)))
        assert ("| coming |" in line) != (ROOT / name).exists()


def test_links_and_extras_exist():
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r'-e "\.\[(\w+)\]"', README):
        assert re.search(rf"^{name} = \[", project, re.M), name


def test_it_has_300_lines_at_most_and_no_placeholder():
    assert README.count("\n") <= 300
    assert not re.search(r"@[A-Z]+@", README)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_has_the_comment_that_help_shows(script):
    source = (ROOT / script).read_text() + (ROOT / "common.py").read_text()
    for name in vars(SCRIPTS[script]["demo"]):
        assert re.search(rf"^    {name}: .*?  # \S", source, re.M), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_quotes_the_demo_that_is_kept_in_assets(script):
    """Claims are those of assets/<script>.json; so is every mean ± interval that the section writes out."""
    kept = json.loads((ROOT / "assets" / f"{script.removesuffix('.py')}.json").read_text())
    section = README.split(f"## {script}\n")[1].split("\n## ")[0]
    assert kept["config"] == "demo" and kept["claims"]
    found = {f"{claim['diff']:.3f} ± {claim['ci95']:.3f}" for claim in kept["claims"]}
    for claim in kept["claims"]:
        line = next(x for x in section.splitlines() if f"| {claim['text']} |" in x)
        ours, theirs, diff, half = (claim[k] for k in ("mean_ours", "mean_theirs", "diff", "ci95"))
        numbers = f"| {ours:.3f} | {theirs:.3f} | {diff:.3f} ± {half:.3f} |"
        assert line.endswith(numbers + (" yes |" if claim["holds"] else " no |"))
    for cells in kept["table"].values():
        for metric in cells[0]:
            values = [cell[metric] for cell in cells]
            if None not in values:
                found.add("{:.3f} ± {:.3f}".format(*common.interval(values)))
    assert set(re.findall(r"-?\d+\.\d{3} ± \d+\.\d{3}", section)) <= found
