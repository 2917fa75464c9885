"""Make one cache of what static workers made.

``python scripts/merge_teacher_logits.py --input-dir DIR --num-workers 4``, the same as ``dask-logits merge``, for those
who submit a script.
"""

import sys

from dask_logits.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
