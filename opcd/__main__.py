"""`python -m opcd` is `opcd`."""

import sys

from opcd.cli import main

sys.exit(main())
