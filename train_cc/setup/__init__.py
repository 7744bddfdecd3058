"""From a command line to a run. Only here does code see `args`."""
