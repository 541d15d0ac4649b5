"""Experiments: what `reprise lab` does, without its words.

    source.py    a trace by file, URL or generator           wanted.py     a set-up by a few choices
    untimed.py   hit rates between LRU and the oracle        timed.py      whole scores of simulated runs
    ceiling.py   the oracle of a timed run                   logs.py       recording and reliving event logs
    jobs.py      independent work over the cores             plots.py      pictures of what was found

Results are rows: dictionaries of plain values, ready for JSON.
"""
