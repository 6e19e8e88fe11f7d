"""`python -m parscale`: the command line."""

import sys

from parscale.cli import main

sys.exit(main())
