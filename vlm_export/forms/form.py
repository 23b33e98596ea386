"""What a file may hold, as pydantic has it, and the one line that says what of it is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_export.errors import InputError, shown

Kind = TypeVar("Kind", bound="Form")
LARGEST_ID = 2**31 - 1


class Form(BaseModel):
    """A file's keys. Each has a description, which a message puts behind `it must be`; null is as good as none."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


TokenId = Annotated[int, Field(ge=-1, le=LARGEST_ID)]  # -1 is what some write for none
Switch = Annotated[bool | None, Field(description="true or false")]
Text = Annotated[str | None, Field(description="a text")]
Number = Annotated[float | int | None, Field(description="a number")]
AboveZero = Annotated[
    Annotated[float | int, Field(gt=0, le=1e20)] | None, Field(description="a number above 0, at most 1e20")
]
OneTokenId = Annotated[TokenId | None, Field(description="a token's id")]
TokenIds = Annotated[TokenId | list[TokenId] | None, Field(description="a token's id, or a list of them")]
ListOfTokens = Annotated[list[TokenId] | None, Field(description="a list of token ids")]


def checked(values: Mapping[str, Any], form: type[Kind], path: str) -> Kind:
    """The values of a file, `path`, as its form has them.

    Raises:
        InputError: one is not what it must be.
    """
    try:
        return form.model_validate(values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        must = form.model_fields[key].description
        raise InputError(f"{path}: {key}: is {shown(values.get(key))}; it must be {must}") from error
