"""The plan of a run (`--dry-run`): what it needs and costs, told without a GPU and without weights."""
