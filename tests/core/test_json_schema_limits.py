"""A schema whose references lead in a circle or nowhere never reaches an engine; all others do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.conversation import check_tools
from llamacpp_mqtt_deploy.core.json_schema_limits import MAX_EXPANDED_NODES, reference_fault
from tests.support.effort import calls_of
from tests.support.hostile_schemas import ACCEPTED, REFUSED
from tests.support.parsing import ask, refused


def _format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _tool(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_schema_is_refused_with_the_name_of_its_field(name: str) -> None:
    schema = REFUSED[name]
    body = {"prompt": "x", "response_format": _format(schema)}
    assert list(refused(body)) == ["response_format.json_schema.schema"]
    assert list(refused({"prompt": "x", "tools": [_tool(schema)]})) == ["tools[0].function.parameters"]
    assert check_tools([_tool(schema)])


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_schema_that_only_looks_hostile_is_accepted(name: str) -> None:
    schema = ACCEPTED[name]
    assert ask(response_format=_format(schema)).response_format is not None
    assert ask(tools=[_tool(schema)]).tools == (_tool(schema),)


NAMES = ("a", "b", "c")
PART = st.recursive(
    st.sampled_from([{"type": "string"}, {"$ref": "#"}, *({"$ref": f"#/$defs/{name}"} for name in NAMES)]),
    lambda inner: st.one_of(
        st.builds(lambda key, parts: {key: parts}, st.sampled_from(["allOf", "anyOf", "oneOf"]), st.lists(inner, max_size=3)),
        st.builds(lambda part: {"type": "object", "properties": {"p": part}}, inner),
        st.builds(lambda part: {"type": "array", "items": part}, inner),
    ),
    max_leaves=4,
)  # fmt: skip
SCHEMAS = st.builds(lambda root, defs: {**root, "$defs": defs}, PART, st.fixed_dictionaries(dict.fromkeys(NAMES, PART)))


def _walk(schema: Any, root: dict[str, Any], budget: list[int], depth: int = 0) -> None:
    """What an engine without memory does that stops at properties and items: follows all else."""
    budget[0] -= 1
    if budget[0] < 0 or depth > 200:
        raise RecursionError
    if "$ref" in schema:
        _walk(root["$defs"][schema["$ref"][-1]] if schema["$ref"] != "#" else root, root, budget, depth + 1)
    for keyword in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(keyword, ()):
            _walk(part, root, budget, depth + 1)


@given(SCHEMAS)
def test_what_is_accepted_can_be_followed_to_its_end_and_what_is_refused_cannot(schema: dict[str, Any]) -> None:
    ends = True
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            try:
                _walk(part, schema, [MAX_EXPANDED_NODES])
            except RecursionError:
                ends = False
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    assert (reference_fault(schema) is None) == ends


def test_a_schema_may_have_fifty_thousand_parts_with_each_reference_counted_as_what_it_leads_to() -> None:
    def parts(more: int) -> dict[str, Any]:
        # Itself, the definition, and 494 references to it.
        choices = [{"$ref": "#/$defs/hundred"}] * 494 + [{}] * more
        return {"anyOf": [dict(choice) for choice in choices], "$defs": {"hundred": {"anyOf": [{} for _ in range(99)]}}}

    assert 1 + 100 + 494 * 101 + 5 == 50_000
    assert reference_fault(parts(5)) is None
    assert "at most 50000 parts" in (reference_fault(parts(6)) or "")


@pytest.mark.parametrize("keyword", ["allOf", "properties"])
def test_the_largest_schemas_are_checked_in_little_time(keyword: str) -> None:
    def holding(name: str) -> dict[str, Any]:
        parts = [{"$ref": f"#/$defs/{name}"}, {"$ref": f"#/$defs/{name}"}]
        return {"allOf": parts} if keyword == "allOf" else {"properties": dict(zip("pq", parts, strict=True))}

    definitions = {f"{n}": holding(f"{n + 1}") for n in range(300)}
    schema = {"$ref": "#/$defs/0", "$defs": definitions | {"300": {}}}
    assert reference_fault(schema) is not None
    # A way that follows each reference anew takes 2**300 of them.
    assert calls_of(lambda: reference_fault(schema)) < 100_000  # measured: 45 000
