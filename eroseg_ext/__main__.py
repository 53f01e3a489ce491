"""``python -m eroseg_ext`` is the command ``eroseg``."""

import sys

from eroseg_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
