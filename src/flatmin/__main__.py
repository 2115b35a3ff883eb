"""``python -m flatmin``: the command line, also under ``torchrun -m flatmin``."""

import sys

if __name__ == "__main__":
    from flatmin.train.cli import main

    sys.exit(main())
