"""Code executed on a worker: the calibration, and the scoring of one partition."""
