"""The variables that libraries read while they are imported; this module is imported before them."""

import os


# If it is set, a script reads its settings, says what is wrong with them, and does nothing else.
ONLY_SETTINGS = "SANDAN_ONLY_SETTINGS"


def set_defaults() -> None:
    """Set the variables that every process of this project starts with; those that the user has set stay."""
    # Threads that spin while they wait for one another take the core that another program needs: with two threads on
    # two busy cores a step took 1,151 ms, with sleeping ones 254 (docs/benchmarks.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
