"""Work beside the work: a thread for what does not hold up the next step, such as writing files."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Beside:
    """Runs functions in a thread, one at a time; used as a context manager, whose end waits for the last one.

    What a function raises is raised by the next call of `begin` or `wait`, or at the end. prepare: called in the
    thread before the first of them.
    """

    def __init__(self, prepare: Callable[[], None] | None = None):
        self._pool = ThreadPoolExecutor(max_workers=1, initializer=prepare)
        self._running: Future | None = None

    def begin(self, function: Callable, *arguments: object) -> None:
        """Start a function. While another runs, wait for its end first: no more than one result is kept waiting."""
        self.wait()
        self._running = self._pool.submit(function, *arguments)

    def wait(self) -> bool:
        """Wait until nothing runs. Returns whether something was still running."""
        running, self._running = self._running, None
        was_running = running is not None and not running.done()
        if running is not None:
            running.result()
        return was_running

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pool.shutdown()
        if error is None:  # else it is the one to be told
            self.wait()
