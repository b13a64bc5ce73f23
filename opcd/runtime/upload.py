"""From the host to a device, without waiting for what the device still has to do."""

import torch
from torch import Tensor


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """`x`, made on the host, on `device`.

    A copy from pageable memory, which ``torch.tensor(..., device=...)`` makes too, would hold the
    host until the GPU's queue is empty: nothing is prepared meanwhile, and the GPU idles.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
