"""Whether a hub has a model, asked once: transformers would ask for half a minute."""

import logging

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from opcd.errors import InputError, did_you_mean
from opcd.models import builtin

log = logging.getLogger(__name__)

SECONDS = 10.0  # for the hub's answer
_CONFIG = "config.json"


def check_on_hub(name: str, what: str = "model") -> None:
    """Raise InputError for a name that is no folder and that the hub does not know.

    A model that was fetched before needs no network.
    """
    if "/" in name and _is_fetched(name):
        return
    begin = f"{what} must be a folder, a hub's owner/name or {builtin.NAME!r}, got {name!r}: there"
    begin += " is no such folder"
    if "/" not in name:
        hint = did_you_mean(name, [builtin.NAME]) or "; check the path"
        raise InputError(f"{begin}{hint}")
    try:
        get_hf_file_metadata(hf_hub_url(name, _CONFIG), timeout=SECONDS)
        log.info("fetching %s from the hub", name)
    except GatedRepoError as error:
        raise InputError(
            f"{begin}, and its owner's terms on the hub are not accepted yet; accept them there, "
            f"and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{begin}, and the hub has no such model, or a private one; check the spelling, or log "
            f"in with `hf auth login`"
        ) from error
    except Exception as error:  # of the HTTP library, which is not the same in all versions
        said = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{begin}, it was not fetched before, and the hub cannot be asked ({said[0]}); check "
            f"the path, or the network"
        ) from error


def _is_fetched(name: str) -> bool:
    return isinstance(try_to_load_from_cache(name, _CONFIG), str)
