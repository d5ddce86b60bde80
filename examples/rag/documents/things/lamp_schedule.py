"""When the lamp of Tarn Skerry Lighthouse is lit: two flashes, then dark."""

PERIOD = 12.0  # seconds
FLASHES = (0.0, 2.5)  # seconds after the period begins
LENGTH = 0.4  # seconds of a flash


def is_lit(seconds: float) -> bool:
    """Whether the lamp is lit at a time."""
    phase = seconds % PERIOD
    return any(start <= phase < start + LENGTH for start in FLASHES)
