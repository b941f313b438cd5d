"""Make the pictures of README.md from a real run: `docs/pictures/*.png` (what `make figures` calls).

A sampled rollout of additions over 4 ranks, three steps, the engine asleep after each: the same as in the first notebook.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

import workbench as wb
from workbench.demo import story
from workbench.view.style import alt_text, figure_png

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"


def sampled_run() -> wb.Run:
    with wb.launch(story.WORLD_SIZE) as cluster:
        cluster.execute(story.PROMPTS_CELL)
        engine = wb.start_engine(cluster, model="tiny", kv_cache_bytes=story.KV_CACHE_BYTES)
        return wb.rollout(cluster, "mine", engine=engine, sampling=story.SAMPLED, sleep_level=1, num_steps=story.NUM_STEPS, keep=False)


def main() -> int:
    run = sampled_run()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, ax in {"memory": run.plot_memory()}.items():
        figure = ax.get_figure(root=True)
        assert isinstance(figure, Figure)
        path = FOLDER / f"{name}.png"
        path.write_bytes(figure_png(figure))
        print(f"{path.relative_to(FOLDER.parent.parent)}: {path.stat().st_size / 1000:.0f} kB; {alt_text(ax)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
