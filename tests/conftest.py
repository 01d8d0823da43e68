"""A process can hold so many compiled programs: each maps memory, and systems bound the number of
mappings (65,530 on Linux; past it the compiler crashes). A file leaves none behind."""

import gc
import sys
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file() -> Iterator[None]:
    yield
    if shared := sys.modules.get("tests.lsa_models"):
        shared.SharedPrograms.all.clear()
        shared.engine.cache_clear()
    jax.clear_caches()
    gc.collect()
