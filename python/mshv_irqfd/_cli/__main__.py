"""`python -m mshv_irqfd._cli`, for when the console script is not on the path."""

import sys

from mshv_irqfd._cli import main

if __name__ == "__main__":
    sys.exit(main())
