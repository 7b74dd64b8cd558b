"""Dockerfiles: what templates may do, and that nothing in a file of the user's can add an instruction to one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from harness.containers.models import FOLDER, LABEL, Base, Image, Site, load_images, load_site
from harness.containers.render import FILTERS, LABELS, NO_FACTS, Facts, render
from systems.registry import InputError

BASE = Base(image="python:3.11.13-slim", python="3.11")
INJECTIONS = [
    "'; touch PWNED #",
    "$(touch PWNED)",
    "`touch PWNED`",
    "a\nRUN touch PWNED",
    "x\\\nRUN touch PWNED",
    "é\u2028ü",
    "$HOME",
]


def image(**changes: Any) -> Image:
    return Image.model_validate({"title": "t", "template": "a.Dockerfile.j2", "base": "python", "locks": ["a.lock"], **changes})


def rendered(tmp_path: Path, template: str, entry: Image | None = None, facts: Facts = NO_FACTS) -> str:
    (tmp_path / "a.Dockerfile.j2").write_text(template)
    return render(tmp_path, "a", entry or image(), BASE, Site(), facts)


def instructions(dockerfile: str) -> list[str]:
    """The instructions, as Docker reads lines: a backslash at its end continues one, a comment is none."""
    lines = [line for line in dockerfile.split("\n") if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [line for line in joined.split("\n") if line.strip()]


@pytest.mark.parametrize("name", ["controller", "engine-cpu", "engine-cuda"])
def test_our_images_are_pinned_and_run_as_nobody_in_particular(root: Path, name: str) -> None:
    images = load_images(root)
    entry = images.image(name)
    text = render(root / FOLDER, name, entry, images.bases[entry.base], Site())
    words = [line.split()[0] for line in instructions(text)]
    assert set(words) <= {"FROM", "LABEL", "RUN", "COPY", "WORKDIR", "ENV", "USER", "CMD"}
    assert [line for line in instructions(text) if line.startswith("USER")] == ["USER 10001:10001"]
    assert words.index("USER") == len(words) - 2, "nothing but CMD may follow USER"
    assert text.count("--require-hashes") == len(entry.locks)
    assert all(f'{LABEL}.{label}="' in text for label in LABELS)
    assert "ADD" not in words and "curl" not in text and "privileged" not in text
    for lock in entry.locks:
        pins = [line for line in (root / lock).read_text().splitlines() if re.match(r"[a-z0-9]", line)]
        assert pins and all("==" in pin for pin in pins)
        assert "--hash=sha256:" in (root / lock).read_text()


def test_without_a_network_nothing_is_fetched(root: Path) -> None:
    images = load_images(root)
    site = Site(packages="wheelhouse", system_packages=False, bases={"python": "local/python:1"})
    for name, entry in images.images.items():
        text = render(root / FOLDER, name, entry, images.bases[entry.base], site)
        assert "http" not in text and "apt-get" not in text and text.count("--no-index") == len(entry.locks)
    assert "FROM local/python:1 AS system" in render(root / FOLDER, "controller", images.image("controller"), BASE, site)


def test_every_value_in_our_templates_goes_through_a_filter(root: Path) -> None:
    templates = list((root / FOLDER).glob("*.j2"))
    assert len(templates) >= 4
    for template in templates:
        for value in re.findall(r"{{(.*?)}}", template.read_text()):
            literal = value.strip().startswith('""')  # "" or " \\" at the end of a list: the template's own text
            assert literal or value.rpartition("|")[2].strip() in FILTERS, f"{template.name}: {value}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("FROM {{ bsae }}", "'bsae' is undefined"),
        *((f"FROM {{{{ bsae | {name} }}}}", "'bsae' is undefined") for name in FILTERS),
        ("FROM x\n{{ base.nothing }}", "no attribute 'nothing'"),
        ("{% for x in y", "line 1"),
        ("a\n{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ variables.update({}) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no such template"),
        ("{{ title | nofilter }}", "nofilter"),
    ],
)
def test_a_bad_template_is_one_line(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        rendered(tmp_path, template)
    text = str(caught.value)
    assert "a.Dockerfile.j2" in text and said in text and "\n" not in text


def test_the_line_of_a_mistake_in_a_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3"):
        rendered(tmp_path, "FROM x\n\n{{ bsae }}\n")


def test_a_missing_template_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such template"):
        render(tmp_path, "a", image(), BASE, Site())


TEMPLATE = (
    "# {{ title | words }}\nFROM {{ base | reference }}\nRUN pip {{ options['a.lock'] | shell }}\n"
    '{% for variable, value in variables.items() %}\nENV {{ variable | word }}="{{ value | quoted }}"\n{% endfor %}\n'
)


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_value_stays_a_value(tmp_path: Path, text: str) -> None:
    try:
        entry = image(variables={"A": text}, title=text)
    except ValueError:
        assert re.search(r"[\x00-\x1f\x7f]", text)  # what ends a line is refused with the file
        return
    told = instructions(rendered(tmp_path, TEMPLATE, entry))
    assert [line.split()[0] for line in told] == ["FROM", "RUN", "ENV"]
    assert not re.search(r"(?<!\\)\$", told[2])


@given(st.text())
def test_a_quoted_value_is_one_value(text: str) -> None:
    try:
        quoted = FILTERS["quoted"](text)
    except TemplateError:
        assert re.search(r"[\x00-\x1f\x7f]", text)
        return
    assert re.fullmatch(r'(?:[^"\\$]|\\["\\$])*', quoted)
    assert re.sub(r'\\(["\\$])', r"\1", quoted) == text


@pytest.mark.parametrize("key", ["image", "template", "base", "lock", "system_packages", "index_url"])
@pytest.mark.parametrize("text", INJECTIONS)
def test_names_refuse_what_is_no_name(key: str, text: str) -> None:
    with pytest.raises(ValueError):
        Base(image=text, python="3.11") if key == "image" else image(**{key: [text] if key.endswith("s") else text})


@pytest.mark.parametrize("reference", ["python", "python:latest", "host:5000/python", "python:3@sha1:1"])
def test_a_base_that_moves_is_refused(reference: str) -> None:
    if reference.startswith("python:3"):
        assert Base(image=reference, python="3.11")
        return
    with pytest.raises(ValueError, match="pin it"):
        Base(image=reference, python="3.11")


def images_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "images.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "bases: {}\nimages: {a: {title: t, template: a.Dockerfile.j2, base: b, locks: [l]}}",
            "images.a.base: 'b': unknown base",
        ),
        ("bases: {b: {image: 'x', python: '3.11'}}\nimages: {}", "pin it: x:<version>"),
        ("bases: {}\nimages: {}\nimagse: {}", "did you mean images?"),
        ("bases: {}\nimages: {a: {title: t, template: ../a.Dockerfile.j2, base: b, locks: [l]}}", "images.a.template"),
        ("bases: {}\nimages: {a: {title: t, template: a.Dockerfile.j2, base: b, locks: [../l]}}", "images.a.locks"),
        ("bases: {}\nimages: {}\ntoken: hf_aaaaaaaaaaaaaaaaaaaaaaaa", "(hidden)"),
    ],
)
def test_a_bad_file_of_images_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_images(images_file(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_image_is_named_with_what_was_meant(root: Path) -> None:
    with pytest.raises(InputError, match="did you mean controller"):
        load_images(root).image("controler")


@pytest.mark.parametrize(
    ("site", "ok"),
    [
        ({}, True),
        ({"engine": "ssh://me@gpu1"}, True),
        ({"engine": "-oProxyCommand=x"}, False),
        ({"registry": "127.0.0.1:5000/fivefold"}, True),
        ({"registry": "a b"}, False),
        ({"index_url": "https://me:secret@pypi.example.org/simple"}, False),
        ({"bases": {"python": "x; touch PWNED"}}, False),
        ({"packages": "whelhouse"}, False),
    ],
)
def test_a_site_says_what_it_has(tmp_path: Path, site: Mapping[str, Any], ok: bool) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(repr(dict(site)))
    if ok:
        assert load_site(path).model_dump(exclude_defaults=True) == site
    else:
        with pytest.raises(InputError, match=r"site\.yaml"):
            load_site(path)
    assert load_site(tmp_path / "none.yaml") == Site()
