"""The page at `/` and the API's description at `/docs`, as files that any browser runs: no build step, no other host.

`index.html`, `style.css` and the modules `*.js` are ours, one view or one idea each; `vendor/` and `docs/` hold
libraries as they are published, with their licences, sources and hashes (`SOURCES.md`).
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
