"""What holds for every test: signatures' shapes and types are checked at each call, and Ctrl-C is heard."""

import signal

import tensordict  # noqa: F401  # before the first run with processes, which inherit what was imported by then
from jaxtyping import install_import_hook

CHECKED = ["rookery.estimators", "rookery.data.unroll"]

# The hook works on what is imported after it; an int passes for a float (PEP 484).
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# A shell lets its background jobs ignore SIGINT, and what they start inherits that; from here on it is as in front.
signal.signal(signal.SIGINT, signal.default_int_handler)
