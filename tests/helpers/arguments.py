"""Settings of a made-up script."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Arguments:
    """A small stand-in for a stage's arguments: parsing TRL's takes a second."""

    output_dir: str = "out"
    learning_rate: float = 1e-3
    seed: int = 0
    max_length: int | None = None
    shuffle: bool = True
    objective: Literal["clm", "mlm"] = "clm"
    schedule: dict | str | None = None
    files: list[str] | None = None
    per_device_train_batch_size: int = 8
    tied: dict = field(default_factory=dict)
