"""Average the weights of a finished run with any relative width, from the snapshots of its power-function averages.

python scripts/train.py --ema power_function --output_dir runs/power
python scripts/reconstruct_ema.py --run runs/power --sigma_rel 0.08 --output_dir runs/power/pipeline-0.08
"""

import sys

from ddpm_ext.cli.main import script

main = script("reconstruct-ema")

if __name__ == "__main__":
    sys.exit(main())
