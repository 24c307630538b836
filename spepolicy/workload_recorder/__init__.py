"""Record a workload from a real AArch64 program under user-mode emulation; README.md beside this file says how.

`plugin/recorder.c` counts while the program runs, `run` builds it and starts the emulator, `raw` reads its counts,
`symbols` finds the names of functions, `reduce` makes a workload of them, `page` writes it as YAML.
"""
