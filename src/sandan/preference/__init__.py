"""People (or a model) rank candidate answers: the log, the queue, the page, and what follows from the judgements."""
