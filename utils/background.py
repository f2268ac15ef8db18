"""Work beside the work: a thread for what does not hold up the next step, such as writing files."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def one_beside() -> Iterator[Callable[..., None]]:
    """Gives begin(function, *arguments), which runs functions in a thread, one at a time.

    While one runs, a further call waits for its end, so that no more than one result is kept waiting. What a function
    raises is raised by the next call of begin, or at the end of the block, which waits for the last one.
    """
    running: list[Future] = []

    def wait() -> None:
        while running:
            running.pop().result()

    with ThreadPoolExecutor(max_workers=1) as pool:

        def begin(function: Callable, *arguments: object) -> None:
            wait()
            running.append(pool.submit(function, *arguments))

        yield begin
        wait()
