"""The driver: runs a job on Dask. The only package that imports Dask."""
