"""The paper's statements as data, and what our table says about each (design.md, section 6).

* `models`: what a figure file may claim; every kind is a pydantic model, there is nothing to evaluate as code.
* `evaluate`: one claim and one table give one judgement; pure.
* `judge`: `python -m harness.claims.judge FIGURE.yaml TABLE.csv OUT.json`, the claims of one figure.
* `table`: `python -m harness.claims CLAIMS.json... --docs docs`, one table for all figures.
"""
