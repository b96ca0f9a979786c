"""Look at a model in the browser: pictures step by step, interpolations, bits/dim. Needs the extra: ddpm-ext[demo].

python scripts/demo.py                                               # runs/digits/pipeline, on a CPU
python scripts/demo.py --model google/ddpm-cifar10-32 --port 7861
python scripts/demo.py --model user/digits --push_to_space user/digits-demo      # the same page as a Space
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.demo import Studio, make_page, space_files
from ddpm_ext.hub.upload import push_space
from ddpm_ext.signals import report_error


@dataclass(frozen=True)
class Options:
    """What to show, and where."""

    model: str = field(default="runs/digits/pipeline", metadata={"help": "Folder or Hub name of a pipeline."})
    port: int = field(default=7860, metadata={"help": "Port of the page on this machine."})
    push_to_space: str | None = field(default=None, metadata={"help": "user/space: upload the page instead."})
    hub_token: str | None = field(default=None, metadata={"help": "Token; none: HF_TOKEN or `hf auth login`."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make a new Space private."})


def main() -> int:
    """Serve the page until it is interrupted, or upload it."""
    try:
        options = parse_options(Options, "Look at a model in the browser.")
        if options.push_to_space is None:
            make_page(Studio(options.model), options.model).launch(server_name="127.0.0.1", server_port=options.port)
            return 0
        with tempfile.TemporaryDirectory() as staging:
            files = space_files(options.model, options.push_to_space, Path(staging))
            push = push_space(files, options.push_to_space, private=options.hub_private_repo, token=options.hub_token)
        print(f"The page lies at {push.url}.")
    except (ModuleNotFoundError, OSError, ValueError) as error:  # HubError with them
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
