"""Average the weights of a finished run with any relative width, from the snapshots of its power-function averages.

python scripts/train.py --ema power_function --output_dir runs/power
python scripts/reconstruct_ema.py --run runs/power --sigma_rel 0.08 --output_dir runs/power/pipeline-0.08
"""

from __future__ import annotations

import sys

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.run_dir import RunError
from ddpm_ext.signals import report_error
from ddpm_ext.training.export import ReconstructConfig, reconstruct


def main() -> int:
    """Options -> a pipeline."""
    try:
        config = parse_options(ReconstructConfig, "Average a run's weights with another relative width.")
        number = reconstruct(config)
    except (RunError, ValueError) as error:
        return report_error(error)
    print(f"Average of width {config.sigma_rel:g} from {number} snapshots in {config.output_dir}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
