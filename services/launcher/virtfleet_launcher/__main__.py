"""Entry for ``python3 -I -S …/virtfleet_launcher/__main__.py`` and ``python3 -m virtfleet_launcher``."""

import os
import sys

if not __package__:
    # With -I nothing of this tree is on the path; the package's parent is all that is needed.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from virtfleet_launcher.app import main

if __name__ == "__main__":
    sys.exit(main())
