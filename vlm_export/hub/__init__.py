"""The Hub: what a push would change, the push itself, and the download of models, adapters and exported repos.

The only part that imports huggingface_hub, which finds the token by itself (HF_TOKEN, the login file): `token.py` is
all that looks at it. `patience.py` is around every request: it waits where the Hub says so, and has a limit in time;
`answers.py` makes one line of what cannot be mended. `plan.py` compares files with a branch, `push.py` carries that
out, `pull.py` fetches.
"""

from vlm_export.hub.content import MAX_ENTRIES, MAX_FILE_BYTES, Files, folder_files
from vlm_export.hub.patience import Unreachable
from vlm_export.hub.plan import FileChange, PushPlan, plan_push, plan_unseen, sized
from vlm_export.hub.pull import cache_folder, commit_of, download, find_models, list_files, tensors_of
from vlm_export.hub.push import PushResult, push_folder
from vlm_export.hub.remote import Kind, page_of
from vlm_export.hub.token import LOGIN, has_token
from vlm_export.hub.user import check_token, user_name

__all__ = [
    "LOGIN",
    "MAX_ENTRIES",
    "MAX_FILE_BYTES",
    "FileChange",
    "Files",
    "Kind",
    "PushPlan",
    "PushResult",
    "Unreachable",
    "cache_folder",
    "check_token",
    "commit_of",
    "download",
    "find_models",
    "folder_files",
    "has_token",
    "list_files",
    "page_of",
    "plan_push",
    "plan_unseen",
    "push_folder",
    "sized",
    "tensors_of",
    "user_name",
]
