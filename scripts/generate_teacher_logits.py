"""Score a dataset with a teacher: ``python scripts/generate_teacher_logits.py distillation.dataset.name=wikitext …``.

The same as ``dask-logits generate``, for those who submit a script.
"""

import sys

from dask_logits.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
