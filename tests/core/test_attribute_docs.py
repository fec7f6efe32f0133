"""The strings under fields as descriptions, in the places where pydantic's own reading of them puts them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llamacpp_mqtt_deploy.schema.attribute_docs import attribute_docs, described


class _Inner(BaseModel):
    """What is inside."""

    depth: int = 0
    """How deep it is."""


class _Base(BaseModel):
    name: str
    """What it is called,
    over two lines."""
    plain: int = 1


class _Outer(_Base):
    """What is outside."""

    plain: int = 2
    """Described below where it was not above."""
    inner: list[_Inner] | None = None
    """Those inside."""
    renamed: str = Field("", alias="Renamed")
    """Under another name."""
    own: str = Field("", description="Said by the field itself.")


def _as_pydantic_would() -> dict[str, Any]:
    class _Inner(BaseModel):
        """What is inside."""

        model_config = ConfigDict(use_attribute_docstrings=True)
        depth: int = 0
        """How deep it is."""

    class _Base(BaseModel):
        model_config = ConfigDict(use_attribute_docstrings=True)
        name: str
        """What it is called,
        over two lines."""
        plain: int = 1

    class _Outer(_Base):
        """What is outside."""

        plain: int = 2
        """Described below where it was not above."""
        inner: list[_Inner] | None = None
        """Those inside."""
        renamed: str = Field("", alias="Renamed")
        """Under another name."""
        own: str = Field("", description="Said by the field itself.")

    return _Outer.model_json_schema()


def test_a_schema_has_the_descriptions_that_pydantic_would_have_read() -> None:
    assert described(_Outer.model_json_schema(), [_Outer]) == _as_pydantic_would()


def test_a_field_that_is_made_again_has_its_newest_description() -> None:
    docs = attribute_docs(_Outer)
    assert docs["name"] == "What it is called,\nover two lines."
    assert docs["plain"] == "Described below where it was not above."
