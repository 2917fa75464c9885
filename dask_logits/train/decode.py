"""Decode a compact cache's codes as tensors on the student's device.

The bottleneck of a loader with worker processes is the transport between them, not the decoding. Codes take a third of
the size of decoded entries. The operations are those of :class:`dask_logits.cache.profile.Compact`, on any device.

Dimension letters: N tokens (any leading dimensions), K kept entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dask_logits.cache.profile import Compact
from dask_logits.errors import ConfigError
from dask_logits.train.objective import tails_with_dropped
from dask_logits.train.targets import CodedTargets, SparseTargets


class Decoder(nn.Module):
    """Decodes the targets of a batch. Its tables follow ``.to(device)``.

    Parameters
    ----------
    profile
        Profile of the cache.
    top_k
        Entries to decode. The mass of the others is added to the tail.
    """

    id_table: Tensor
    gap_table: Tensor

    def __init__(self, profile: Compact, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.tables_digest = profile.tables_digest
        self.id_planes = [f"topk_ids_b{i}" for i in range(profile.n_id_planes)]
        self.gap_planes = [f"topk_gaps_b{i}" for i in range(profile.n_gap_planes)]
        self.register_buffer("id_table", torch.from_numpy(profile.id_table.astype("int64")), persistent=False)
        self.register_buffer("gap_table", torch.from_numpy(profile.gaps.copy()), persistent=False)

    def forward(self, coded: CodedTargets) -> SparseTargets:
        """Return the targets with decoded entries.

        Parameters
        ----------
        coded
            ``batch["targets"]`` of a dataset opened with ``decode="device"``.

        Returns
        -------
        SparseTargets
            On the same device. Log-probs are rounded to float16, as in the loader's workers.

        Raises
        ------
        ConfigError
            If the codes are those of a cache with other tables.
        """
        if coded.tables_digest != self.tables_digest:
            raise ConfigError(
                "decoder: expected the codes of its own cache, got those of one with other tables; use the decoder of "
                "the dataset that the batch is from"
            )
        codes = coded.codes
        rank_NK = sum(codes[name].long() << 8 * i for i, name in enumerate(self.id_planes))
        step_NK = sum(codes[name].int() << 8 * i for i, name in enumerate(self.gap_planes))
        assert isinstance(rank_NK, Tensor)
        assert isinstance(step_NK, Tensor)
        # Codes are sums, modulo their width, of bytes or of pairs of bytes.
        code_NK = step_NK.cumsum(-1) & (0xFF if len(self.gap_planes) == 1 else 0xFFFF)
        top_N = codes["top1_logprob"].float()
        logprobs_NK = (top_N[..., None] - self.gap_table[code_NK.long().clamp_(max=len(self.gap_table) - 1)]).half()
        tail_logmass_N = coded.rest.tail_logmass
        tail_logmass_NJ = coded.rest.tail_logmass_NJ
        if self.top_k < logprobs_NK.shape[-1]:
            if tail_logmass_NJ is not None:
                is_dropped_K = torch.arange(logprobs_NK.shape[-1], device=logprobs_NK.device) >= self.top_k
                temperatures = coded.rest.temperatures
                tail_logmass_NJ = tails_with_dropped(tail_logmass_NJ, temperatures, logprobs_NK, is_dropped_K)
            tail_logmass_N = torch.logaddexp(tail_logmass_N, logprobs_NK[..., self.top_k :].float().logsumexp(-1))
        return replace(
            coded.rest,
            topk_ids=self.id_table[rank_NK[..., : self.top_k].clamp_(max=len(self.id_table) - 1)],
            topk_logprobs=logprobs_NK[..., : self.top_k].float(),
            tail_logmass=tail_logmass_N,
            tail_logmass_NJ=tail_logmass_NJ,
        )
