"""The bundled small model, the recipe that trains it, and checkpoints with random weights.

`path` and `state_dict` find a model, `make_dummy` writes one, `addition` is the task that "tiny" was taught. Importing this loads no torch.
"""

from __future__ import annotations

from workbench.models import addition
from workbench.models.dummy import make_dummy
from workbench.models.paths import path, state_dict

__all__ = ["addition", "make_dummy", "path", "state_dict"]
