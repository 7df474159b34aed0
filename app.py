"""The app: `python app.py` opens the page on the embedded model, `python app.py --help` says what else there is."""

import sys

from refusal_core.ui.server import main

if __name__ == "__main__":
    sys.exit(main())
