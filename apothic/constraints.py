from __future__ import annotations
from typing import Any
from pydantic import BaseModel, ConfigDict
class PlacementConstraints(BaseModel):
    model_config = ConfigDict(frozen=True)
    gpu_count: int | None = None
    @classmethod
    def check(cls, **v: Any) -> PlacementConstraints:
        return cls(gpu_count=v.get("gpu_count"))
