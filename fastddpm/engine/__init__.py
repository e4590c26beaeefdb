"""How a table is walked: the loop and its buffers, what runs its steps, and how samples are put into batches."""
