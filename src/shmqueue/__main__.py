"""``python -m shmqueue``: the same as the command ``shmqueue``."""

import sys

from .cli import main

sys.exit(main())
