"""What all tests share."""

import atexit
import gc
import sys
import tempfile
from collections.abc import Iterator

import jax
import pytest
from hopper_interpreted import Interpreter, interpreting
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.targets import LIBTPU_ENVIRONMENT


def pytest_configure() -> None:
    """Most of the time goes to compiling, much of it to programs that were compiled before.

    Each worker keeps its own in a folder that ends with it: JAX writes files in place, and others
    might read halves. Commands that tests start have none, since some of them are killed.
    """
    folder = tempfile.TemporaryDirectory(prefix="compiled-")
    atexit.register(folder.cleanup)  # not earlier: a thread may still be compiling
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """Of kernels for Hopper."""
    with interpreting() as made:
        yield made


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """For files that mostly wait for XLA, and whose tolerances do not ask how well it optimised."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def devices_elsewhere() -> Iterator[None]:
    """For files that compile for devices that are not here: JAX's cache would take such programs
    and then could not load them, and libtpu would ask the machine what it is."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIBTPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file() -> Iterator[None]:
    """A process can hold so many compiled programs: each maps memory, and systems bound the number
    of mappings (65,530 on Linux; past it the compiler crashes). A file leaves none behind."""
    yield
    if shared := sys.modules.get("tests.lsa_models"):
        shared.SharedPrograms.all.clear()
        shared.engine.cache_clear()
    jax.clear_caches()
    gc.collect()
