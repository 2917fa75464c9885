"""Encode the entries of the compact profile on the device that scores them.

On the host, encoding and decoding take about 3 µs per token at K = 64, as much as all else that a partition costs.
Both compare gaps with the same bounds, so the bytes are the same.

Dimension letters: R positions of a chunk, K kept entries, V vocabulary, C codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dask_logits.cache.profile import Compact, Profile, code_bounds
from dask_logits.teacher.transfer import to_device


class Encoder:
    """Computes the planes of :meth:`~dask_logits.cache.profile.Compact.encode` on a device.

    Parameters
    ----------
    profile
        The profile.
    device
        Device of the targets.
    """

    def __init__(self, profile: Compact, device: torch.device) -> None:
        self._profile = profile
        self._rank_V = to_device(profile.id_rank.astype(np.int32), device)
        self._bounds_C = to_device(code_bounds(profile.precision), device)
        self._gaps_C = to_device(profile.gaps, device)

    def __call__(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the planes of a chunk, and its log-probs as they are read from them.

        Parameters
        ----------
        targets
            ``topk_ids`` [R, K], and ``topk_logprobs`` [R, K] float16 or ``topk_counts`` [R, K].

        Returns
        -------
        dict
            Planes [R, K] uint8, and ``topk_logprobs`` unless the targets are draws.
        """
        profile = self._profile
        rank_RK = self._rank_V[targets["topk_ids"].long()]
        if profile.extras.draws:
            return _planes("topk_ids", rank_RK.where(targets["topk_counts"] > 0, 0), profile.n_id_planes)
        logprobs_RK = targets["topk_logprobs"].float()
        top_R1 = logprobs_RK[:, :1]
        code_RK = torch.bucketize(top_R1 - logprobs_RK, self._bounds_C, right=True)
        step_RK = code_RK.diff(dim=1, prepend=torch.zeros_like(code_RK[:, :1]))
        return {
            **_planes("topk_ids", rank_RK, profile.n_id_planes),
            **_planes("topk_gaps", step_RK, profile.n_gap_planes),
            "topk_logprobs": (top_R1 - self._gaps_C[code_RK]).half(),
        }


def _planes(name: str, values_RK: Tensor, count: int) -> dict[str, Tensor]:
    """Return the bytes of some integers, the lowest first."""
    return {f"{name}_b{i}": (values_RK >> 8 * i & 0xFF).to(torch.uint8) for i in range(count)}


@lru_cache(maxsize=4)
def encoder_for(profile: Profile, device: torch.device) -> Encoder | None:
    """Return the encoder of a profile on a device, or None for the plain profile, which stores targets unchanged."""
    return Encoder(profile, device) if isinstance(profile, Compact) else None
