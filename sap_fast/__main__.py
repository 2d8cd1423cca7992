"""``python -m sap_fast`` is the command ``sap-fast``."""

import sys

from sap_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
