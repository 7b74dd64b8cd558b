"""The workflow's own text: every rule is a thin, logged `shell:` command, and everything it names exists."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from harness.targets import TARGETS

DIRECTIVE = re.compile(r"^( +)([a-z_]+):", re.MULTILINE)
RULE = re.compile(r"^( *)(?:rule|checkpoint)(?: +(\w+))? *:", re.MULTILINE)


def workflow_files(root: Path) -> list[Path]:
    return [root / "Snakefile", *sorted((root / "workflows").glob("**/*.smk"))]


def rules(text: str) -> list[tuple[str, str]]:
    """Name (empty for one made in a loop) and body of every rule in `text`."""
    found = []
    for head in RULE.finditer(text):
        body = []
        for line in text[head.end() :].splitlines()[1:]:
            if line.strip() and len(line) - len(line.lstrip()) <= len(head[1]):
                break
            body.append(line)
        found.append((head[2] or "", "\n".join(body)))
    return found


def directives(body: str) -> set[str]:
    indents = [len(match[1]) for match in DIRECTIVE.finditer(body)]
    return {match[2] for match in DIRECTIVE.finditer(body) if len(match[1]) == min(indents)}


def all_rules(root: Path) -> list[tuple[str, str]]:
    return [rule for path in workflow_files(root) for rule in rules(path.read_text())]


def test_the_rules_are_found(root: Path) -> None:
    names = {name for name, _ in all_rules(root)}
    assert {"find_dataset", "run_series", "write_table", "draw_figure", "judge_claims", "claims", "doctor", "all"} <= names
    assert (
        rules("rule a:\n    input:\n        'x',\n    run:\n        print()\n\nrule b:\n    log:\n        'l',\n")[0][0] == "a"
    )
    assert directives("    input:\n        'x',\n    run:\n        y: 1\n") == {"input", "run"}


def test_no_rule_has_a_run_block_or_a_script(root: Path) -> None:
    for name, body in all_rules(root):
        assert not directives(body) & {"run", "script", "notebook", "wrapper"}, name


def test_every_rule_that_does_something_has_a_log_and_an_environment(root: Path) -> None:
    working = [(name, body) for name, body in all_rules(root) if "shell" in directives(body)]
    assert len(working) >= 8
    for name, body in working:
        assert {"log", "conda"} <= directives(body), name
        assert "{log:q}" in body, name


def test_commands_are_our_modules_and_quote_what_they_are_given(root: Path) -> None:
    for name, body in all_rules(root):
        shell = body.partition("shell:")[2]
        for module in re.findall(r"python -m ([\w.]+)", shell):
            assert importlib.util.find_spec(module), (name, module)
        assert bool(shell) == bool(re.search(r"python -m (harness|systems)\.", shell)), name
        assert not re.findall(r"\{(?!\{)[^}]*(?<!:q)\}", shell), f"{name}: quote with :q"


def test_no_lambdas_and_no_paths_of_one_machine(root: Path) -> None:
    for path in workflow_files(root):
        assert "lambda" not in path.read_text()
        assert not re.search(r"[\"']/\w", path.read_text())


def test_targets_of_the_workflow_are_kept_from_figures(root: Path) -> None:
    fixed = {
        name for name, body in all_rules(root) if name and "wildcards" not in body and "{" not in body.partition("shell")[0]
    }
    assert {"all", "claims", "doctor"} <= fixed
    assert fixed <= TARGETS | {""}


def test_the_environment_for_conda_has_what_the_package_needs(root: Path) -> None:
    packages = yaml.safe_load((root / "workflows" / "envs" / "fivefold.yaml").read_text())["dependencies"][-1]["pip"]
    assert packages == tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.mark.parametrize("profile", ["profiles/default", "slurm"])
def test_profiles_name_options_that_snakemake_has(root: Path, profile: str) -> None:
    from snakemake.cli import get_argument_parser

    known = {option.lstrip("-") for action in get_argument_parser()._actions for option in action.option_strings}
    told = yaml.safe_load((root / profile / "profile.v9+.yaml").read_text())
    assert set(told) <= known
    assert told["rerun-incomplete"] is True and told["cores"] == "all"
