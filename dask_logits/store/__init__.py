"""What lands on disk: partitions as Zarr groups, the cache as HDF5, and the way from one to the other."""
