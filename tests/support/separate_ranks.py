"""The `megasft` command whose launcher starts each rank as a Python of its own, as on GPUs."""

import os

from megasft.cli import main

if __name__ == "__main__":
    if "RANK" not in os.environ:
        from megasft import host

        host.CUDA = True
    main()
