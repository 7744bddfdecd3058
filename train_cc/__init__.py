"""Class-conditional DMDR: cold start by distribution matching, then distribution matching with a reward."""

from train_cc.io import threads as threads
