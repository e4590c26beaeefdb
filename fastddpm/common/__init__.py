"""Share code among all packages: files, checks of arguments, progress, pictures."""
