"""What the Hub refuses, in one line that says what to do next and never shows the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from httpx2 import TransportError
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlm_export.errors import InputError, VlmExportError, one_line, reason, shown
from vlm_export.hub.patience import Unreachable, patient
from vlm_export.hub.token import LOGIN, redacted, sent_token


@contextmanager
def hub_errors(repo_id: str, revision: str | None, waiting_seconds: float | None = None) -> Iterator[None]:
    """Within, the Hub is waited for as `patient` says, and what it refuses is an InputError of one line.

    Raises:
        Unreachable: it did not answer, or is not to be asked.
        InputError: it refused, or answered as no Hub does.
    """
    sent_token()
    try:
        with patient(repo_id, waiting_seconds):
            yield
    except Exception as error:
        # A Hub may repeat what it was sent, and `--debug` prints every error of the chain.
        shows_token = any(redacted(str(link)) != str(link) for link in _printed(error))
        ours = next((link for link in _chain(error) if isinstance(link, VlmExportError)), None)
        if ours is not None:
            if ours is error and not shows_token:
                raise
            raise type(ours)(redacted(str(ours))) from (None if shows_token else error)
        message = next(filter(None, (_explain(link, repo_id, revision) for link in _chain(error))), None)
        if message is None and isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine
        if message is None:  # what huggingface_hub stumbled over in an answer, say a login page's HTML
            message = (
                f"{repo_id}: {constants.ENDPOINT} does not answer as the Hub does ({reason(error)}): check "
                "HF_ENDPOINT, and that no login page stands in front of the network"
            )
        kind = Unreachable if any(map(_is_unreachable, _chain(error))) else InputError
        raise kind(redacted(message)) from (None if shows_token else error)


def not_a_repo_id(repo_id: str) -> str:
    """What is wrong with an id without an owner."""
    return f"{shown(repo_id)} is not a repo id: write namespace/name, in letters, digits, '-', '_' and '.'"


def is_conflict(error: BaseException) -> bool:
    """Whether the Hub refused a commit since its branch has got another one."""
    return any(isinstance(link, HfHubHTTPError) and link.response.status_code == 412 for link in _chain(error))


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, OfflineModeIsEnabled | TransportError | ConnectionError | TimeoutError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _printed(error: BaseException | None) -> Iterator[BaseException]:
    """What a traceback shows: each with what it was raised from, or else what was handled when it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    """What happened and what to do next; None if the error is not about talking to the Hub."""
    if isinstance(error, HFValidationError):
        return not_a_repo_id(repo_id)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: HF_HUB_OFFLINE is set and the cache does not have what is needed: unset it and run again"
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo_id, revision)
    if type(error) is ConnectionError:  # of Xet's client, which waits and retries by itself
        return f"{repo_id}: the upload by Xet failed ({reason(error)}): run again, or set HF_HUB_DISABLE_XET=1"
    if isinstance(error, TransportError | ConnectionError | TimeoutError):
        return f"{repo_id}: cannot reach {constants.ENDPOINT}: check the network and HF_ENDPOINT, then run again"
    return None


def _explain_answer(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status = error.response.status_code
    said = one_line(error.server_message or "no reason given")
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then {LOGIN} of that account"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: name a branch, a tag or a commit that it has"
    if status == 401 and sent_token() is None:
        return f"{repo_id}: no public repo of that name, and no token to see a private one: check the name, or {LOGIN}"
    if status == 401:
        return f"{repo_id}: the Hub does not accept the token ({said}): {LOGIN} to a valid one"
    if status == 403:
        if error.response.request.method in ("GET", "HEAD"):
            whose = f"{LOGIN} of an account" if sent_token() is None else "use a token"
            return f"{repo_id}: the Hub lets nothing of it be read ({said}): {whose} that may read {repo_id}"
        return f"{repo_id}: the token may not do this ({said}): use a token with write access to {repo_id}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} was not found, or the token may not see it: check the name and the token's access"
    if status == 412:
        return f"{repo_id} got another commit during the push ({said}): look at the new plan, then push again"
    if status < 500:
        return f"{repo_id}: the Hub refused the request with {status} ({said}): correct that and run again"
    return f"{repo_id}: the Hub answered {status} ({said}): try again later"
