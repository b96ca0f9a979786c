"""Upload a finished run, or a saved pipeline, to the Hugging Face Hub in one checked commit, its card with it.

    python scripts/push_to_hub.py --model runs/digits --hub_model_id user/digits --license apache-2.0
    python scripts/push_to_hub.py --model runs/digits --hub_model_id user/digits --variant fp16 --tags v1.0
    python scripts/push_to_hub.py --model runs/digits --card_dir model_cards/digits     # the card alone, no upload

Run again after an interruption: what is there is not sent twice. Needs no accelerator.
"""

import sys

from ddpm_ext.cli.main import script

main = script("push")

if __name__ == "__main__":
    sys.exit(main())
