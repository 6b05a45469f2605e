"""Fixtures every test may use."""

import gc
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest


def pytest_configure(config):
    """Compiled programs are kept for the session, whoever compiled them: another worker, or a command that a test ran.

    What is kept is the machine code that compiling it again would give.
    """
    config.addinivalue_line("markers", "slow: other sizes of what the rest has shown, in programs of their own")
    config.addinivalue_line("markers", "unoptimised: programs of this file are compiled quickly, to slower code")
    # Tracing and the reference simulator make many small objects, none of them in cycles worth looking for so often.
    gc.set_threshold(200_000, 20, 100)
    # What is started in the background may be told to ignore Ctrl-C, and then so are the commands that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="jaxsim-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True, scope="module")
def optimisation(request):
    """Programs as users get them, but in files marked `unoptimised`, there also in the processes that a test starts.

    That is for what no rounding decides and compiles longer than it runs: searches, closed forms and gradients within a
    tolerance, dyadic numbers, runs of one program against each other. Not marked are the comparison of every preset
    with the reference, its laws and the text of its programs, what sums of real costs must not depend on, and queues.
    Some marked files read the text of a program of their own feature: what these show of it holds for quick programs.
    """
    is_quick = request.node.get_closest_marker("unoptimised") is not None
    if is_quick:
        import jax
    jax = sys.modules.get("jax")
    if jax is None or jax.config.values["jax_disable_most_optimizations"] == is_quick:
        return
    jax.config.update("jax_disable_most_optimizations", is_quick)
    if is_quick:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    else:
        del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
        # No other file is to meet these programs.
        jax.clear_caches()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, tests that share a compiled program go to one process, which compiles it once.

    Tests of the plain engine name their program as PRESET-INSTANCES in brackets; others of the engine share theirs
    within the files of one subject (`test_real_*`). All others are distributed by file.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByProgram(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            plain = r"^tests/engine/test_(?:parity|laws|arrivals|compiled)\.py"
            program = re.search(plain + r".*\[([a-z0-9-]+-\d)\]$", nodeid)
            subject = re.search(r"^tests/engine/test_[a-z]+", nodeid)
            return program[1] if program else subject[0] if subject else nodeid.split("::")[0]

    return ByProgram(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of measured data: $JAXSIM_SHARED_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("JAXSIM_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no measured data at {folder} (set JAXSIM_SHARED_DATA)")
    return folder
