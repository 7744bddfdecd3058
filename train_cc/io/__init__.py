"""The door: flags, files and folders are checked here, once, where they come in or go out. Knows no network."""
