"""The run folder: plan, receipts and failures, and the consolidation of partitions into the cache."""
