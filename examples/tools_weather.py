"""Tools for `llmc agent`: functions that a model may call.

    llmc agent MODEL.llmc "Will I need an umbrella in Oslo tomorrow?" --tools examples/tools_weather.py

What a function takes is told by its types, what it is for by its docstring. The forecasts are made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmc import tool

Day = Literal["today", "tomorrow"]

_FORECASTS = {
    ("bergen", "today"): ("rain", 11.0),
    ("bergen", "tomorrow"): ("rain", 10.0),
    ("oslo", "today"): ("sun", 17.0),
    ("oslo", "tomorrow"): ("rain", 13.0),
}
_reminders: list[str] = []


@dataclass(frozen=True)
class Forecast:
    """What the weather will be; `temperature` in degrees Celsius."""

    city: str
    day: Day
    sky: str
    temperature: float


@tool
def forecast(city: str, day: Day = "today") -> Forecast:
    """Get the weather forecast of a city.

    Args:
        city: Its name, for example Oslo.
        day: Of which day.
    """
    found = _FORECASTS.get((city.strip().lower(), day))
    if found is None:
        known = sorted({name.title() for name, _ in _FORECASTS})
        raise LookupError(f"there is no forecast of {city}, only of {', '.join(known)}")
    return Forecast(city, day, *found)


@tool(effects=True)
def remind(text: str) -> str:
    """Set a reminder for tomorrow morning.

    Args:
        text: What to be reminded of.
    """
    _reminders.append(text)
    return f"{len(_reminders)} reminder(s) are set"
