"""The licence of weights: read from the card of what they were made from, written into the next card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import ModelCard, constants

from ..errors import HubError, UserError
from ..hub.client import Client
from ..hub.messages import Operation, hub_errors
from ..hub.retry import RetryPolicy

__all__ = ["License", "as_license", "base_of_card", "license_in", "license_of"]


@dataclass(frozen=True)
class License:
    """A licence as the front matter of a card names it.

    Attributes:
        license: The Hub's name, such as "apache-2.0"; "other" for one that the Hub does not list.
        license_name: Name of another one.
        license_link: Address of its text.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def entries(self) -> dict[str, str]:
        """Return the entries of the front matter."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def as_license(license: str | License | None, name: str | None = None, link: str | None = None) -> License | None:
    """Return a licence that may be given by its name alone; name and link belong to "other".

    Args:
        license: The Hub's name of it, "other", the licence itself, or None.
        name: Name of one that the Hub does not list.
        link: Address of its text.

    Raises:
        UserError: another licence has a name or a link, or "other" has none.
    """
    if license is not None and not isinstance(license, str):
        return license
    if (license == "other") != (name is not None):
        raise UserError(
            f'A licence that the Hub does not list is "other" and has a name, and only that: got license={license!r}, '
            f"license_name={name!r}."
        )
    if link is not None and license != "other":
        raise UserError(f'license_link belongs to the licence "other", got {license!r}.')
    return None if license is None else License(license, name, link)


def license_of(model: str | Path, token: str | None = None, retry: RetryPolicy | None = None) -> License | None:
    """Return the licence that the card of a run, a pipeline or a Hub repository names, None without one.

    Args:
        model: A folder, or "user/model"; of a pipeline or a checkpoint in a run, the run's card counts.
        token: For a private repository.
        retry: How often and how long failing calls are retried.

    Raises:
        HubError: the Hub does not give the card, or a folder's card links to a file of that folder.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        operation = Operation(str(model), "pull", f"hf download {model} README.md", has_token=token is not None)
        with hub_errors(operation):
            text = Client(token, retry).text(str(model), "README.md", constants.DEFAULT_REVISION)
        return license_in(text, f"{constants.ENDPOINT}/{model}/blob/{constants.DEFAULT_REVISION}/")
    parents = {"pipeline": [folder.resolve().parent]}.get(folder.name, [])
    if folder.resolve().parent.name == "checkpoints":
        parents = [folder.resolve().parent.parent]
    cards = [path / "README.md" for path in (folder, *parents)]
    found = (license_in(card.read_text(encoding="utf-8"), None) for card in cards if card.is_file())
    return next((license for license in found if license is not None), None)


def base_of_card(text: str) -> str | None:
    """Return the Hub name that a card gives as its base model, None where it gives none or several."""
    base = ModelCard(text, ignore_metadata_errors=True).data.get("base_model")
    return base if isinstance(base, str) else None


def license_in(text: str, place: str | None) -> License | None:
    """Return the licence that a card names, None where it names none.

    Args:
        text: The card.
        place: What the address of a file beside it begins with; None refuses a link to such a file.

    Raises:
        HubError: it links to a file beside it.
    """
    data = ModelCard(text, ignore_metadata_errors=True).data
    word, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not word:
        return None
    if link and "://" not in link:
        if place is None:
            raise HubError(
                f"The licence {name or word} of the base model is the file {link} of its folder, to which no other "
                "card can link: give --license, and for one that the Hub does not list --license_name and "
                "--license_link."
            )
        link = place + link
    return License(word, name, link)
