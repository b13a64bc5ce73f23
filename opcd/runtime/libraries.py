"""How the libraries beneath are set up in a process that is opcd's own, before torch is imported.

A process that merely calls opcd is left as it is.
"""

import os

# What was set here, and not by the user: another program that is started must not get it.
chosen: dict[str, str] = {}

SPINS = "5000"  # of a waiting thread
# Of oneDNN, which keeps the code that it makes for a shape, half a megabyte each, of the last 1,024
# by default. Packed passes have new shapes in every step: of a hundred it has all that come again.
KERNELS = "128"


def set_up_libraries() -> None:
    """Set what the user has not.

    By default OpenMP's threads spin for milliseconds at every small operation, and where another
    process keeps a core busy they take the time of those that they wait for; here they spin for
    some ten microseconds, then sleep. This is for libgomp, which torch's packages for Linux bring.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        _choose("GOMP_SPINCOUNT", SPINS)
    _choose("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    _choose("TRANSFORMERS_VERBOSITY", "error")
    _choose("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _choose(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = chosen[name] = value
