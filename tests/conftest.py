"""Set before torch is imported: OpenMP threads that spin while they wait crawl on a machine that is not idle."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
