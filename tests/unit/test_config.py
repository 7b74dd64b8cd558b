"""Configuration: what is refused, and how it is said; schemas in step with the models; YAML without surprises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from harness import validation
from harness.config import Config, load_config
from harness.safe_yaml import read_mapping
from harness.validation import Model, Wrong, schema, suggest, validate
from systems.registry import InputError


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_shipped_configuration_is_the_default_and_the_readme_names_every_key(root: Path) -> None:
    assert load_config(root / "config" / "config.yaml") == Config()
    said = read_mapping(root / "config" / "config.yaml")
    readme = (root / "config" / "README.md").read_text()
    for key in Config.model_fields:
        assert key in said
        assert f"`{key}`" in readme


def test_overrides_go_over_the_file_and_are_checked_in_their_own_name(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 3\nscale: smoke\n")
    assert load_config(path, {"seed": 5}) == Config(seed=5, scale="smoke")
    assert refusal(path, {"sede": 5}) == "--config: sede: 5: unknown key, did you mean seed?"
    assert refusal(path, {"scale": "small"}).startswith("--config: scale: 'small': unknown value")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hardwear: paper", "hardwear: 'paper': unknown key, did you mean hardware?"),
        ("colour: red", "colour: 'red': unknown key, use one of backend, dataset_mirror, hardware,"),
        ("backend: cuda", "backend: 'cuda': unknown value, use one of simulated, measured, recorded"),
        ("seed: many", "seed: 'many': use a valid integer"),
        ("seed: 1\nseed: 2", "line 2: 'seed': this key is there twice: keep one"),
        ("seed: [1", "line 2: "),
        ("- seed", "line 1: ['seed']: write a mapping"),
        ("results: 'a{b}'", "results: 'a{b}': use text of the pattern"),
        ("dataset_mirror: nowhere", "dataset_mirror: 'nowhere': no such folder"),
        ("seed: !!python/object/apply:os.getpid []", "line 1: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    assert refusal(path).startswith(f"{path}: {said}")


def test_a_missing_or_unreadable_file_is_said(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "readable text file" in refusal(tmp_path / "binary.yaml")


def test_folders_of_runs_keep_apart_what_differs() -> None:
    assert Config().run_name == "paper-simulated"
    assert Config(hardware="h100x2", backend="measured", scale="smoke").run_name == "h100x2-measured-smoke"


def test_yaml_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "a: 1e-3\nb: on\nc: 1:30\nd: 010\ne: .inf\nf: 2024-01-01\ng: -.5\nh: ~\ni: 1_000\nj: true\nk: 7\n"
    said = read_mapping(written(tmp_path, text))
    assert said == {
        "a": 0.001,
        "b": "on",
        "c": "1:30",
        "d": "010",
        "e": math.inf,
        "f": "2024-01-01",
        "g": -0.5,
        "h": None,
        "i": "1_000",
        "j": True,
        "k": 7,
    }


@given(st.integers() | st.floats(allow_nan=False))
def test_numbers_survive_yaml(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    text = str(number) if math.isfinite(number) else f"{'-' if number < 0 else ''}.inf"
    path = tmp_path_factory.mktemp("yaml") / "number.yaml"
    path.write_text(f"n: {text}\n")
    found = read_mapping(path)["n"]
    assert found == number and type(found) is type(number)


class _Inner(Model):
    low: float = Field(gt=0)
    high: float = 1.0


class _Outer(Model):
    inner: dict[str, _Inner]
    several: list[_Inner | int] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"inner": {"a": {"low": 1, "hihg": 2}}}, "f: inner.a.hihg: 2: unknown key, did you mean high?"),
        ({"inner": {"a": {}}}, "f: inner.a.low: '(absent)': add this key"),
        ({"inner": {"a": {"low": 0}}}, "f: inner.a.low: 0: use greater than 0"),
        ({"inner": {}, "several": [1, {"low": 1, "lo": 3}]}, "f: several.1.lo: 3: unknown key, did you mean low?"),
        ({"inner": {"a": {"low": math.nan}}}, "f: inner.a.low: nan: use a finite number"),
        ({"iner": {}}, "f: iner: {}: unknown key, did you mean inner?"),
    ],
)
def test_keys_are_dotted_to_where_they_are(data: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(_Outer, data, "f")
    assert str(caught.value).startswith(said)


def test_a_validator_may_name_the_key_that_is_wrong() -> None:
    error = Wrong("a.b", 3, "use 4")
    assert (error.key, error.value, error.mend) == ("a.b", 3, "use 4")


def test_suggestions_are_close_or_complete() -> None:
    assert suggest("simulate", ["measured", "simulated"]) == ", did you mean simulated?"
    assert suggest("x", ["measured", "simulated"]) == ", use one of measured, simulated"
    assert suggest("x", []) == ""


@pytest.mark.parametrize("name", validation.MODELS)
def test_schemas_are_in_step_with_the_models_and_refuse_unknown_keys(root: Path, name: str) -> None:
    """Mend with `python -m harness.validation --write-schemas`."""
    text = (root / validation.SCHEMAS / f"{name}.schema.json").read_text()
    assert text == schema(name)
    parsed = json.loads(text)
    objects = [parsed, *parsed.get("$defs", {}).values()]
    for found in objects:
        if "properties" in found:
            assert found["additionalProperties"] is False, found.get("title")


@pytest.mark.parametrize(
    ("key", "value"),
    [("api_key", "hush"), ("results", "hf_" + "aB3" * 8), ("token", "x"), ("dataset_mirror", "https://me:hush@example.org/d")],
)
def test_a_secret_is_refused_and_never_shown(tmp_path: Path, key: str, value: str) -> None:
    in_file = refusal(written(tmp_path, f"{key}: {value}\n"))
    on_command_line = refusal(written(tmp_path, "seed: 0\n"), {key: value})
    for line in (in_file, on_command_line):
        assert key in line and "env:NAME" in line and value not in line
