"""The process of a command: what it says, how it ends, and which files it keeps where."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

USER_ERROR, STOPPED, INTERRUPTED = 2, 3, 130
"""Exit status besides 0: a mistake of the user or a place that cannot be written to, a simulation that a bound stopped,
Ctrl-C."""

_made: list[Path] = []
"""Folders made by this process, the inner ones last."""

_hints: list[str] = []
"""What to say after an interruption."""


def on_interrupt(hint: str) -> None:
    """Say this too, from now on, when Ctrl-C ends the process."""
    _hints.append(hint)


def interrupted() -> str:
    """What an interrupted process says."""
    return "".join(["jaxsim: interrupted", *_hints])


def say(text: str) -> None:
    """A line on standard error, if there is one."""
    # Without a standard error print would turn to standard output.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def fail(message: str) -> int:
    """Say what is wrong; returns the exit status."""
    say(f"jaxsim: error: {message}")
    return USER_ERROR


def drop_output() -> None:
    """Standard output leads nowhere from here on: Python would complain again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def remove_empty_folders() -> None:
    """Those made by this process that nothing was written to."""
    while _made:
        with contextlib.suppress(OSError):
            _made.pop().rmdir()


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, whatever it is doing.

    An exception would wait for the end of a compilation or a simulation, come out of half an import as another
    error, and leave compiled code to be torn down under its own threads.
    """
    if threading.current_thread() is not threading.main_thread() or (
            signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        # Other signals with a handler of Python's write here too.
        while os.read(read, 1) != bytes([signal.SIGINT]):
            pass
        remove_empty_folders()
        with contextlib.suppress(OSError):
            os.write(2, f"{interrupted()}\n".encode())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()


def keep_programs() -> None:
    """Keep compiled programs between runs, in the user's cache folder, unless JAX was told where to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(home) / "jaxsim"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # XLA takes two tuning hints for processor features and calls every program it loads foreign. JAX itself leaves a 1
    # to its children.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def find_devices() -> None:
    """Let JAX look for its devices now. Raises `InputError` where it finds none."""
    import jax

    from jaxsim._core.errors import InputError

    try:
        jax.devices()
    except RuntimeError as error:
        raise InputError("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS"),
                         f"JAX cannot start ({str(error).splitlines()[0]})",
                         "set the environment variable JAX_PLATFORMS=cpu, or unset it") from None


def folder_for(name: str, files: Sequence[str]) -> Path:
    """The folder, made if need be. Raises `InputError` where it or a file in it cannot be written."""
    from jaxsim._core.errors import InputError

    folder, another = Path(name), "give another folder"
    if not name:
        raise InputError("--out", name, "is not a folder", another)
    try:
        for part in reversed((folder, *folder.parents)):
            if not part.exists():
                part.mkdir(exist_ok=True)
                _made.append(part)
        is_folder = folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:
        is_folder = False
    if not is_folder:
        raise InputError("--out", name, "cannot be written", another)
    for path in (folder / file for file in files):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise InputError("--out", name, f"{path.name} in it cannot be replaced", f"remove it, or {another}")
    return folder
