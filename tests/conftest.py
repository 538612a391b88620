"""Shapes and types in the signatures of these modules are checked whenever tests call them."""

import tensordict  # noqa: F401  # before the first run with processes, which inherit what was imported by then
from jaxtyping import install_import_hook

CHECKED = ["rookery.estimators", "rookery.data.unroll"]

# The hook works on what is imported after it; an int passes for a float (PEP 484).
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
