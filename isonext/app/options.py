"""What app.py is asked for, as data. Nothing here imports torch or gradio."""

from dataclasses import dataclass
from pathlib import Path

from isonext.inference.options import check_range


@dataclass(frozen=True)
class AppOptions:
    runs: Path  # where checkpoints are found, and where trainings write
    pictures: Path  # below it the folders that may be trained on
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int | None = None  # None: the first that is free from 7860 on
    share: bool = False

    def __post_init__(self) -> None:
        check_range("port", self.port, 1, 65535)
