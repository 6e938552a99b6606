"""Which optimiser steps are not taken: those whose gradient is not finite, or leaps out of the ordinary."""

import math
import statistics

WINDOW = 100  # steps whose gradient norms are remembered
ENOUGH = 50  # of them, before a leap is called one
LEAP = 10.0  # times their median
MOST = 20  # steps in a row before the run stops


class Guard:
    """Judges each step by its gradient's norm before clipping, and counts. Its `record` goes into the checkpoint."""

    def __init__(self, record: dict | None = None) -> None:
        record = record or {"norms": [], "skipped": 0, "in_a_row": 0}
        self.norms: list[float] = list(record["norms"])  # of the last steps that were taken
        self.skipped: int = record["skipped"]
        self.in_a_row: int = record["in_a_row"]

    @property
    def record(self) -> dict:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    @property
    def has_given_up(self) -> bool:
        return self.in_a_row >= MOST

    def passes(self, norm: float) -> bool:
        """Whether to take a step whose gradient has this norm."""
        limit = LEAP * statistics.median(self.norms) if len(self.norms) >= ENOUGH else math.inf
        if math.isfinite(norm) and norm <= limit:
            self.norms = [*self.norms[1 - WINDOW :], norm]
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False
