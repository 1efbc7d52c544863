"""Files from the Hugging Face hub, by its own client, which keeps them in its own cache."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from tomevit.cards import first_line
from tomevit.config import Source
from tomevit.errors import DownloadError
from tomevit.progress import Bar
from tomevit.weights.disk import DiskError, disk_error, explain_disk_errors, no_home
from tomevit.weights.servers import Interrupted, UnreachedError, bounded_answers, is_offline, retry, words

HUB_ATTEMPTS = 3  # around huggingface_hub, which retries most failures itself


class UnreachableError(DownloadError):
    """The hub does not answer, or should not be asked."""


def files_on_hub(source: Source, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Those of some files that a repository has, with their paths in huggingface_hub's cache.

    Each is downloaded when it is its turn. Where the hub cannot be reached, they are those in that cache.

    Raises:
        UnreachableError: at the end, after what the cache has.
        DownloadError: the hub refuses, or fails.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: Exception | None = None
    for name in names:
        try:
            path = retry(partial(_try_hub, source, name, local=unreachable is not None), HUB_ATTEMPTS)
        except (LocalEntryNotFoundError, UnreachedError) as error:
            unreachable = unreachable or error
        except EntryNotFoundError:
            continue
        else:
            yield name, path
    if unreachable is not None:
        cause = words(first_line(unreachable.__cause__ or unreachable))
        offline = "is not in Hugging Face's cache, and HF_HUB_OFFLINE is set"
        why = offline if is_offline() else f"cannot be reached ({cause}): is there a network?"
        raise UnreachableError(f"{source.hub} {why}") from unreachable


def _try_hub(source: Source, name: str, *, local: bool) -> Path:
    """One attempt; its EntryNotFoundError: there is no such file.

    LocalEntryNotFoundError and UnreachedError: the hub cannot be asked.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    assert source.hub
    repo, cache = source.hub, Path(constants.HF_HUB_CACHE)
    if cache.parts[:1] == ("~",):
        raise DiskError(no_home("HF_HOME"))
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        with bounded_answers(), explain_disk_errors(cache, "HF_HOME"):
            # It would warn, and then fill the disk.
            there = hf_hub_download(repo, name, revision=source.revision, local_files_only=local, dry_run=True)
            place = next(place for place in (cache, *cache.parents) if place.exists())
            if there.will_download and (there.file_size or 0) > shutil.disk_usage(place).free:
                raise disk_error(errno.ENOSPC, cache, "HF_HOME", there.file_size)
            bar = None if are_progress_bars_disabled() else Bar
            return Path(hf_hub_download(repo, name, revision=source.revision, local_files_only=local, tqdm_class=bar))
    except (DiskError, EntryNotFoundError, Interrupted, UnreachedError):
        raise
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} on the hub is gated: accept its licence at {constants.ENDPOINT}/{repo}, and {log_in}"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"there is no {repo} on the hub, or it is private: check the name, or {log_in}") from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{repo} on the hub has no revision {source.revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{repo} on the hub answered {status} for {name}"
        if status == 408 or status >= 500:
            raise Interrupted(reason) from error
        hint = f": the token is refused, {log_in}" if status in (401, 403) else ""
        raise DownloadError(reason + hint) from error
    except HFValidationError as error:
        raise DownloadError(f"{repo!r} is no name on the hub, which has the form owner/repo") from error
    except Exception as error:  # of httpx, httpx2 or hf_xet, which have no base class in common
        raise Interrupted(f"{name} of {repo} could not be read from the hub ({words(first_line(error))})") from error
