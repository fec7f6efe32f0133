"""What Home Assistant's `hassfest` and HACS ask of an integration's files, held without them."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterator
from typing import Any

import pytest

from llamacpp_mqtt_deploy import __version__
from tests.custom_integration.integration import FOLDER, ROOT, data

MANIFEST: dict[str, Any] = data("manifest.json")
SOURCES = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.py")}


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, tree


TEXTS = dict(leaves(data("strings.json")))


def test_the_manifest_has_what_is_asked_for_in_the_order_that_is_asked_for() -> None:
    names = list(MANIFEST)
    assert names == ["domain", "name", *sorted(set(names) - {"domain", "name"})]
    assert {
        "domain", "name", "codeowners", "config_flow", "dependencies", "documentation", "integration_type", "iot_class",
        "issue_tracker", "requirements", "version",
    } <= set(names)  # fmt: skip
    assert MANIFEST["domain"] == FOLDER.name
    assert re.fullmatch("[a-z0-9_]+", MANIFEST["domain"])
    assert f'DOMAIN: Final = "{MANIFEST["domain"]}"' in SOURCES["const.py"]
    assert MANIFEST["iot_class"] == "local_push"
    assert MANIFEST["integration_type"] in ("service", "hub", "device")
    assert MANIFEST["config_flow"] is True
    assert MANIFEST["mqtt"] == ["llm/status/+"]
    assert MANIFEST["dependencies"] == sorted(MANIFEST["dependencies"]) == ["conversation", "mqtt"]
    assert MANIFEST["requirements"] == [], "Home Assistant pins an older paho-mqtt than the package needs"
    assert MANIFEST["documentation"].startswith("https://")
    assert MANIFEST["issue_tracker"].startswith("https://")


def test_the_version_is_that_of_the_package() -> None:
    assert MANIFEST["version"] == __version__


def test_hacs_finds_one_integration_and_its_name() -> None:
    hacs = json.loads((ROOT / "hacs.json").read_text("utf-8"))
    assert hacs == {"name": MANIFEST["name"], "homeassistant": "2025.12.0"}
    assert [path.parent.name for path in FOLDER.parent.glob("*/manifest.json")] == [FOLDER.name]


def test_the_english_translation_is_the_strings() -> None:
    assert data("translations/en.json") == data("strings.json")


@pytest.mark.parametrize("language", ["de", "en"])
def test_a_translation_has_every_text_with_its_placeholders(language: str) -> None:
    translated = dict(leaves(data(f"translations/{language}.json")))
    assert translated.keys() == TEXTS.keys()
    for key, text in translated.items():
        assert placeholders(text) == placeholders(TEXTS[key]), key
        assert text.strip() == text != "", key
        assert not re.search(r"'\{\w+\}'", text), f"{key}: a placeholder in single quotes is not filled in"
        assert "[%key:" not in text, "references are resolved for Home Assistant's own integrations alone"
        assert not re.search(r"<[a-z/]", text), f"{key}: no HTML in translations"
        assert "://" not in text, f"{key}: addresses belong into placeholders"


def test_only_fields_that_a_form_has_are_described() -> None:
    for key in TEXTS:
        if ".data_description." in key:
            assert key.replace(".data_description.", ".data.") in TEXTS, key


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("name", ["strings.json", "translations/de.json", "translations/en.json"])
def test_texts_stand_in_the_order_of_their_keys(name: str) -> None:
    def check(tree: Any) -> None:
        if isinstance(tree, dict):
            assert list(tree) == sorted(tree)
            for value in tree.values():
                check(value)

    check(data(name))


def test_every_sentence_that_the_code_says_has_a_text_and_every_text_is_said() -> None:
    errors = SOURCES["errors.py"]
    said = set(re.findall(r'sentence_error\(\s*"([a-z_]+)"', "\n".join(SOURCES.values())))
    said |= set(re.findall(r'translation_key="([a-z_]+)"', SOURCES["__init__.py"]))
    said |= set(re.findall(r'": "([a-z_]+)",', errors)) | {"worker_error"}
    said |= set(literal("WhyEnded")) - {"lost", "cut_short"}
    said |= {"only_thought", "empty"}  # chosen by an expression
    texts = {key.split(".")[1] for key in TEXTS if key.startswith("exceptions.")}
    assert said == texts


def literal(name: str) -> list[str]:
    """The values of a Literal type of resend_rules.py."""
    for node in ast.parse(SOURCES["resend_rules.py"]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [str(each.value) for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
    raise AssertionError(name)


def test_every_step_error_and_reason_of_the_flows_has_a_text() -> None:
    flow = SOURCES["config_flow.py"]
    steps = set(re.findall(r'step_id="([a-z_]+)"', flow))
    assert steps == {"confirm", "user", "reconfigure", "set_options"}
    for step in steps - {"set_options"}:
        assert f"config.step.{step}.title" in TEXTS
    reasons = set(re.findall(r'async_abort\(reason="([a-z_]+)"', flow))
    assert {key.split(".")[-1] for key in TEXTS if key.startswith("config.abort.")} >= reasons - {"entry_not_loaded"}
    errors = set(re.findall(r'errors(?:\[[^\]]+\])? ?= ?(?:\{name: )?"([a-z_]+)"', flow))
    assert errors == {key.split(".")[-1] for key in TEXTS if key.startswith("config.error.")}
    for kind in ("conversation", "ai_task_data"):
        assert f"config_subentries.{kind}.abort.entry_not_loaded" in TEXTS
        assert f"config_subentries.{kind}.step.set_options.data.model" in TEXTS


def test_there_is_nothing_that_needs_a_file_which_is_not_there() -> None:
    assert not (FOLDER / "services.yaml").exists(), "no services: actions are those of conversation and ai_task"
    assert "async_register(" not in "".join(SOURCES.values())
    assert "worker_gone" in {key.split(".")[1] for key in TEXTS if key.startswith("issues.")}
