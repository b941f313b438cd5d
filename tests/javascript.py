"""Plain functions of a widget's ES module, called outside a browser: by the node that playwright brings along."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from playwright._impl._driver import compute_driver_executable

VIEW = Path(__file__).parents[1] / "workbench" / "view"


def evaluate(module: str, expression: str, **values: Any) -> Any:
    """What an expression gives, in which `m` is the module of `workbench/view` and `values` are bound by name.

    Raises:
        AssertionError: it throws; its message is in the text.
    """
    code = (
        f"import * as m from {json.dumps((VIEW / module).as_uri())};\n"
        "import {readFileSync} from 'node:fs';\n"
        f"const {{{', '.join(values) or '_'}}} = JSON.parse(readFileSync(0, 'utf8'));\n"
        f"process.stdout.write(JSON.stringify({expression}) ?? 'null');"
    )
    node = compute_driver_executable()[0]
    done = subprocess.run(
        [node, "--input-type=module", "-e", code], input=json.dumps(values), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
