"""One process at a time in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from opcd.errors import InputError
from opcd.runtime.files import make_folder


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Within it no other process works in this folder, where the system can tell.

    what: a run, a loop. Raises InputError for a folder in which another process works, and for one
    that cannot be written.
    """
    make_folder(folder)
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"output_dir must be one {what}'s at a time, got {str(folder)!r}, in which another "
                f"process works; wait for its end, or choose another output_dir"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)
