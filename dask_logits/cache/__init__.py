"""The file format: one partition as Zarr, one cache as HDF5, and the reader of both."""
