"""`reprise bench`: what reuse is worth on your hardware, in ratios within one run. See runner.py for the list."""
