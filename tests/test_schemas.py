from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_schemas_in_the_documents_are_those_of_the_records() -> None:
    written = {path.name: json.loads(path.read_text()) for path in (ROOT / "docs" / "schemas").glob("*.json")}
    schemas = runpy.run_path(str(ROOT / "scripts" / "schemas.py"))["schemas"]()
    assert written == {name: json.loads(text) for name, text in schemas.items()}
