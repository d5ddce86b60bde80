"""Python's search for reference cycles while a model is compiled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from llmc.frontend.memory import few_collections


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def _nothing_frozen() -> Iterator[None]:
    """conftest has imported modules stay."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("_nothing_frozen")
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


def test_where_objects_stay_already_nothing_is_added_to_them() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with few_collections() as settled:
        early, stays = weakref.ref(Cycle()), Cycle()
        settled()
        assert early() is None and 0 < gc.get_freeze_count() <= before
        late = weakref.ref(stays)
        del stays
        gc.collect()
        assert late() is None
    assert 0 < gc.get_freeze_count() <= before


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
