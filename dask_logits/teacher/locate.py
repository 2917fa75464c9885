"""Locate a teacher in a local folder or on the model hub, without waiting for an unreachable hub."""

from __future__ import annotations

import logging
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dask_logits.errors import TeacherError, first_line
from dask_logits.teacher.adapters import CONFIG, Adapter, find_adapter
from dask_logits.teacher.weights import StoredTensor, stored_tensors

logger = logging.getLogger(__name__)

# A hub that does not answer a small request within this time is considered unreachable.
_HUB_SECONDS = 5.0
_WHERE = "distillation.teacher.model_path"
_GGUF_CURE = (
    "convert it once to a folder of safetensors: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, "
    "quantization_config=GgufConfig(dequantize=True)).save_pretrained(new_folder), and the tokenizer alike "
    "(scripts/prepare_quickstart.py does this for the quickstart's teacher); then give the new folder"
)


@dataclass(frozen=True, kw_only=True)
class Location:
    """Location of a teacher's files.

    Parameters
    ----------
    base
        Folder or hub name of the full model.
    folder
        The full model's folder. None for a hub name.
    adapter
        The adapter to merge into it.
    tensors
        Headers of the folder's safetensors files. Empty for a hub name or pickled weights.
    """

    base: str
    folder: Path | None
    adapter: Adapter | None
    tensors: dict[str, StoredTensor]


def locate_teacher(path: str, *, allow_pickle: bool) -> Location:
    """Find a teacher's files and check the local ones.

    Raises
    ------
    TeacherError
        If the path does not exist, or its files are incomplete or of an unsupported kind.
    """
    folder = Path(path).expanduser()
    _refuse_gguf(path, folder)
    if not folder.is_dir():
        _require_hub_name(path, folder)
        return Location(base=path, folder=None, adapter=None, tensors={})
    adapter = find_adapter(folder)
    if adapter is not None:
        folder = Path(adapter.base)
        if not folder.is_dir():
            return Location(base=adapter.base, folder=None, adapter=adapter, tensors={})
        if adapter.folder != folder and (folder / CONFIG).is_file():
            raise TeacherError(
                f"{_WHERE}: the base model {str(folder)!r} of the adapter in {adapter.folder} holds an adapter itself; "
                "merge that one first"
            )
    tensors = stored_tensors(folder)
    if not tensors and (folder / "config.json").is_file():
        _require_weights(path, folder, allow_pickle=allow_pickle)
    return Location(base=str(folder), folder=folder, adapter=adapter, tensors=tensors)


def hub_is_reachable(name: str) -> bool:
    """Whether the model hub answers. If not, log a warning that only its cache is used.

    In offline mode (``HF_HUB_OFFLINE=1``) no request is sent, and the library uses its cache by itself.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return True
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        logger.warning(
            "the model hub %s does not answer (%s); looking for %s in its cache",
            constants.ENDPOINT,
            first_line(error),
            name,
        )
        return False


def hub_commit(name: str, revision: str | None, *, local_files_only: bool) -> str:
    """Return the commit that a revision of a hub model names now. Its files are then taken from this commit.

    The hub library stores files under their commit. A configuration no longer has its commit (transformers 5.23).

    Raises
    ------
    OSError
        If there is no such model, or it has no commit.
    """
    from transformers.utils import cached_file

    found = cached_file(name, "config.json", revision=revision, local_files_only=local_files_only)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(str(found)).as_posix())
    if commit is None:
        raise OSError(f"its files have no commit of the hub ({found})")
    return commit[1]


def hub_tensors(name: str, revision: str | None) -> dict[str, StoredTensor]:
    """Return the tensors in the downloaded safetensors files of a hub model.

    Raises
    ------
    TeacherError
        If a file is incomplete.
    """
    from transformers.utils import cached_file

    return stored_tensors(Path(str(cached_file(name, "config.json", revision=revision, local_files_only=True))).parent)


def refuse_hub_adapter(name: str, revision: str | None, *, local_files_only: bool) -> None:
    """Refuse a hub name of an adapter, which transformers would load unmerged or ignore.

    Raises
    ------
    TeacherError
        With instructions for using the adapter.
    """
    from transformers.utils import find_adapter_config_file

    found = find_adapter_config_file(name, revision=revision, local_files_only=local_files_only)
    if found is not None:
        raise TeacherError(
            f"{_WHERE}: {name!r} on the hub holds an adapter; download it (hf download {name} --local-dir adapter) and "
            "give that folder, so that it is merged into its base model"
        )


def _refuse_gguf(path: str, folder: Path) -> None:
    if folder.is_dir():
        names = sorted(file.name for file in folder.glob("*.gguf"))
        if not names or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return
        raise TeacherError(
            f"{_WHERE}: expected weights in safetensors, got only the GGUF file {names[0]} in {path!r}; {_GGUF_CURE}"
        )
    if path.lower().endswith(".gguf"):
        raise TeacherError(f"{_WHERE}: expected a folder with a model, got the GGUF file {path!r}; {_GGUF_CURE}")


def _require_hub_name(path: str, folder: Path) -> None:
    if folder.is_file():
        raise TeacherError(
            f"{_WHERE}: expected a folder with a model, got the file {path!r}; give the folder that holds it and "
            "config.json"
        )
    first, _, rest = path.partition("/")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or (rest and Path(first).is_dir())
    if looks_local:
        raise TeacherError(
            f"{_WHERE}: expected a folder with a model, got {path!r}, which does not exist; correct the path or give a "
            "hub name"
        )


def _require_weights(path: str, folder: Path, *, allow_pickle: bool) -> None:
    if not any(folder.glob("*.bin")):
        raise TeacherError(
            f"{_WHERE}: expected weights (model.safetensors, or model.safetensors.index.json and its files) in "
            f"{path!r}, got none; download the model again, or save it with model.save_pretrained"
        )
    if not allow_pickle:
        raise TeacherError(
            f"{_WHERE}: expected weights in safetensors, got pickled ones in {path!r}, which may be made to run code; "
            "convert them (model.save_pretrained writes safetensors), or set distillation.teacher.allow_pickle=true if "
            "you trust where they come from"
        )
