"""Run a script in this process, and say what it took: seconds, and the largest memory on the GPU.

    python -m benchmarks.peak ggi.py --target assets/sampleA/multiviews/RUN --memory low

The peak is what torch had allocated, as the memory plan counts it; compare it with the plan that the script prints.
"""

import runpy
import sys
import time

from utils.files import show_bytes


def main() -> None:
    sys.argv = sys.argv[1:]
    if not sys.argv:
        sys.exit("error: which script? python -m benchmarks.peak SCRIPT …")
    began, code = time.perf_counter(), None
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    import torch

    peak = show_bytes(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else "not measured"
    print(f"{sys.argv[0]}: {time.perf_counter() - began:.1f} s, peak {peak}", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
