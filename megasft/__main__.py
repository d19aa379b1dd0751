"""`python -m megasft` and `torchrun -m megasft`: the command `megasft`."""

from megasft.cli import main

if __name__ == "__main__":
    main()
