"""Where a collective was called, as the board shows it."""

from __future__ import annotations

import importlib
import os
import sys
import time

from workbench.ranks.calls import place_of


def test_the_line_of_a_module_that_was_edited_and_loaded_again_is_the_new_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = tmp_path / "edited_while_it_ran.py"
    module.write_text("import sys\n\ndef here(): return sys._getframe()  # before\n")
    loaded = importlib.import_module(module.stem)
    line, place = place_of(loaded.here(), "barrier()")
    assert (line, place) == (3, b"barrier()\0def here(): return sys._getframe()  # before")
    assert place_of(loaded.here(), "barrier()")[1] is place  # a loop does not read it again
    module.write_text("import sys\n\ndef here(): return sys._getframe()  # after\n")
    os.utime(module, (time.time() + 10,) * 2)
    importlib.reload(loaded)
    assert place_of(loaded.here(), "barrier()") == (3, b"barrier()\0def here(): return sys._getframe()  # after")
    assert place_of(None, "barrier()") == (0, b"barrier()")
