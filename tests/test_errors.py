import pickle

import pytest

from dask_logits import errors

CHILDREN = [
    (errors.ConfigError("m", ["p"]), ValueError, {"problems": ("p",)}),
    (errors.DatasetError("m", row=3), ValueError, {"row": 3}),
    (errors.TeacherError("m", row=3), RuntimeError, {"row": 3}),
    (errors.RunConflictError("m", {"a": (1, 2)}), ValueError, {"differences": {"a": (1, 2)}}),
    (errors.CacheError("m", "/x"), OSError, {"path": "/x"}),
    (errors.CapacityError("m", 2, 1), OSError, {"needed_bytes": 2, "free_bytes": 1}),
    (errors.ClusterError("m"), RuntimeError, {}),
    (errors.PartitionsFailedError("m", {1: "r"}), RuntimeError, {"reasons": {1: "r"}}),
]


@pytest.mark.parametrize(("error", "builtin", "facts"), CHILDREN, ids=lambda v: type(v).__name__)
def test_errors_survive_pickling_with_their_facts(error, builtin, facts) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert isinstance(copy, builtin)
    assert str(copy) == "m"
    assert {name: getattr(copy, name) for name in facts} == facts


def test_the_tree_has_no_other_children() -> None:
    assert set(errors.DaskLogitsError.__subclasses__()) == {type(error) for error, _, _ in CHILDREN}
