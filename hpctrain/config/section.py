"""The base of every section of the configuration, and the types of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator


class Section(BaseModel):
    """A part of the configuration: immutable, closed to keys it does not know, and strict about types.

    ``none`` stands for null in every field that may be left out.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def conflicts(self) -> Iterator[str]:
        """One sentence, with the remedy, for each set of values that cannot hold together."""
        return iter(())

    @model_validator(mode="before")
    @classmethod
    def _none_is_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        nullable = {key for key, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {key: None if value == "none" and key in nullable else value for key, value in values.items()}

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if sentences := list(self.conflicts()):
            raise ValueError("\n".join(sentences))
        return self


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
# Not strict about the sequence (YAML has lists where Python has tuples), strict about its elements.
Pair = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)]
Counts = Annotated[tuple[Positive, Positive], Strict(False)]
PerChannel = Annotated[tuple[float, float, float], Strict(False)]
PositivePerChannel = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Strict(False)]
Epochs = Annotated[tuple[PositiveFloat, ...], Strict(False)]
