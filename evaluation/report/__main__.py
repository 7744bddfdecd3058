"""`python -m evaluation.report`: see `page`."""

from evaluation.report.page import main

main()
