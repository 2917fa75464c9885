"""``python -m dask_logits`` is the ``dask-logits`` command."""

from dask_logits.cli import main

if __name__ == "__main__":
    main()
