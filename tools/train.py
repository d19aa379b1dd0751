"""Train: `torchrun --nproc-per-node N tools/train.py --config C [--dataset D] [--set section.key=value ...]`.

Without torchrun, it launches the ranks itself, as `megasft train` does.
"""

import sys

from megasft.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
