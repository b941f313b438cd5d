"""What the README claims about speed and memory, measured beside what people use today.

    run.py      the command: which measurements, the table, the files in results/
    line.py     one line of the table: ours, theirs, the ratio, what is to be reached
    launch.py cells.py scatter.py tokens.py sleep.py collectives.py     a measurement each: `measure(...) -> Result`, `Result.lines()`
    peers/      the same work done by others, each in an interpreter of its own

Ours and theirs are measured in turns within one run and compared as ratios of medians: a busy machine slows both.
"""
