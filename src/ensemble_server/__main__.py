"""`python -m ensemble_server`, and the `ensemble` script."""

from __future__ import annotations

from ensemble_server.server.cli.app import main

if __name__ == "__main__":
    main()
