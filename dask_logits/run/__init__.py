"""The run folder: what is planned, committed and failed, and the way from partitions to the cache."""
