"""A copy of a rank's state in host memory, from which a thread writes while training goes on."""

import logging
from collections.abc import Sequence

import torch

from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.parallel.comm import num_bytes


class HostCopy:
    """One flat piece of host memory, as large as the state and kept between saves.

    It is page-locked where the state lies on a GPU, so that copies run at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def copy(self, fragments: Sequence[StateFragment]) -> list[StateFragment]:
        """The same fragments, their tensors in host memory; valid until the next call. The copies are complete.

        Called by the thread that writes; what the state was computed from must be complete on the GPU.
        """
        values = [value for fragment in fragments for value in fragment.values.values()]
        device = next((value.device for value in values if value.is_cuda), None)
        self._reserve(sum(map(_place, values)), locked=device is not None)
        copies, start = [], 0
        stream = torch.cuda.Stream(device) if device else None  # beside what training computes
        with torch.cuda.stream(stream):
            for spec, first, kinds in fragments:
                held = {}
                for kind, value in kinds.items():
                    held[kind] = self._memory.narrow(0, start, num_bytes(value)).view(value.dtype)
                    held[kind].copy_(value, non_blocking=True)
                    start += _place(value)
                copies.append(StateFragment(spec, first, held))
        if stream:
            stream.synchronize()
        return copies

    def _reserve(self, size: int, *, locked: bool) -> None:
        if size <= len(self._memory):
            return
        self.release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if locked:  # registered, not torch's pinned memory, which comes in powers of two
            error = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 1))  # 1: for all contexts
            self._locked = error == 0
            if not self._locked:
                logging.getLogger(__name__).warning("checkpoints: no page-locked memory (CUDA error %d)", error)

    def release(self) -> None:
        """Give the memory back."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._locked = torch.empty(0, dtype=torch.uint8), False


def _place(value: torch.Tensor) -> int:
    """Bytes that a tensor takes, rounded up so that the next one is aligned for any dtype."""
    return -(-num_bytes(value) // 8) * 8
