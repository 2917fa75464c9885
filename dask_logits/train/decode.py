"""A compact cache's codes as tensors, decoded where the student is.

What limits a loader with worker processes is the transport between them, not the decoding; codes are a third of decoded
entries. The operations are those of :class:`dask_logits.store.profile.Compact`, on whichever device the batch is.

Dimension letters: N tokens (any leading dimensions), K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dask_logits.store.profile import Compact


class Decoder(nn.Module):
    """Turns the codes of a batch into ``topk_ids`` and ``topk_logprobs``; its tables follow ``.to(device)``.

    Parameters
    ----------
    profile
        Of the cache.
    top_k
        Entries to decode; the rest of their mass goes to the tail.
    """

    id_table: Tensor
    gap_table: Tensor

    def __init__(self, profile: Compact, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.id_planes = [f"topk_ids_b{i}" for i in range(profile.n_id_planes)]
        self.gap_planes = [f"topk_gaps_b{i}" for i in range(profile.n_gap_planes)]
        self.register_buffer("id_table", torch.from_numpy(profile.id_table.astype("int64")), persistent=False)
        self.register_buffer("gap_table", torch.from_numpy(profile.gaps.copy()), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with decoded entries in place of codes.

        Parameters
        ----------
        batch
            With the planes [..., K] uint8 and ``top1_logprob`` [...].

        Returns
        -------
        dict of Tensor
            ``topk_ids`` [..., K] int64, ``topk_logprobs`` [..., K] float32 rounded to float16, and the rest unchanged.
        """
        out = dict(batch)
        rank_NK = sum(out.pop(name).long() << 8 * i for i, name in enumerate(self.id_planes))
        step_NK = sum(out.pop(name).int() << 8 * i for i, name in enumerate(self.gap_planes))
        assert isinstance(rank_NK, Tensor)
        assert isinstance(step_NK, Tensor)
        # Codes are sums of bytes, or of pairs of them, that wrap.
        code_NK = step_NK.cumsum(-1) & (0xFF if len(self.gap_planes) == 1 else 0xFFFF)
        top_N = out.pop("top1_logprob").float()
        logprobs_NK = (top_N[..., None] - self.gap_table[code_NK.long().clamp_(max=len(self.gap_table) - 1)]).half()
        dropped_N = logprobs_NK[..., self.top_k :].float().logsumexp(-1)
        out["topk_ids"] = self.id_table[rank_NK[..., : self.top_k].clamp_(max=len(self.id_table) - 1)]
        out["topk_logprobs"] = logprobs_NK[..., : self.top_k].float()
        if self.top_k < logprobs_NK.shape[-1]:
            out["tail_logmass"] = torch.logaddexp(out["tail_logmass"], dropped_N)
        return out
