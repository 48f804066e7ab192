"""The embedded world: a small place with people, animals and simple causes, described in English and in Japanese.

`facts` holds the true facts, `language` their wording, `generate` writes the data sets in `data/` from both, and
`oracle` judges any answer to any prompt by the facts. Training never imports the oracle.
"""
