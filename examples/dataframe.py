"""A DataFrame in, its columns out: answers joined to the rows that they belong to. Needs motet[arrow]."""

import pandas as pd

from motet import Classify, Client

reviews = pd.DataFrame(
    {
        "product": ["kettle", "kettle", "lamp", "lamp"],
        "title": ["Loud", "Great", "Broken", "Lovely"],
        "body": [
            "It wakes the whole house every morning.",
            "Boils in a minute and looks good too.",
            "Arrived in two pieces and smells of smoke.",
            "Warm light, and my daughter adores it.",
        ],
    },
    index=["r1", "r2", "r3", "r4"],
)

with Client() as client:
    # Only `title` and `body` leave this machine: no task reads another column.
    job = client.submit(reviews, {"sentiment": Classify("review-sentiment", input="{title}. {body}")})
    answers = job.to_pandas()

# Row i of a job is row i of the frame, whatever its index.
reviews[["sentiment", "score"]] = answers[["sentiment", "sentiment_score"]].to_numpy()
print(reviews[["product", "title", "sentiment", "score"]])
