"""The method: what a run is, its two turns, the loop over them, and what is saved of it."""
