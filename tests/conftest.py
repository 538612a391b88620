"""What holds for every test: signatures' shapes and types are checked at each call, and no signal stays blocked."""

import signal
from collections.abc import Iterator

import pytest
import tensordict  # noqa: F401  # before the first run with processes, which inherit what was imported by then
from jaxtyping import install_import_hook

CHECKED = ["rookery.estimators", "rookery.data.unroll"]

# The hook works on what is imported after it; an int passes for a float (PEP 484).
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(autouse=True)
def no_signal_stays_blocked() -> Iterator[None]:
    """Processes would inherit that, and be deaf to Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    after = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert after == before
