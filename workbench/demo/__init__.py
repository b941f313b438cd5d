"""The demonstration: `workbench demo` in a terminal, `notebooks/01_run_a_rollout` in Jupyter; both call what stands here.

    parts     the few functions that both share: a bare vLLM to compare with, what equal slicing would do, memory seen from outside
    story     the parts in order, a section each
    terminal  sections as tables on a terminal, and as a report of one HTML file

What is claimed is checked before it is told; a claim that does not hold is an error.
"""

from __future__ import annotations

from workbench.demo.parts import bare_vllm, compare, equal_slicing, memory_mib, name_engine, tokens_of

__all__ = ["bare_vllm", "compare", "equal_slicing", "memory_mib", "name_engine", "tokens_of"]
