"""What samples are worth, and what lower precision costs."""
