"""``python -m harness IN.json OUT.json`` sorts a list of integers."""

import json
import sys
from pathlib import Path

from harness.sorting import sort

numbers = json.loads(Path(sys.argv[1]).read_text())
Path(sys.argv[2]).write_text(json.dumps(sort(numbers)))
print(f"sorted {len(numbers)} numbers")
