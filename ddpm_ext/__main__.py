"""`python -m ddpm_ext train …` is `ddpm-ext train …`."""

import sys

from .cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
