"""The embedded world: a small place with people, animals and simple causes, told in English and in Japanese.

`facts` holds what is true, `language` how it is said, `generate` writes the data sets in `data/` from them, and
`oracle` judges any answer to any prompt by the facts. Training never imports the oracle.
"""
