"""What is fetched of a repo: the commit that a revision means, and of that the files that are needed.

A repo is named by its id, or as `org/name@revision` where no revision is given beside it.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import CachedRepoTreeNotFoundError, RevisionResolutionError, SafetensorsParsingError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from vlm_export.errors import InputError
from vlm_export.hub.answers import hub_errors
from vlm_export.hub.patience import Unreachable
from vlm_export.news import tell

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_TOLD_MEGABYTES = 1  # a download of less is not told


def download(repo_id: str, *, revision: str | None = None, allow_patterns: Sequence[str]) -> Path:
    """Fetch the files of a model or adapter that match `allow_patterns`; the snapshot's folder, named after its commit.

    A pickle that the repo also has as safetensors is left out. Works from the cache when the Hub cannot be reached.
    Raises InputError if the repo or the revision cannot be read, or if nothing matches.
    """
    repo_id, revision = _named(repo_id, revision)
    commit = commit_of(repo_id, revision)
    with hub_errors(repo_id, revision):
        listed = _listing(repo_id, commit)
        if not any(fnmatch.fnmatch(path, pattern) for path in listed for pattern in allow_patterns):
            at = revision or constants.DEFAULT_REVISION
            raise InputError(f"{repo_id}@{at}: no file matches {', '.join(allow_patterns)}: check the repo's files")
        superseded = _superseded_pickles(list(listed))
        wanted = filter_repo_objects(listed, allow_patterns=list(allow_patterns))
        _tell_download(repo_id, commit, {path: listed[path] for path in wanted if path not in superseded})
        folder = snapshot_download(
            repo_id,
            revision=commit,
            allow_patterns=list(allow_patterns),
            ignore_patterns=[glob.escape(path) for path in superseded],
        )
    return Path(folder)


def list_files(repo_id: str, *, revision: str | None = None) -> dict[str, int]:
    """The size in bytes of each of a repo's files, by path. Works from the cache when the Hub cannot be reached.

    Raises InputError if the repo or the revision cannot be read.
    """
    repo_id, revision = _named(repo_id, revision)
    commit = commit_of(repo_id, revision)
    with hub_errors(repo_id, revision):
        return _listing(repo_id, commit)


def commit_of(repo_id: str, revision: str | None) -> str:
    """The commit of a branch, a tag or a commit; the one of the last time where the Hub cannot be reached.

    Raises InputError if the Hub has none of that name, or neither it nor the cache can say.
    """
    known = _known_commit(repo_id, revision)
    try:
        # A Hub that is busy is waited for where nothing else knows.
        with hub_errors(repo_id, revision, waiting_seconds=0 if known else None):
            return HfApi().resolve_revision(repo_id, revision=revision).resolved
    except Unreachable:
        if known is None:
            raise
        return known


def find_models(author: str, search: str | None, most: int) -> list[tuple[str, str]]:
    """The models of an author that have `search` in their ids, by id: each with its newest commit.

    Raises InputError if the Hub cannot be asked.
    """
    with hub_errors(author, None):
        found = HfApi().list_models(author=author, search=search, expand=["sha"])
        named = [(model.id, str(model.sha)) for model in islice(found, most)]
    return sorted(named)


def tensors_of(repo_id: str, file: str, *, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of each tensor of a safetensors file, by key: its header alone is fetched.

    Raises InputError if the file cannot be read, or is none.
    """
    repo_id, _ = _named(repo_id, revision)
    with hub_errors(repo_id, revision):
        try:
            found = HfApi().parse_safetensors_file_metadata(repo_id, file, revision=revision)
        except SafetensorsParsingError as error:
            raise InputError(f"{repo_id}: {file}: not a readable safetensors file") from error
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.tensors.items()}


def cache_folder() -> Path:
    """Where downloads are kept, for all programs that use the Hub."""
    return Path(constants.HF_HUB_CACHE)


def _named(reference: str, revision: str | None) -> tuple[str, str | None]:
    """The id and the revision of what is named."""
    repo_id, _, of_reference = reference.partition("@")
    return repo_id, revision or of_reference or None


def _known_commit(repo_id: str, revision: str | None) -> str | None:
    """What the cache says that a revision was when it was last looked up."""
    with hub_errors(repo_id, revision):
        try:
            return HfApi().resolve_revision(repo_id, revision=revision, local_files_only=True).resolved
        except RevisionResolutionError:
            return None


def _listing(repo_id: str, commit: str) -> dict[str, int]:
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:
        found = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        tree = [entry for entry in found if isinstance(entry, RepoFile)]
    return {file.path: file.size for file in tree}


def _tell_download(repo_id: str, commit: str, wanted: Mapping[str, int]) -> None:
    """Tell how much of it the cache does not have, unless that is little."""
    missing = [path for path in wanted if not isinstance(try_to_load_from_cache(repo_id, path, revision=commit), str)]
    megabytes = sum(wanted[path] for path in missing) / 1e6
    if megabytes >= _TOLD_MEGABYTES:
        tell(f"fetching {repo_id}@{commit[:12]}: {len(missing)} files, {megabytes:,.0f} MB")


def _superseded_pickles(paths: Sequence[str]) -> list[str]:
    """The pickles whose weights the same folder has as safetensors: same stem, or `pytorch_model*` for `model*`."""
    safetensors = {_weights_name(path) for path in paths if path.endswith(".safetensors")}
    return [path for path in paths if path.endswith(PICKLE_SUFFIXES) and _weights_name(path) in safetensors]


def _weights_name(path: str) -> PurePosixPath:
    """`a/pytorch_model-00001-of-00002.bin` and `a/model-00001-of-00003.safetensors` both give `a/model`."""
    pure = PurePosixPath(path)
    return pure.with_name(re.sub(r"-\d+-of-\d+$", "", pure.stem).removeprefix("pytorch_"))
