"""pass@k: the chance that at least one of k samples is right, estimated from more samples than that.

Reference: Chen et al., "Evaluating large language models trained on code", 2021, https://arxiv.org/abs/2107.03374
"""

from __future__ import annotations

import numpy as np


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), unbiased for one item: pass_at_k(5, 2, 1) -> 0.4. Needs 1 <= k <= num_samples."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be from 1 to the number of samples, {num_samples}, got {k}")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"of {num_samples} samples {num_right} cannot be right")
    if num_samples - num_right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1)))
