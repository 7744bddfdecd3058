"""`python -m evaluation.report`."""

from evaluation.report import main

main()
