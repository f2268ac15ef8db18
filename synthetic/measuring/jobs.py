"""Worker processes of the benchmarks: one thread each; Ctrl-C or an error cancels jobs that have not begun."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context

from tqdm import tqdm

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes with one thread each. On leaving the block, running jobs are finished and the others cancelled."""
    for name in THREADS:
        os.environ.setdefault(name, "1")  # the workers inherit it
    # Spawned, because a fork would inherit the state of torch's threads.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def finish(futures: Sequence[Future], bar: tqdm) -> list:
    """Results of all futures, in their order. Raises the exception of the first one that fails, at once."""
    for done in as_completed(futures):
        done.result()
        bar.update()
    return [future.result() for future in futures]


def _start_worker() -> None:
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
