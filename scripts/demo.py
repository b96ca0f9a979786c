"""Look at a model in the browser: pictures step by step, interpolations, bits/dim. Needs the extra: ddpm-ext[demo].

python scripts/demo.py                                               # the digits of this package, on a CPU
python scripts/demo.py --model google/ddpm-cifar10-32 --port 7861
python scripts/demo.py --model user/digits --push_to_space user/digits-demo      # the same page as a Space
"""

import sys

from ddpm_ext.cli.main import script

main = script("demo")

if __name__ == "__main__":
    sys.exit(main())
