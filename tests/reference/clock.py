"""The clock of the reference: integers, so that sums of times are exact, or float64 seconds."""

from dataclasses import dataclass

TICKS_PER_SECOND = 1 << 30
ARRIVAL_GRID_TICKS = 1 << 10  # arrivals lie on 2^-20 s


@dataclass(frozen=True)
class Clock:
    """One tick is 2^-30 s; without `round_times` times are seconds as they come."""

    round_times: bool

    def ticks(self, seconds: float, grid: int = 1) -> float:
        """Rounded to a multiple of so many ticks, half to even."""
        return round(seconds * (TICKS_PER_SECOND // grid)) * grid if self.round_times else float(seconds)

    def seconds(self, ticks: float) -> float:
        return ticks / TICKS_PER_SECOND if self.round_times else ticks
