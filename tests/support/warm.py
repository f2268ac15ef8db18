"""Run scripts in processes forked from a warm one, which has imported their libraries and computed nothing.

A script starts at once, not in six seconds; otherwise it runs as with `subprocess`: it is `__main__`, has its own
session, environment, arguments and output, and can be killed. Libraries read some variables, such as HF_HOME, when
they are imported: a test of those needs a process that is not forked.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.warm_imports"])


class Processes:
    """The processes of one script, with the interface of `subprocess.Popen`. If one fails, the others are killed."""

    def __init__(self, processes: list, outputs: list[Connection]):
        self.processes, self.name = processes, processes[0].name
        self.texts: list[str] = ["", ""]
        self.readers = [threading.Thread(target=self._read, args=(i, o)) for i, o in enumerate(outputs)]
        for reader in self.readers:
            reader.start()

    def _read(self, number: int, output: Connection) -> None:
        with os.fdopen(os.dup(output.fileno()), errors="replace", newline="") as file:
            self.texts[number] = file.read()
        output.close()

    @property
    def pid(self) -> int:
        """Of the first process, which has started none of the others."""
        return self.processes[0].pid

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            self.kill()
        return failed[0] if failed else None if None in codes else 0

    @property
    def returncode(self) -> int | None:
        """Exit code of the first process that failed; a signal is negative. None while one runs."""
        return self.poll()

    def kill(self) -> None:
        """Kill the processes and all that they have started."""
        for process in self.processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no session of its own yet
                    process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.exitcode is None], 0.5)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.name, timeout, self.texts[0], self.texts[1])
        return self.poll()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and standard error, each of all processes."""
        self.wait(timeout)
        for reader in self.readers:
            reader.join()
        return self.texts[0], self.texts[1]


def fork(
    script: str,
    arguments: Sequence[object],
    *,
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    prepare: Sequence[Callable[[], object]] = (),
) -> Processes:
    """Run a script (`ggi`) or a module (`synthetic.train`) as `__main__`, in the root of the repository.

    processes: if more than one, they get the environment variables of `accelerate launch` and torchrun. prepare:
    functions of modules that the new processes call first.
    """
    readers, writers = zip(*(FORKS.Pipe(duplex=False) for _ in range(2)), strict=True)
    environment, begun = dict(os.environ if env is None else env), []
    port = str(free_port())
    for rank in range(processes):
        if processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment |= {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        words = [str(word) for word in arguments]
        process = FORKS.Process(target=_become, args=(script, words, environment, writers, prepare), name=script)
        process.start()
        begun.append(process)
    for writer in writers:
        writer.close()
    return Processes(begun, list(readers))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _become(
    script: str,
    arguments: list[str],
    environment: dict[str, str],
    outputs: Sequence[Connection],
    prepare: Sequence[Callable[[], object]],
) -> None:
    os.setsid()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
        output.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    path = ROOT / f"{script}.py"
    sys.argv, sys.path[0] = [f"{script}.py", *arguments], str(ROOT)
    for function in prepare:
        function()
    if path.exists():
        runpy.run_path(str(path), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def use_small_weights() -> None:
    """For `prepare`: make the small weights the tiny ones for the rest of a process."""
    from tests.support import small

    small.use_small_weights(pytest.MonkeyPatch())


def fork_workers() -> None:
    """For `prepare`: let a process fork its workers instead of spawning them."""
    from synthetic.measuring import jobs

    jobs.get_context = lambda method: multiprocessing.get_context("fork")


def fork_stages() -> None:
    """For `prepare`: let generate.py fork its stages instead of starting Python for each."""
    from models.runtime import chain

    chain.subprocess = SimpleNamespace(run=_run_forked)


def _run_forked(
    line: list[str], *, env: Mapping[str, str], preexec_fn: Callable[[], None], check: bool
) -> subprocess.CompletedProcess:
    """`subprocess.run` of a script with its arguments."""
    process = multiprocessing.get_context("fork").Process(target=_become_stage, args=(line, env, preexec_fn))
    process.start()
    process.join()
    return subprocess.CompletedProcess(line, process.exitcode)


def _become_stage(line: list[str], environment: Mapping[str, str], begin: Callable[[], None]) -> None:
    import torch

    begin()
    os.environ.update(environment)
    # OpenMP read it when torch was imported. Not before the fork: torch would replace the threads it had then when
    # first needed, and two threads of transformers that load weights may need them at once.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = line[1:]
    runpy.run_path(line[1], run_name="__main__")
