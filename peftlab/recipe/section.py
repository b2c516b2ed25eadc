"""The base class of all recipe sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from peftlab.specs.storages import STORAGES

if TYPE_CHECKING:
    StorageName = str
else:
    StorageName = Literal[tuple(STORAGES)]

DType = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_defaults(cls, value: Any) -> Any:
        return {} if value is None else value

    def _reject_unless_default(self, names: list[str], reason: str) -> None:
        """Raises ValueError for keys without effect: nothing in a recipe is ever ignored."""
        idle = [
            n for n in names if getattr(self, n) != type(self).model_fields[n].get_default(call_default_factory=True)
        ]
        if idle:
            raise ValueError(f"{', '.join(idle)}: has no effect {reason}; remove it")
