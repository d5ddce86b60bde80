"""Python's search for reference cycles while a model is compiled."""

from __future__ import annotations

import gc
import weakref

import pytest
from llmc.frontend.memory import few_collections


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_cycles_are_looked_for_once_and_all_is_as_it_was_in_the_end() -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with few_collections() as settled:
        assert not gc.isenabled()
        early = weakref.ref(Cycle())
        stays = Cycle()
        assert early() is not None
        settled()
        assert early() is None
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        late = weakref.ref(stays)
        del stays
        gc.collect()
        assert late() is not None, "it was there when all was settled"
    gc.collect()
    assert late() is None
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_and_a_caller_who_wants_no_collection(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(KeyError), few_collections():
            raise KeyError
        assert gc.isenabled() is enabled
        with few_collections() as settled:
            settled()
            assert gc.isenabled() is enabled
    finally:
        gc.enable()
