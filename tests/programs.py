"""Run a program of ours in a forked process: as `python words...` from the shell, without seconds of imports.

What the parent has imported is there already, so a test of what a program imports or of its start-up time uses a
fresh interpreter instead.
"""

import faulthandler
import logging
import multiprocessing
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_program(
    *words: object, cwd: Path | str = ROOT, timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python words...` prints and its exit code. words: ("-m", module, ...) or (script, ...).

    Raises subprocess.TimeoutExpired, with the stacks of the process in its stderr.
    """
    arguments = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_program(arguments, cwd, environment, out, err)
        process.join(timeout)
        hung = process.is_alive()
        if hung:
            os.kill(process.pid, signal.SIGUSR2)  # prints the stacks
            process.join(0.3)
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.join()
        said, complaints = (path.read_text(errors="replace") for path in (out, err))
    if hung:
        raise subprocess.TimeoutExpired(arguments, timeout, said, complaints)
    return subprocess.CompletedProcess(arguments, process.exitcode, said, complaints)


def start_program(
    arguments: list[str], cwd: Path | str, environment: dict[str, str], out: Path, err: Path
) -> multiprocessing.process.BaseProcess:
    """The forked process, which leads a process group of its own and writes to the files `out` and `err`."""
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(arguments, str(cwd), environment, out, err)
    )
    sys.stdout.flush()
    process.start()
    return process


def _child(arguments: list[str], cwd: str, environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    for number, path, name in ((1, out, "stdout"), (2, err, "stderr")):
        file = open(path, "w", buffering=1)  # noqa: SIM115 - lives as long as the process
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr)
    root = logging.getLogger()
    for handler in list(root.handlers):  # pytest's
        root.removeHandler(handler)
    os.chdir(cwd)
    os.environ.update(environment)
    os._exit(_exit_code(arguments))


def _exit_code(arguments: list[str]) -> int:
    """As the interpreter ends: None is 0, a text is printed and 1, an exception's stack is printed and 1."""
    code: Any = None
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)
