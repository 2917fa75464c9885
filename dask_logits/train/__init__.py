"""The student's side: the dataset over a cache and the losses on sparse targets. No Dask, no teacher."""
