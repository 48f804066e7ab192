"""Ranking of candidate answers by people or a model: the log, the queue, the page, agreement and preference pairs."""
