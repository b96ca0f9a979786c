"""Upload a finished run, or a saved pipeline, to the Hugging Face Hub in one checked commit, its card with it.

    python scripts/push_to_hub.py --model runs/digits --hub_model_id user/digits --license apache-2.0
    python scripts/push_to_hub.py --model runs/digits --hub_model_id user/digits --variant fp16 --tags v1.0
    python scripts/push_to_hub.py --model runs/digits --card_dir model_cards/digits     # the card alone, no upload

Run again after an interruption: what is there is not sent twice. Needs no accelerator.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.hub.retry import HubError
from ddpm_ext.publishing.model_card import export_card
from ddpm_ext.publishing.publisher import publish


@dataclass(frozen=True)
class Options:
    """What to push, and where to."""

    model: str = field(metadata={"help": "Run folder, or folder of a saved pipeline."})
    hub_model_id: str | None = field(default=None, metadata={"help": "user/model; none: the folder's name."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make a new repository private."})
    hub_token: str | None = field(default=None, metadata={"help": "Token; none: HF_TOKEN or `hf auth login`."})
    revision: str | None = field(default=None, metadata={"help": "Branch; none: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    commit_message: str | None = field(default=None, metadata={"help": "First line of the commit."})
    tags: list[str] = field(default_factory=list, metadata={"help": "Tags for the commit, as v1.0."})
    variant: str | None = field(default=None, metadata={"help": "fp16 or bf16: weights of that precision, too."})
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, by the Hub's name."})
    parent_commit: str | None = field(default=None, metadata={"help": "Push only while the branch is at this commit."})
    card_dir: str | None = field(default=None, metadata={"help": "Write the card and its pictures there; no upload."})


def main() -> int:
    """Render the card of a run, push, and say where it lies."""
    try:
        options = parse_options(Options, "Upload a run or a pipeline to the Hub.")
        run, name = Path(options.model), options.hub_model_id or Path(options.model).resolve().name
        if options.card_dir is not None:
            print(f"The card lies in {export_card(run, options.card_dir, name, options.license)}.")
            return 0
        names = ("revision", "create_pr", "commit_message", "tags", "variant", "license", "parent_commit")
        more = {name: getattr(options, name) for name in names}
        push = publish(run, name, private=options.hub_private_repo, token=options.hub_token, **more)
    except (HubError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{push.repo_id}: {push.pull_request or push.url}" + ("" if push.changed else " (nothing has changed)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
