"""The driver: makes a run happen. The only home of Dask."""
