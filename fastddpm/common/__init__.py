"""What every room needs: files, checks of arguments, progress, pictures."""
