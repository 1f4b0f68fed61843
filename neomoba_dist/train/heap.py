"""On a CPU: let the process keep freed memory, instead of getting every large tensor from the system anew.

glibc maps each large allocation and unmaps it when freed, so that the system clears its pages again at the next one, 4
KiB at a time. A training step frees and allocates the same sizes over and over: its gradients, buckets and activations
cost 105,000 page faults and an eighth of the time of an update of 32M parameters (docs/benchmarks.md). On a GPU torch's
caching allocator does the same.
"""

import ctypes

# of mallopt(3), in <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Serve large allocations from the heap and leave what is freed there. Whether the C library took it (glibc does).

    The process then stays at its peak, which a training step reaches again anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST))
