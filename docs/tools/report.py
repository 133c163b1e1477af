"""Render the report of committed results, for the pictures of docs/proof-of-concept.md.

    python docs/tools/report.py FOLDER
    SHOT="chromium --headless --hide-scrollbars --window-size=1280,1160"
    $SHOT --screenshot=docs/pictures/report.png FOLDER/en/report.html
    $SHOT --screenshot=docs/pictures/report-ja.png FOLDER/ja/report.html

The results are those of docs/evidence/digits-torch.json. They have no history of epochs, so plots over epochs are left
out. The Japanese picture needs a font with Japanese glyphs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deqcore
from deqcore.study.report import page
from deqcore.study.settings import read

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence"


def main(folder: Path) -> None:
    """Write the report in both languages."""
    stored = json.loads((EVIDENCE / "digits-torch.json").read_text(encoding="utf-8"))
    study = read(deqcore.Config.load(EVIDENCE / "digits.toml").section("study"), "digits.toml")
    about = {"machine": stored["machine"], "command": "deqcore study docs/evidence/digits.toml"}
    for language in ("en", "ja"):
        root = folder / language
        root.mkdir(parents=True, exist_ok=True)
        page.write(root, study.model_copy(update={"language": language}), stored["cells"], about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
