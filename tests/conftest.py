"""What holds in every test: eight devices, no silent broadcasting, fixed examples."""

import gc
import os
import pathlib

# Eight devices decompose at once: LAPACK's own threads would spin for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

# On the CPU, whatever the machine has, unless the environment asks for another.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Scripts that made reference files, with packages that the project does not use.
collect_ignore_glob = ["*/reference/make_*.py"]

hypothesis.settings.register_profile(
    "optax_cl", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("optax_cl")


def pytest_collection_finish():
    """Spares the collector what lives on; it took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.fixture(scope="module", autouse=True)
def room_for_compiled_programs():
    """Drops compiled programs before they are too many for one process.

    Each takes some ten pieces of mapped memory. Linux gives a process 65,530 of them,
    and the compiler crashes for want of one.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Computes the test in 64 bits, so that an oracle can be met closely."""
    with jax.enable_x64(True):
        yield
