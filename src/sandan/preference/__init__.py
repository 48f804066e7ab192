"""Step 3, ranking by people, a model or simulated rankers: the log, the queue, the page, agreement, preference pairs."""
